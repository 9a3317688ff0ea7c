"""Masks that cancel in a sum: what sites and the server both compute in a round of masked updates.

Bonawitz et al. 2017 (doi:10.1145/3133956.3133982, figure 4): a site adds to its update a mask for every other site, which
that one takes away, and a mask of its own. The key of the first kind, and the seed of the second, are divided among the sites
(Shamir 1979, doi:10.1145/359168.359176). Where a site is lost, the others give their shares of its key; of one that is not, those
of its own mask. So the masks of the sum can be taken away, and those of no single update.

A change of weights is said in whole numbers, and adding them wraps round: only so does a mask hide what it is added to. Values
are relative to the range: a number from -1 to 1 is told in steps of 2 ** (2 - bits), after it was multiplied by the site's share
of what all count. So the sum over all sites is from -1 to 1 too, and a quarter of all numbers is enough for it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from torch import Tensor

from concilium.errors import ContractError
from concilium.messages import Keys, Masking, Tensors
from concilium.sealing import KEY_BYTES, as_bytes

VERSION = "concilium masked 1"
FIELD = 2**256 + 297
"""A prime: secrets of 32 bytes are numbers below it."""
SHARE_BYTES = 33
UNSIGNED: Mapping[int, np.dtype[np.unsignedinteger]] = {
    16: np.dtype(np.uint16),
    32: np.dtype(np.uint32),
    64: np.dtype(np.uint64),
}
"""Bits -> what is added, modulo 2 ** bits."""
TRAVELS = {16: torch.int16, 32: torch.int32, 64: torch.int64}
"""The same as it travels: the same bits, since torch does not know them all without a sign."""
STEPS_OF_ONE = {16: 2**2, 32: 2**10, 64: 2**26}
"""Bits -> into how many steps one is divided where values are whole numbers (counters), whatever the range."""

COUNTS = {"cases": "mean", "equal": "unweighted"}
"""What updates may count (`Masking.counts`) -> a rule in whose sums they count so."""

Numbers = NDArray[np.unsignedinteger]
Values = NDArray[np.float64]

# --------------------------------------------------------------------------------------------------- updates as numbers


def step_of(masking: Masking, *, whole: bool = False) -> float:
    """What the whole numbers of a masked update are multiples of; `whole`: in tensors of whole numbers."""
    return 1 / STEPS_OF_ONE[masking.bits] if whole else masking.range / 2.0 ** (masking.bits - 2)


def largest(masking: Masking, *, whole: bool = False) -> float:
    """The largest change that can be said."""
    return 2.0 ** (masking.bits - 2) * step_of(masking, whole=whole)


def bound(masking: Masking, n_sites: int, *, answered: float = 1.0, whole: bool = False) -> float:
    """How far the mean of masked updates is from the mean of these updates, at most, but for float64's own rounding.

    Each of `n_sites` in the sum is rounded by half a step. `answered` is what they count, as a share of what all count that
    dealt: where sites were lost since, the sum is divided by it.
    """
    return n_sites * step_of(masking, whole=whole) / 2 / answered


def flat(after: Tensors, before: Tensors | None, masking: Masking) -> Values:
    """By how much tensors have changed, one after the other in the order of their names, each value relative to what can be said.

    Raises:
        ContractError: a tensor was not there before.
        FloatingPointError: a value is not finite.
        OverflowError: a value has changed by more than can be said.
    """
    parts = [np.empty(0)]
    for name in sorted(after):
        new = after[name].detach().cpu().double().reshape(-1).numpy()
        if before is not None:
            if name not in before or before[name].shape != after[name].shape:
                raise ContractError(
                    f"{name} was to be sent as a change, and is not among the {len(before)} tensors of this round's start. "
                    "Expected all that are shared. Report this."
                )
            new = new - before[name].detach().cpu().double().reshape(-1).numpy()
        if not np.isfinite(new).all():
            raise FloatingPointError(f"{name} is not finite after this round.")
        limit = largest(masking, whole=not after[name].dtype.is_floating_point)
        most = float(np.abs(new).max(initial=0.0))
        if most > limit:
            raise OverflowError(
                f"{name} changed by {most:.6g} in this round. Masked updates can say {limit:.6g} at most ([collect] range = "
                f"{masking.range:.6g}, bits = {masking.bits}). Raise the range, and with it the bits; nothing is clipped."
            )
        parts.append(new / limit)
    return np.concatenate(parts)


def unflat(values: Values, like: Tensors, masking: Masking) -> dict[str, Tensor]:
    """What `flat` was given, by how these tensors are called and shaped: float64."""
    made: dict[str, Tensor] = {}
    start = 0
    for name in sorted(like):
        size = like[name].numel()
        limit = largest(masking, whole=not like[name].dtype.is_floating_point)
        part = torch.from_numpy(values[start : start + size] * limit)
        made[name] = part.reshape(like[name].shape)
        start += size
    return made


def encode(values: Values, share: float, bits: int) -> Numbers:
    """Values from -1 to 1, times the site's share of what all count (0 to 1), as whole numbers modulo 2 ** bits."""
    return np.rint(values * (share * 2.0 ** (bits - 2))).astype(np.int64).astype(UNSIGNED[bits])


def decode(total: Numbers, bits: int) -> Values:
    """What a sum of such numbers says."""
    signed = total.view(np.dtype(f"i{bits // 8}"))
    return signed.astype(np.float64) / 2.0 ** (bits - 2)


def to_tensor(numbers: Numbers, bits: int) -> Tensor:
    """The numbers as they travel."""
    return torch.from_numpy(numbers.view(np.dtype(f"i{bits // 8}")))


def to_numbers(tensor: Tensor, bits: int) -> Numbers:
    """The numbers that travelled."""
    return np.ascontiguousarray(tensor.numpy()).view(UNSIGNED[bits])


# ---------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Terms:
    """What all sites of a round must have been told alike; otherwise what they do does not fit together."""

    model: str
    round: int
    masking: Masking
    keys: tuple[Keys, ...]
    weight: int
    cases: int

    @property
    def sites(self) -> tuple[str, ...]:
        """Whose updates can be in the sum."""
        return tuple(k.share.site for k in self.keys)

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        keys = [(k.share.site, k.mask.site, as_bytes(k.share.key).hex(), as_bytes(k.mask.key).hex()) for k in self.keys]
        told = [VERSION, self.model, self.round, astuple(self.masking), self.weight, self.cases, keys]
        return hashlib.sha256(json.dumps(told).encode()).digest()

    def mask_key(self, site: str) -> X25519PublicKey:
        """The public key that a site's masks are made of."""
        return X25519PublicKey.from_public_bytes(as_bytes(self.keys[self.sites.index(site)].mask.key))

    def agreement(self, dealers: Iterable[str], survivors: Iterable[str]) -> str:
        """What a site signs: who dealt, and whose updates are in the sum."""
        return json.dumps([VERSION, "in the sum", self.digest.hex(), sorted(dealers), sorted(survivors)])


def mask(key: bytes, size: int, bits: int) -> Numbers:
    """Numbers that cannot be told from chance without the key (32 bytes), which makes one mask only: AES-256 in counter mode."""
    dtype = UNSIGNED[bits]
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    n = size * dtype.itemsize
    made = bytearray(n + 15)  # as much as it may ask for
    stream.update_into(bytes(n), made)
    return np.frombuffer(made, dtype, size)


def own_key_of(seed: bytes, terms: Terms, site: str) -> bytes:
    """The key of a site's own mask, from its secret seed."""
    return _derive(seed, [VERSION, "own", terms.digest.hex(), site])


def pair_key(own: X25519PrivateKey, site: str, other: str, terms: Terms) -> bytes:
    """The key of the mask that two sites share, from the one's secret key and the other's public one.

    Raises:
        ContractError: the other's is no usable key.
    """
    try:
        secret = own.exchange(terms.mask_key(other))
    except ValueError as e:  # one of the few keys whose secret is no secret
        raise ContractError(
            f"The mask key of {other} is unusable ({e}). Expected one made by X25519. Report this."
        ) from e
    return _derive(secret, [VERSION, "pair", terms.digest.hex(), *sorted((site, other))])


def pair_mask(own: X25519PrivateKey, site: str, other: str, terms: Terms, size: int) -> Numbers:
    """What `site` adds on behalf of `other`; that one adds the same with the other sign."""
    bits = terms.masking.bits
    made = mask(pair_key(own, site, other, terms), size, bits)
    return made if site < other else np.negative(made, out=made)


def commitment(seed: bytes, terms: Terms, site: str) -> bytes:
    """By which a seed put together from shares is known to be that of the site."""
    return hashlib.sha256(_derive(seed, [VERSION, "commitment", terms.digest.hex(), site])).digest()


def _derive(secret: bytes, about: Sequence[str]) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, None, json.dumps(about).encode()).derive(secret)


# ------------------------------------------------------------------------------------------------------- divided secrets


def divide(secret: bytes, holders: Sequence[str], threshold: int) -> dict[str, bytes]:
    """Shares of 32 secret bytes, of which `threshold` give them back and fewer tell nothing."""
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(FIELD) for _ in range(threshold - 1))]
    return {site: _at(coefficients, place_of(site, holders)).to_bytes(SHARE_BYTES) for site in holders}


def place_of(site: str, holders: Sequence[str]) -> int:
    """Where a holder's share lies on the polynomial: never at 0, where the secret is."""
    return sorted(holders).index(site) + 1


def _at(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for c in reversed(coefficients):
        value = (value * x + c) % FIELD
    return value


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from shares by their places: the polynomial's value at 0.

    Raises:
        ContractError: they are not shares of one secret of 32 bytes.
    """
    secret = 0
    for x, raw in shares.items():
        factor = int.from_bytes(raw)
        for other in shares:
            if other != x:
                factor = factor * other * pow(other - x, -1, FIELD) % FIELD
        secret += factor
    secret %= FIELD
    if secret >= 2**256:
        raise ContractError(
            f"{len(shares)} shares do not make a secret. Expected shares of one secret, as many as its threshold. Report this."
        )
    return secret.to_bytes(KEY_BYTES)
