"""Maps and gradients as they travel: what is lost, what is not, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from concilium import wire
from concilium.errors import ContractError
from concilium.messages import Maps
from concilium.transport import KINDS, decode, decode_like, encode, size_of

LOSSY = tuple(kind for kind in KINDS if kind != "float32")
BOUND = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 0.5 / 127 * (1 + 1e-5)}
"""Largest error of a value over the largest value of its channel."""
each_kind = pytest.mark.parametrize("kind", KINDS)
each_lossy = pytest.mark.parametrize("kind", LOSSY)


def drawn(seed: int = 0, *, spread: float = 6.0, shape: Sequence[int] = (2, 5, 8, 9)) -> Tensor:
    """A map whose channels differ by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-spread, spread / 3, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return torch.randn(*shape, generator=generator) * size


def there_and_back(m: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Through a packed message, as between site and server."""
    (came,) = decode(wire.unpack(wire.pack(Maps(encode([m], kind)))).maps, kind, dtype=dtype)
    return came


def by_channel(m: Tensor) -> Tensor:
    return m.transpose(0, 1).flatten(1)


def error(m: Tensor, came: Tensor) -> Tensor:
    """Largest error of each channel over its largest value."""
    return by_channel(m - came).abs().amax(1) / by_channel(m).abs().amax(1)


# ------------------------------------------------------------------------------------------------------ there and back


@each_kind
@pytest.mark.parametrize("shape", [(2, 5, 8, 9), (1, 3, 4, 5, 6), (2, 1, 3)], ids=str)
def test_the_error_of_a_channel_is_bounded(kind: str, shape: tuple[int, ...]) -> None:
    m = drawn(spread=1.0, shape=shape)
    came = there_and_back(m, kind)
    assert (came.shape, came.dtype) == (m.shape, m.dtype)
    assert float(error(m, came).max()) <= BOUND[kind]


@each_kind
def test_channels_that_differ_much_are_each_as_exact(kind: str) -> None:
    """Over 8 powers of ten (2**27), which float16 has by its scale, and int8 by one for each channel."""
    m = drawn()
    assert float(error(m, there_and_back(m, kind)).max()) <= BOUND[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_float32_sends_what_was_computed_to_the_bit(dtype: torch.dtype) -> None:
    m = drawn().to(dtype)
    m[0, 0, 0, 0], m[0, 0, 0, 1] = -0.0, math.inf
    sent = encode([m], "float32")
    assert len(sent) == 1
    assert sent[0].data_ptr() == m.data_ptr(), "not even copied"
    assert decode(sent, "float32", dtype=torch.float32)[0] is sent[0]
    assert decode_like(sent, "float32", [m])[0] is sent[0]


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8, 1.0, 1e5, 1e30])
def test_in_float16_neither_small_gradients_are_lost_nor_large_maps_too_large(size: float) -> None:
    """Plain float16 has nothing below 6e-8 and nothing above 65504."""
    m = drawn(spread=1.0) * size
    assert float(error(m, there_and_back(m, "float16")).max()) <= BOUND["float16"]
    (scaled, exponent) = encode([m], "float16")
    assert 2**14 <= float(scaled.abs().max()) <= 2**15
    assert (exponent.dtype, tuple(exponent.shape)) == (torch.int16, (1,))


def test_the_scale_of_float16_loses_no_bit() -> None:
    m = drawn(spread=1.0).half().float()
    assert torch.equal(there_and_back(m, "float16"), m)


def test_bfloat16_sends_what_was_computed_in_bfloat16_to_the_bit() -> None:
    m = drawn().bfloat16()
    assert torch.equal(there_and_back(m, "bfloat16"), m.float())


def test_int8_by_hand() -> None:
    """Two channels of one batch; the scale of the second is 2, and halves go to the even neighbour."""
    m = torch.tensor([[[127.0, -127.0, 0.4], [254.0, 1.0, 3.0]]])
    whole, scale = encode([m], "int8")
    assert whole.tolist() == [[[127, -127, 0], [127, 0, 2]]]
    assert scale.tolist() == [1.0, 2.0]
    assert there_and_back(m, "int8").tolist() == [[[127.0, -127.0, 0.0], [254.0, 0.0, 4.0]]]


@each_lossy
def test_a_map_or_a_channel_of_zeros_comes_back(kind: str) -> None:
    m = drawn(spread=1.0)
    m[:, 2] = 0
    came = there_and_back(m, kind)
    assert not came[:, 2].any()
    assert torch.isfinite(came).all()
    assert not there_and_back(torch.zeros(1, 2, 4, 4), kind).any()
    tiny = there_and_back(torch.full((1, 2, 4, 4), 1e-44), kind)  # no longer normal in float32
    assert torch.isfinite(tiny).all()
    assert float(tiny.abs().max()) <= 2e-44


@each_kind
def test_places_and_maps_without_channels_travel_as_they_are(kind: str) -> None:
    places, frame = torch.arange(24, dtype=torch.uint8).view(1, 2, 3, 4), torch.empty(2, 0, 7, 9)
    m = drawn(spread=1.0)
    sent = encode([frame, places, m, places.clone()], kind)
    came = decode(wire.unpack(wire.pack(Maps(sent))).maps, kind, dtype=torch.float32)
    assert [c.shape for c in came] == [frame.shape, places.shape, m.shape, places.shape]
    assert torch.equal(came[1], places)
    assert torch.equal(came[3], places)
    assert came[1].dtype == torch.uint8
    assert came[0].dtype == torch.float32


@each_kind
def test_nothing_travels_as_nothing(kind: str) -> None:
    assert encode([], kind) == ()
    assert decode((), kind, dtype=torch.float32) == ()


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_come_back_in_the_type_of_their_map(kind: str, dtype: torch.dtype) -> None:
    m = drawn(spread=1.0).to(dtype)
    came = decode_like(encode([drawn(1).to(dtype)], kind), kind, [m])
    assert [c.dtype for c in came] == [dtype]
    doubled = decode(encode([m], kind), kind, dtype=torch.float64)
    assert doubled[0].dtype == (m.dtype if kind == "float32" else torch.float64)


@each_kind
def test_the_bytes_are_those_told(kind: str) -> None:
    places, frame = torch.zeros(1, 2, 3, 4, dtype=torch.uint8), torch.empty(2, 0, 7, 9)
    for m in (places, frame, drawn(), drawn().bfloat16(), drawn().double()):
        sent = sum(t.numel() * t.element_size() for t in encode([m], kind))
        assert sent == size_of(m, kind)
        assert size_of(m, kind, gradient=True) == (sent if m.is_floating_point() else 0)
    usual = torch.empty(2, 32, 128, 128, device="meta")
    share = {"float32": 1, "float16": 1 / 2, "bfloat16": 1 / 2, "int8": 1 / 4}[kind]
    assert size_of(usual, kind) / size_of(usual, "float32") == pytest.approx(share, rel=0.001)
    small = torch.empty(2, 32, 8, 8, device="meta")
    assert size_of(small, kind) / size_of(small, "float32") == pytest.approx(share, rel=0.0321)


# -------------------------------------------------------------------------------------------------------- what is refused


@each_lossy
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(kind: str, value: float) -> None:
    m = drawn()
    m[1, 3, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"Expected finite values .* Lower the learning rate"):
        encode([m], kind)


@pytest.mark.parametrize(
    ("kind", "value", "dtype"),
    [("bfloat16", 3.4e38, torch.float32), ("int8", 1e39, torch.float64), ("float16", 1e300, torch.float64)],
)
def test_what_is_too_large_is_refused(kind: str, value: float, dtype: torch.dtype) -> None:
    with pytest.raises(FloatingPointError, match="Expected"):
        encode([torch.full((1, 1, 2, 2), value, dtype=dtype)], kind)


def test_a_kind_that_is_not_known_is_refused_at_both_ends() -> None:
    with pytest.raises(ContractError, match=r"Maps were to travel as 'int4'\. Known: float32, float16, bfloat16, int8"):
        encode([drawn()], "int4")
    with pytest.raises(ContractError, match="Known: float32"):
        decode([drawn()], "int4", dtype=torch.float32)


@pytest.mark.parametrize("sent", KINDS)
@each_lossy
def test_what_was_sent_as_another_kind_is_refused(kind: str, sent: str) -> None:
    if sent != kind:
        with pytest.raises(
            ContractError, match=rf"came\. Expected .* transport = '{kind}' says\. Start the round again"
        ):
            decode(encode([drawn()], sent), kind, dtype=torch.float32)


M8, M16 = torch.zeros(1, 3, 4, dtype=torch.int8), torch.zeros(1, 3, 4, dtype=torch.float16)


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("int8", [M8]),
        ("int8", [M8, torch.ones(2)]),
        ("int8", [M8, torch.ones(3, 1)]),
        ("int8", [M8, torch.ones(3, dtype=torch.float64)]),
        ("int8", [M8, torch.tensor([1.0, -1.0, 1.0])]),
        ("int8", [M8, torch.tensor([1.0, math.nan, 1.0])]),
        ("int8", [M8, torch.tensor([1.0, math.inf, 1.0])]),
        ("int8", [M8, M8]),
        ("int8", [M8[0, 0], torch.ones(3)]),
        ("int8", [torch.ones(3)]),
        ("float16", [M16]),
        ("float16", [M16, M16]),
        ("float16", [M16, torch.tensor(3, dtype=torch.int16)]),
        ("float16", [M16, torch.tensor([3, 3], dtype=torch.int16)]),
        ("float16", [M16, torch.tensor([3])]),
        ("float16", [M16, torch.tensor([127], dtype=torch.int16)]),
        ("float16", [M16, torch.tensor([-(2**15)], dtype=torch.int16)]),
    ],
)
def test_a_map_without_its_scale_is_refused(kind: str, tensors: list[Tensor]) -> None:
    with pytest.raises(ContractError, match=r"came\. Expected"):
        decode(tensors, kind, dtype=torch.float32)


def test_whole_numbers_that_quantised_maps_would_be_taken_for_are_refused_later() -> None:
    """Of other types than uint8: `networks.are_of_kinds` refuses those, whatever they were sent as."""
    (came,) = decode([torch.zeros(1, 2, 3, dtype=torch.int64)], "int8", dtype=torch.float32)
    assert came.dtype == torch.int64
