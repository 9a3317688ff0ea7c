"""Which cases all parties have, found without showing a name: private set intersection by commutative blinding.

After Meadows 1986 (IEEE S&P) and Huberman, Franklin & Hogg 1999 (EC): every party raises the hash of each name to a secret power
of its own, and those of all others too; names that were equal are equal still, and none can be told from its blinded value
without the secrets of all. Powers are those of X25519 (RFC 7748); names are hashed onto its curve. The order in which a party
shows its cases is that of their blinded values, which tells nothing.

What is learnt: how many cases each party has, how many any group of them has, and which of the blinded ones a party cannot use;
each party besides, which of its own all have. Whoever takes part can ask about names by listing them as cases of its own, as
with every protocol of this kind (decisions/0013).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from torch import Tensor

from concilium.errors import ContractError

BYTES = 32
"""Of a point."""
_P = 2**255 - 19
_A = 486662
"""Of the curve: v² = u³ + A u² + u over the integers modulo P."""


@dataclass(frozen=True)
class Found:
    """Of one party: its rows that all have; those that all have, but that lie elsewhere in space at one of them; and those that
    one of them cannot use. All in an order that parties share."""

    rows: tuple[int, ...]
    apart: tuple[int, ...]
    lost: tuple[int, ...] = ()
    cases: tuple[int, ...] = ()
    """Which of the cases that were found each of `rows` is: not every party has them all where fewer are enough."""


def secret_in(file: Path) -> bytes:
    """The party's secret, made where there is none; it stays there, so that a run which goes on finds the same cases."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as written:
            written.write(os.urandom(BYTES))
    return file.read_bytes()


def hidden(texts: Sequence[str], secret: bytes) -> Tensor:
    """Blinded points of these texts: uint8 (n, 32)."""
    return blinded(_tensor([_hashed(text) for text in texts]), secret)


def order_of(points: Tensor) -> list[int]:
    """The order in which they are shown: that of the blinded values."""
    return sorted(range(len(points)), key=lambda i: points[i].numpy().tobytes())


def blinded(points: Tensor, secret: bytes) -> Tensor:
    """The points, each raised to the secret's power; in the same order.

    Raises:
        ContractError: they are no points.
    """
    if points.dtype != torch.uint8 or points.dim() != 2 or points.shape[1] != BYTES:
        raise ContractError(
            f"Points of {points.dtype} {tuple(points.shape)} came. Expected uint8 (n, {BYTES}). Start the alignment again."
        )
    key = X25519PrivateKey.from_private_bytes(secret)
    try:
        return _tensor([key.exchange(X25519PublicKey.from_public_bytes(p.numpy().tobytes())) for p in points])
    except ValueError as e:  # one of small order, whose powers are all the same
        raise ContractError(
            f"One of {len(points)} points cannot be blinded ({e}). Expected hashed names only. Start the alignment again."
        ) from e


def found_of(
    cases: Mapping[str, Tensor],
    geometry: Mapping[str, Tensor],
    unusable: Mapping[str, Collection[int]],
    enough: Callable[[Collection[str]], bool],
) -> dict[str, Found]:
    """What parties have in common, from the points of each that all have blinded, in the order in which it showed them.

    Args:
        cases: party -> points of its cases' names.
        geometry: party -> points of the same cases' names together with where they lie in space, in one way of rounding, and
            then in each other one: cases lie alike that do in any.
        unusable: party -> its rows that it cannot use.
        enough: whether a case is found that these parties have.
    """
    who: dict[bytes, dict[str, int]] = {}
    lying: dict[str, dict[int, set[bytes]]] = {}
    for party, points in cases.items():
        for point, row in _rows(points).items():
            who.setdefault(point, {})[party] = row
        lying[party] = {row: set() for row in range(len(points))}
        for point, i in _rows(geometry[party]).items():
            lying[party][i % len(points)].add(point)
    found: list[Mapping[str, int]] = []
    apart: list[Mapping[str, int]] = []
    lost: list[Mapping[str, int]] = []
    for _, there in sorted(who.items()):  # an order that all parties share, and that tells nothing
        if enough(there):
            broken = any(row in unusable.get(party, ()) for party, row in there.items())
            alike = set.intersection(*(lying[party][row] for party, row in there.items()))
            (lost if broken else found if alike else apart).append(there)
    return {
        party: Found(_of(party, found), _of(party, apart), _of(party, lost), _numbers(party, found)) for party in cases
    }


def _of(party: str, some: Sequence[Mapping[str, int]]) -> tuple[int, ...]:
    return tuple(rows[party] for rows in some if party in rows)


def _numbers(party: str, some: Sequence[Mapping[str, int]]) -> tuple[int, ...]:
    return tuple(i for i, rows in enumerate(some) if party in rows)


def intersect(
    offered: Mapping[str, tuple[Tensor, Tensor]],
    blind: Callable[[str, tuple[Tensor, ...]], tuple[Tensor, ...]],
    unusable: Mapping[str, Collection[int]] = MappingProxyType({}),
    enough: Callable[[Collection[str]], bool] | None = None,
) -> dict[str, Found]:
    """Have each party's points blinded by every other, one after the other, and see what all have.

    Args:
        offered: party -> its points, of names and of names with geometry, blinded by itself.
        blind: asks a party to blind points.
        unusable: party -> its rows that it cannot use.
        enough: whether a case is found that these parties have; omitted: all must.

    Raises:
        ContractError: a party changes how many points there are, or shows one twice.
    """
    done: dict[str, tuple[Tensor, ...]] = {}
    for owner, points in offered.items():
        for other in offered:
            if other != owner:
                before = [len(p) for p in points]
                points = blind(other, points)  # type: ignore[assignment]
                if [len(p) for p in points] != before:
                    raise ContractError(
                        f"{other} was sent {before} points and gave back {[len(p) for p in points]}. Expected as many. Start "
                        "the alignment again."
                    )
        done[owner] = points
    cases, geometry = ({owner: points[i] for owner, points in done.items()} for i in (0, 1))
    return found_of(cases, geometry, unusable, enough or (lambda parties: len(parties) == len(offered)))


def _rows(points: Tensor) -> dict[bytes, int]:
    found = {p.numpy().tobytes(): i for i, p in enumerate(points)}
    if len(found) < len(points):
        raise ContractError(
            f"{len(points)} cases were shown, {len(found)} of them different. Each case has one name. Start the alignment again."
        )
    return found


def _hashed(text: str) -> bytes:
    """A point on the curve that depends on every letter; not on its twist, which would tell a bit of it."""
    attempt, u = 0, 0
    while u < 2 or pow((u * u * u + _A * u * u + u) % _P, (_P - 1) // 2, _P) != 1:  # not on the curve: every second is
        u = int.from_bytes(sha256(f"concilium case {attempt} {text}".encode()).digest(), "little") % _P
        attempt += 1
    return u.to_bytes(BYTES, "little")


def _tensor(points: Sequence[bytes]) -> Tensor:
    if not points:
        return torch.empty(0, BYTES, dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(points)), dtype=torch.uint8).reshape(-1, BYTES)
