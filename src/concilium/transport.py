"""How maps and gradients of split training travel: as they were computed, as shorter floats, or as whole numbers with a scale.

Only tensors travel, with nothing beside them. Of each map with channels (B, C, *spatial) goes

    float32    the map itself, whatever float it was computed in, to the bit
    float16    the map times a power of two, and that exponent: int16 (1,)
    bfloat16   the map, rounded
    int8       round(map / scale), -127 to 127, half to even, and the scale of each channel: float32 (C,)

float16 has 11 bits and few exponents, so gradients (1e-8 is nothing unusual) would be lost and a large map overflow. The power
of two puts the largest value of each map between 2**14 and 2**15: nothing overflows, no bit is lost to the scale, and what lies
within 2**28 of the largest value keeps 11 bits. This is the loss scaling of Micikevicius et al. 2018 (arXiv:1710.03740), for each
map by itself, so that no factor has to be found and the optimisers see unscaled gradients. bfloat16 has the exponents of float32
and needs none. int8 is symmetric with a scale per channel, as weights have in Jacob et al. 2018 (arXiv:1712.05877): scale =
largest value / 127.

Gradients are straight-through: whoever receives a map computes with what arrived, and sends back the gradient with respect to
that, in the same kind; its receiver takes it as the gradient of the map before it was rounded. Whole numbers (places of maxima)
and maps without channels (B, 0, *spatial) travel as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NoReturn, TypeAlias, get_args

import torch
from torch import Tensor

from concilium.errors import ContractError

Transport: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]
KINDS: tuple[str, ...] = get_args(Transport)

TOP = 15
"""In float16 the largest value of a map lies below 2**15, which leaves a bit for rounding."""
FURTHEST = 126
"""Largest exponent by which a map is scaled: a power of two that float32 has."""
STEPS = 127
"""Whole numbers on each side of 0 in int8; -128 is none of them, so that the scale is the same on both sides."""


def encode(maps: Iterable[Tensor], kind: str) -> tuple[Tensor, ...]:
    """What travels for these maps (B, C, *spatial), or for their gradients.

    Raises:
        ContractError: there is no such kind.
        FloatingPointError: a map is not finite, or too large; in float32 it travels all the same.
    """
    _check_kind(kind)
    return tuple(t for m in maps for t in (_encoded(m, kind) if _is_shortened(m, kind) else (m.detach(),)))


def decode(tensors: Sequence[Tensor], kind: str, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The maps that `encode` was given, as far as they arrived, in `dtype`; in float32 to the bit, and in their own.

    Raises:
        ContractError: the tensors are not what this kind sends.
    """
    _check_kind(kind)
    if kind == "float32":
        return tuple(tensors)
    return tuple(_decoded(iter(tensors), kind, dtype))


def decode_like(tensors: Sequence[Tensor], kind: str, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of these maps, each in its map's type; in float32 as they came. Number and shapes are not checked.

    Raises:
        ContractError: the tensors are not what this kind sends.
    """
    came = decode(tensors, kind, dtype=torch.float32)
    if kind == "float32" or len(came) != len(maps):
        return came
    return tuple(g.to(m.dtype) for g, m in zip(came, maps, strict=True))


def size_of(m: Tensor, kind: str, *, gradient: bool = False) -> int:
    """Bytes that travel for this map, or for its gradient, without headers. Shape and type are enough: the map may be fake."""
    if gradient and not m.is_floating_point():
        return 0
    if not _is_shortened(m, kind):
        return m.numel() * m.element_size()
    of_each = {"float16": 2, "bfloat16": 2, "int8": 1}[kind]
    beside = {"float16": 2, "bfloat16": 0, "int8": 4 * m.shape[1]}[kind]
    return m.numel() * of_each + beside


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ContractError(
            f"Maps were to travel as {kind!r}. Known: {', '.join(KINDS)}. Use one version of Concilium everywhere."
        )


def _is_shortened(m: Tensor, kind: str) -> bool:
    """Whether the map has float values, and these do not travel as they are."""
    return kind != "float32" and m.is_floating_point() and m.numel() > 0


def _encoded(m: Tensor, kind: str) -> tuple[Tensor, ...]:
    with torch.no_grad():
        m = m.detach()
        if m.dtype in (torch.float16, torch.bfloat16):
            m = m.float()
        largest = m.abs().amax(dim=(0, *range(2, m.ndim))) if kind == "int8" else m.abs().max()
        if not bool(torch.isfinite(largest).all()) or float(largest.max()) > torch.finfo(torch.float32).max:
            raise FloatingPointError(
                f"A map has a value of {float(largest.abs().max())}. Expected finite values that float32 has: others cannot "
                f"travel as {kind}. Lower the learning rate, or go on from the round before."
            )
        if kind == "bfloat16":
            return (_finite(m.to(torch.bfloat16), kind),)
        if kind == "float16":
            up = _exponent(float(largest))
            return (m.mul(2.0**up).to(torch.float16), torch.tensor([up], dtype=torch.int16))
        scale = (largest / STEPS).float()
        scale = scale.where(scale >= torch.finfo(torch.float32).tiny, 0)
        whole = (m / _along_channels(scale.where(scale > 0, torch.inf), m)).round().clamp(-STEPS, STEPS)
        return (whole.to(torch.int8), scale)


def _exponent(largest: float) -> int:
    """The exponent by which a map is scaled whose largest value is this."""
    _, exponent = math.frexp(largest)
    return max(-FURTHEST, min(FURTHEST, TOP - exponent)) if largest else 0


def _finite(m: Tensor, kind: str) -> Tensor:
    if not bool(torch.isfinite(m).all()):
        raise FloatingPointError(
            f"A value of a map is too large to travel as {kind}. Expected values that {kind} has. Lower the learning rate, or "
            "let maps travel as float16, each with a scale of its own."
        )
    return m


def _along_channels(scale: Tensor, m: Tensor) -> Tensor:
    """The scale (C,) in a shape that goes with a map (B, C, *spatial)."""
    return scale.view(-1, *[1] * (m.ndim - 2)).to(m.device)


def _decoded(tensors: Iterator[Tensor], kind: str, dtype: torch.dtype) -> Iterator[Tensor]:
    for t in tensors:
        if not t.is_floating_point() and t.dtype != torch.int8:
            yield t
        elif t.is_floating_point() and t.numel() == 0:
            yield t.to(dtype)
        elif t.dtype != getattr(torch, kind):
            _refuse(f"A map of type {t.dtype}", kind)
        elif kind == "bfloat16":
            yield t.to(dtype)
        elif kind == "float16":
            yield t.to(dtype).mul(2.0 ** -_exponent_of(next(tensors, None)))
        else:
            yield t.to(dtype).mul(_along_channels(_scale_of(next(tensors, None), t), t).to(dtype))


def _exponent_of(t: Tensor | None) -> int:
    if t is None or t.dtype != torch.int16 or t.shape != (1,) or abs(int(t)) > FURTHEST:
        _refuse("A map without its exponent", "float16")
    return int(t)


def _scale_of(t: Tensor | None, m: Tensor) -> Tensor:
    if (
        t is None
        or t.dtype != torch.float32
        or m.ndim < 2
        or t.shape != m.shape[1:2]
        or not bool((torch.isfinite(t) & (t >= 0)).all())
    ):
        _refuse("A map without the scale of each channel", "int8")
    return t


def _refuse(what: str, kind: str) -> NoReturn:
    expected = {
        "float16": "torch.float16 and the exponent, torch.int16 (1,), -126 to 126",
        "bfloat16": "torch.bfloat16",
        "int8": "torch.int8 and the scale of each channel, torch.float32 (C,), 0 or more",
    }
    raise ContractError(
        f"{what} came. Expected {expected[kind]}, as [protocol] transport = {kind!r} says. Start the round again."
    )
