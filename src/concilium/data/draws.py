"""Random numbers as a function of a key, such as (seed, site, round, step): the same in any process and in any order.

nnU-Net's packages draw from the global generators of `random`, `numpy` and `torch`; so these three are what is seeded.

torch's generator of the CPU uses 32 bits of a seed. Whoever sees something that noise was added to could try all of them; so what
is drawn from a key with a site's `Secret` in it depends on every bit of that. On a GPU it depends on 64 bits. Neither generator
is a cryptographic one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, shake_256

import numpy as np
import torch

from concilium.errors import ContractError


def digest(*key: str | int) -> int:
    """A number below 2**64 that depends on every part of the key, on its type and on its place (BLAKE2b).

    Python's `hash` is not used: that of text differs from one process to the next.
    """
    for part in key:
        if not isinstance(part, str | int) or isinstance(part, bool):
            raise ContractError(
                f"Part {part!r} of a random key is a {type(part).__name__}. Text and integers are allowed. Convert it first."
            )
    return int.from_bytes(blake2b(json.dumps(key).encode(), digest_size=8).digest(), "little")


class Secret(str):
    """Part of a key that nobody outside a site may guess; an empty one changes nothing."""

    __slots__ = ()


def seed_all(*key: str | int) -> int:
    """The digest of the key, from which `random`, `numpy` and `torch` (all devices) are now seeded."""
    number = digest(*key)
    _seed_shared(number)
    torch.manual_seed(number)
    _fill(key)
    return number


WORDS, STATE_BYTES, FIRST_WORD = 624, 5056, 24
"""Of torch's generator of the CPU (MT19937): numbers of 32 bits in its state, bytes of that, and where the numbers begin."""


@contextmanager
def drawn_from(*key: str | int) -> Iterator[int]:
    """A block that draws from generators seeded as by `seed_all`, and leaves them as they were found (on the CPU only).

    So what a site draws next, in dropout or in a filter, does not depend on whether another process made its batches.
    """
    number = digest(*key)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        _seed_shared(number)
        torch.default_generator.manual_seed(number)
        _fill(key)
        yield number
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_shared(number: int) -> None:
    random.seed(number)
    np.random.seed([number & 0xFFFFFFFF, number >> 32])


def _fill(key: tuple[str | int, ...]) -> None:
    """Where there is a secret in the key: make all of torch's generator, which was just seeded, depend on every bit of it.

    Raises:
        ContractError: this torch keeps its state otherwise.
    """
    if not any(isinstance(part, Secret) and part for part in key):
        return
    words = shake_256(json.dumps(key).encode()).digest(4 * WORDS)
    state = torch.get_rng_state()
    if len(state) != STATE_BYTES:
        raise ContractError(
            f"The state of this torch's generator has {len(state)} bytes. Expected {STATE_BYTES}. Use the version of torch that "
            "this version of Concilium asks for."
        )
    end = FIRST_WORD + 8 * WORDS  # of each number of 32 bits it keeps 64
    state[FIRST_WORD:end] = torch.from_numpy(np.frombuffer(words, "<u4").astype("<u8").view(np.uint8))
    torch.set_rng_state(state)
