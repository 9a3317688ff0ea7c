"""Messages there and back, and what a stranger's bytes may do: nothing but raise ContractError."""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import math
import pickle
import random
import struct
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from concilium import messages, wire
from concilium.errors import ContractError
from concilium.messages import (
    FAILURES,
    REPLIES,
    REQUESTS,
    Blinded,
    ChannelStatistics,
    Done,
    Evaluate,
    Excluded,
    Front,
    Gradients,
    Judge,
    Judged,
    Keep,
    Looked,
    Maps,
    Placed,
    PlugIn,
    Score,
    SiteError,
    SiteTimeout,
    Train,
    Trained,
)

TYPES = [t for t in vars(messages).values() if isinstance(t, type) and dataclasses.is_dataclass(t)]
TENSORS = (
    torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    torch.empty(0),
    torch.empty(4, 0, 2),
    torch.tensor(3.5),
    torch.tensor([-(2**63), 2**63 - 1]),
    torch.tensor([True, False]),
    torch.tensor([1.5, -math.inf, math.nan], dtype=torch.bfloat16),
    torch.tensor([1.0, -0.0], dtype=torch.float64),
    torch.tensor([1, 2], dtype=torch.int32),
    torch.arange(6, dtype=torch.float16).view(2, 3).T,  # not contiguous
)
NUMBERS = (0, 1, -1, 2**31, 2**63, -(2**64) - 1, 2**2148)
FLOATS = (0.0, -0.0, 1 / 3, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan)
TEXTS = ("", "a", "Größe [mm]", 'quote " and \\ and \n', "\x00", "𝄞", "#", "@")
JSON = (None, True, 3, 2**80, -0.5, "text", (), (1, (2, ("three", None)), {}), {"a": {"b": ({"c": 1.5},)}, "@": 1})

each_type = pytest.mark.parametrize("cls", TYPES, ids=lambda t: t.__name__)


def example(hint: Any, rng: random.Random) -> Any:
    """A value of a type that `messages.py` may name."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        is_json = any(
            isinstance(a, typing.ForwardRef)
            or (typing.get_origin(a) is tuple and a not in (tuple[int, ...], tuple[str, ...]))
            for a in arguments
        )
        return rng.choice(JSON) if is_json else example(rng.choice(arguments), rng)
    if origin is tuple:
        return tuple(example(arguments[0], rng) for _ in range(rng.choice((0, 1, 3))))
    if origin is collections.abc.Mapping:
        return {key: example(arguments[1], rng) for key in rng.sample(TEXTS, rng.choice((0, 1, 4)))}
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return typing.cast(Any, hint)(**{name: example(h, rng) for name, h in hints.items()})
    leaves = {int: NUMBERS, float: FLOATS, str: TEXTS, bool: (True, False), Tensor: TENSORS, types.NoneType: (None,)}
    value = rng.choice(leaves[hint])
    return value.clone() if isinstance(value, Tensor) else value  # in no message does one tensor occur twice


def same(a: Any, b: Any) -> bool:
    """Equal to the bit and of the same type; NaN equals NaN, and -0.0 is not 0.0."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def raw(header: Any, tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """A message written by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return wire.MAGIC + struct.pack("<I", len(text)) + text + save(dict(tensors or {}))


def refused(packed: bytes, match: str | None = None) -> None:
    with pytest.raises(ContractError, match=match):
        wire.unpack(packed)


# ------------------------------------------------------------------------------------------------------ there and back


def test_the_types_are_found() -> None:
    assert set(REQUESTS + REPLIES + FAILURES) < set(TYPES)


@each_type
def test_every_type_comes_back_as_it_was(cls: type) -> None:
    rng = random.Random(cls.__name__)
    for _ in range(40):
        message = example(cls, rng)
        assert same(wire.unpack(wire.pack(message)), message)


@pytest.mark.parametrize(
    "value", [None, True, 1.5, "1", [True], ["1"], [[1]], [1, None], [1.0], {"%": []}, {"%": [["a", 1]]}, {"~": "nan"}]
)
def test_labels_are_ids_or_lists_of_them(value: Any) -> None:
    def told(labels: Any) -> bytes:
        tensors: list[Tensor] = []
        header = wire._encode(dataclasses.replace(example(messages.Examined, random.Random(1)), labels={}), tensors)
        header["labels"] = {"%": [["a", labels]]}
        return raw(header, {str(i): t for i, t in enumerate(tensors)})

    assert wire.unpack(told([1, 2])).labels == {"a": (1, 2)}
    assert wire.unpack(told(3)).labels == {"a": 3}
    refused(told(value), "labels")


@pytest.mark.parametrize("number", NUMBERS)
def test_whole_numbers_have_any_size(number: int) -> None:
    sums = ChannelStatistics(number, -number, 0.0, 1.0, torch.empty(0), torch.empty(0))
    back = wire.unpack(wire.pack(sums))
    assert (back.mean_sum, back.square_sum) == (number, -number)


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype} {tuple(t.shape)}")
def test_tensors_keep_type_shape_and_bits(tensor: Tensor) -> None:
    back = wire.unpack(wire.pack(Keep("m", {"x": tensor}))).weights["x"]
    assert same(back, tensor)
    assert not back.requires_grad


def test_what_comes_back_shares_no_memory() -> None:
    weights = {"x": torch.zeros(3, requires_grad=True)}
    back = wire.unpack(wire.pack(Keep("m", weights)))
    back.weights["x"].add_(1)
    assert weights["x"].sum() == 0


@pytest.mark.parametrize("value", [np.float64(0.1), np.float64("nan"), np.float64("-inf")])
def test_numpys_float_is_a_float(value: float) -> None:
    """It is one to Python, but its name is not one: a site's figures must arrive all the same."""
    back = wire.unpack(wire.pack(SiteTimeout(value))).seconds
    assert type(back) is float
    assert same(back, float(value))


def test_a_whole_number_will_do_for_a_float() -> None:
    assert wire.unpack(wire.pack(SiteTimeout(5))).seconds == 5


def test_the_same_message_gives_the_same_bytes() -> None:
    trained = Trained({"b": TENSORS[0], "a": TENSORS[4]}, 3, 4, 0.5, 1.0)
    assert wire.pack(trained) == wire.pack(wire.unpack(wire.pack(trained)))


def test_an_update_of_a_million_parameters_costs_hardly_more_than_its_numbers() -> None:
    sizes = [10_000] * 99 + [9_000, 1_000]
    weights = {f"decoder.stages.{i}.conv.weight": torch.randn(n) for i, n in enumerate(sizes)}
    packed = wire.pack(Trained(weights, 12, 50, 0.123, 4.5))
    assert sum(sizes) == 1_000_000
    assert 4_000_000 < len(packed) <= 1.01 * 4_000_000


# --------------------------------------------------------------------------------------------------- what is not packed


class Secret:
    """Looks like a message, and is none."""

    def __init__(self) -> None:
        self.path = "/data/patient"


@dataclasses.dataclass(frozen=True)
class Subclass(Done):
    """Not in messages.py either."""


SiteLost = dataclasses.make_dataclass("SiteLost", [])  # the name of one


@pytest.mark.parametrize(
    "message",
    [
        None, 5, "text", (), {}, [], set(), b"", object(), len, Path("/data"), TENSORS[0], np.zeros(2),
        Secret(), Secret, Done, Subclass(), SiteLost(), wire.Envelope("r", 0, 1),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_what_is_no_message_is_not_packed(message: object) -> None:
    with pytest.raises(ContractError, match=r"messages\.py"):
        wire.pack(message)


@pytest.mark.parametrize(
    "held",
    [
        Path("/data"), [1], {1, 2}, b"raw", object(), np.zeros(2), np.int64(3), np.bool_(True), 1j,
        TENSORS[0], Done(), (Done(),), ((TENSORS[0],),),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_a_message_holds_nothing_else(held: Any) -> None:
    deep = {"option": {"deep": (held,)}}
    for message in (SiteError("E", "c", held), PlugIn("p", {"option": held}), PlugIn("p", deep)):
        with pytest.raises(ContractError):
            wire.pack(message)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Excluded("r", typing.cast(Any, True)), id="bool for int"),
        pytest.param(Excluded("r", typing.cast(Any, 1.0)), id="float for int"),
        pytest.param(Excluded("r", 10**5000), id="more digits than Python writes"),
        pytest.param(Excluded(typing.cast(Any, None), 1), id="None for text"),
        pytest.param(SiteTimeout(typing.cast(Any, True)), id="bool for float"),
        pytest.param(SiteTimeout(10**400), id="no float is so large"),
        pytest.param(Evaluate("m", "test", typing.cast(Any, ("dice",))), id="text for a plug-in"),
        pytest.param(Keep("m", typing.cast(Any, {1: TENSORS[0]})), id="number for a key"),
        pytest.param(Keep("m", {"x": torch.eye(2).to_sparse()}), id="sparse tensor"),
        pytest.param(Keep("m", {"x": TENSORS[0], "y": TENSORS[0]}), id="one tensor twice"),
    ],
)
def test_fields_hold_what_they_are_declared_to(message: object) -> None:
    with pytest.raises(ContractError):
        wire.pack(message)


# -------------------------------------------------------------------------------------------------- what is not read


def test_unknown_types_are_refused_and_never_made() -> None:
    for name in (
        "Envelope",
        "Path",
        "Tensor",
        "os.system",
        "object",
        "type",
        "__class__",
        "",
        None,
        3,
        ["Done"],
        {"@": "Done"},
    ):
        refused(raw({"@": name}), match="Known are: PlugIn")
        refused(raw({"@": "Examined", "x": {"@": name}}))


def test_fields_must_be_those_of_the_type() -> None:
    refused(raw({"@": "Excluded", "reason": "r"}), match=r"\['reason'\]. Expected \['count', 'reason'\]")
    refused(raw({"@": "Excluded", "reason": "r", "count": 1, "path": "/data"}), match="path")
    refused(raw({"@": "Done", "__init__": 1}))
    refused(raw({"@": "Done", "__class__": "Secret"}))
    assert wire.unpack(raw({"@": "Excluded", "reason": "r", "count": 1})) == Excluded("r", 1)


@pytest.mark.parametrize(
    "value", [None, "1", 1.0, True, [], [1], {"%": []}, {"~": "nan"}, {"#": 0}, {"@": "Done"}], ids=json.dumps
)
def test_fields_must_be_of_their_type(value: Any) -> None:
    refused(raw({"@": "Excluded", "reason": "r", "count": value}, {"0": TENSORS[0]}), match="count holds")


@pytest.mark.parametrize("deep", [lambda t: t, lambda t: [t], lambda t: [[t]], lambda t: [{"%": [["a", [[t]]]]}]])
@pytest.mark.parametrize("hidden", [{"#": 0}, {"@": "Done"}], ids=["tensor", "message"])
def test_json_holds_neither_tensors_nor_messages(hidden: Any, deep: Any) -> None:
    """Refused at every depth: settings that a person wrote hold none."""
    header = {"@": "PlugIn", "name": "p", "options": {"%": [["x", deep(hidden)]]}}
    refused(raw(header, {"0": TENSORS[0]}), match="options holds")


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"\xff\xfe", b"null", b"5", b'"Done"', b"[]", b"{}", b'{"@": "Done"} x', b'{"@": "Done", "%": []}',
        b'{"#": 0}', b'{"#": 1}', b'{"#": Infinity}', b'{"#": "x"}', b'{"#": [1]}',
        b'{"~": "nan"}', b'{"~": "1"}', b'{"~": []}', b'{"@": "SiteTimeout", "seconds": {"~": "9"}}',
        b'{"%": 1}', b'{"%": [[1]]}', b'{"%": [["a", 1, 2]]}', b'{"%": "ab"}', b'{"%": [["a", 1]]}',
        b'{"@": "SiteTimeout", "seconds": 1' + b"0" * 400 + b"}",
        b'{"@": "SiteTimeout", "seconds": 1' + b"0" * 5000 + b"}",
    ],
)  # fmt: skip
def test_headers_that_are_none_are_refused(header: bytes) -> None:
    refused(raw(header, {"0": TENSORS[0]}))


@pytest.mark.parametrize("depth", [1_000, 5_000, 1_000_000])
@pytest.mark.parametrize(("before", "after"), [(b"[", b"]"), (b'{"%":[["a",', b"]]}")], ids=["tuples", "mappings"])
def test_deep_nesting_is_refused(before: bytes, after: bytes, depth: int) -> None:
    nested = before * depth + b"1" + after * depth
    refused(raw(nested))
    refused(raw(b'{"@":"PlugIn","name":"p","options":{"%":[["x",' + nested + b"]]}}"))
    refused(raw(before * depth))


def test_a_message_nested_beyond_reason_is_not_packed() -> None:
    nested: Any = 1
    for _ in range(5_000):
        nested = (nested,)
    with pytest.raises(ContractError):
        wire.pack(PlugIn("p", {"x": nested}))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("F32", [0, 2**62, 2**62], 0), ("F32", [2**63, 0], 0), ("F32", [2**64 - 1, 0], 0), ("F32", [-1], 0),
        ("F32", [1.5], 0), ("F32", [2**40], 4), ("F32", [2], 4), ("F32", None, 4),
        ("F4", [16], 8), ("XX", [1], 4), (None, [1], 4), ("PICKLE", [4], 4),
    ],
)  # fmt: skip
def test_damaged_tensors_are_refused(dtype: Any, shape: Any, size: int) -> None:
    about = json.dumps({"0": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    header = b'{"@":"Keep","model":"m","weights":{"%":[["x",{"#":0}]]}}'
    body = struct.pack("<Q", len(about)) + about + bytes(size)
    refused(wire.MAGIC + struct.pack("<I", len(header)) + header + body)


def test_one_tensor_does_not_stand_for_two() -> None:
    """Packing refuses it; and what shares memory is changed together."""
    refused(raw({"@": "Maps", "maps": [{"#": 0}, {"#": 0}]}, {"0": TENSORS[0]}))


def test_a_message_larger_than_the_limit_is_refused_before_it_is_read() -> None:
    packed = wire.pack(Keep("m", {"x": torch.zeros(1000)}))
    assert wire.unpack(packed, limit=len(packed)).model == "m"
    with pytest.raises(ContractError, match=f"{len(packed)} bytes arrived; at most {len(packed) - 1}"):
        wire.unpack(packed, limit=len(packed) - 1)
    with pytest.raises(ContractError, match="at most 3"):
        wire.unpack(b"garbage", limit=3)


def messages_to_damage() -> Iterator[bytes]:
    yield wire.pack(Trained({"a": TENSORS[0], "b": TENSORS[5]}, 3, 4, 0.5, 1.0))
    score = Score(1, 2, "liver", "ok", "mm", {"dice": 0.5, "hd95": None}, 1.5, math.inf, 2, 1, 0)
    yield wire.pack(messages.Evaluated((score, score), (Excluded("unreadable", 1),), 3.25))
    yield wire.pack(Train("m", 1, 0, 5, 10, {"a": TENSORS[0]}, True))
    yield wire.pack(Front("m", 1, ("down0", "up0"), False, 1, 5, 0, 10, {}, (TENSORS[6],)))
    yield wire.pack(Maps((TENSORS[0],)))
    yield wire.pack(Judge("m", 1, {"a": TENSORS[0]}, 8))
    yield wire.pack(Judged(0.5, 8))


def harmless(packed: bytes) -> None:
    """Either a message whose parts are what they are declared to be, or ContractError."""
    try:
        message = wire.unpack(packed)
    except ContractError:
        return
    assert type(message) in TYPES
    wire.pack(message)


def test_a_message_cut_off_anywhere_is_refused() -> None:
    for packed in messages_to_damage():
        for end in range(len(packed)):
            refused(packed[:end])
        refused(packed + b"\0")


def test_flipped_bits_do_no_harm() -> None:
    rng = random.Random(1)
    for packed in messages_to_damage():
        for position in range(len(packed)):
            damaged = bytearray(packed)
            damaged[position] ^= 1 << rng.randrange(8)
            harmless(bytes(damaged))


def test_random_bytes_do_no_harm() -> None:
    rng = random.Random(2)
    sources = list(messages_to_damage())
    for _ in range(3000):
        noise = rng.randbytes(rng.randrange(200))
        refused(noise)
        refused(wire.MAGIC + noise)
        source = rng.choice(sources)
        a, b = sorted(rng.randrange(len(source)) for _ in range(2))
        harmless(source[:a] + noise + source[b:])
        harmless(source[:a] + source[b:])


def test_damaged_json_does_no_harm() -> None:
    """Parts of headers put in each other's places: well-formed, and wrong."""
    rng = random.Random(3)
    parts: list[Any] = [
        None, True, 0, -1, 0.5, "x", "nan", [], [[]], {}, {"#": 0}, {"#": 9}, {"#": None}, {"~": "nan"}, {"~": None},
        {"%": []}, {"%": None}, {"%": [["x", {"#": 0}]]}, {"@": "Done"}, {"@": "SiteTimeout", "seconds": 1.0},
        {"@": "PlugIn", "name": "x", "options": {"%": []}}, {"@": "Excluded", "reason": "x", "count": 1},
    ]  # fmt: skip
    for _ in range(3000):
        cls = rng.choice(TYPES)
        header = {"@": cls.__name__} | {f.name: rng.choice(parts) for f in dataclasses.fields(cls)}
        harmless(raw(header, {"0": TENSORS[0]}))


def test_nothing_is_executed(tmp_path: Path) -> None:
    """A pickle that would leave a file behind is bytes like any other, wherever it stands."""
    trace = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    bomb = pickle.dumps(Bomb())
    header = b'{"@":"Done"}'
    for packed in (bomb, wire.MAGIC + bomb, raw(bomb), wire.MAGIC + struct.pack("<I", len(header)) + header + bomb):
        refused(packed)
    assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists()  # it would have


# ---------------------------------------------------------------------------------------------- what a reply may tell

TEXT_FIELDS = {
    "Excluded.reason",  # a word of DataError.code
    "Examined.channels",
    "Examined.labels",  # the keys: names of labels
    "Examined.annotated",  # names of labels
    "Examined.file_ending",
    "Prepared.warnings",  # sentences from a fixed list
    "Average.label",
    "Average.metric",
    "Score.label",
    "Score.status",
    "Score.unit",
    "Score.values",  # the keys: names of metrics
    "Described.names",  # of tensors
    "Described.dtypes",
    "Fetched.weights",  # the keys: names of tensors
    "Trained.weights",  # the keys: names of tensors
    "Trained.control",  # the same
    "Handed.weights",  # the same
    "Held.beside",  # names of tensors
    "Dealt.shares",  # the keys: sites' names in the study
    "Unmasked.own",  # the same
    "Unmasked.lost",  # the same
    "Card.site",  # its name in the study
    "SiteRefused.rule",
    "SiteError.exception",
    "SiteError.code",
    "SiteError.reference",
}
"""Every field of a reply that holds text. A new one is put here only after asking what a site could tell by it."""
TENSOR_FIELDS = {
    "Fetched.weights",
    "Trained.weights",
    "Trained.control",
    "Handed.weights",
    "Handed.sealed",  # bytes, for one other site
    "Passed.sealed",
    "Dealt.shares",  # bytes, each for one other site
    "Dealt.commitment",  # bytes: a digest
    "Masked.values",  # whole numbers that look drawn at random (tests/collect/test_secure_sum.py)
    "Unmasked.own",  # bytes: shares
    "Unmasked.lost",
    "Card.key",  # bytes: the public half
    "Card.certificate",
    "Card.signature",
    "Offered.cases",  # blinded names (tests/test_alignment.py)
    "Offered.geometry",
    "Blinded.points",
    "Maps.maps",
    "Looked.maps",
    "Placed.places",  # whole numbers: where patches lie
    "Gradients.gradients",
    "ChannelStatistics.keys",
    "ChannelStatistics.masses",
}
PER_VOXEL = (Maps, Gradients)
"""Replies that hold what was computed for single voxels: tensors, without a name, and nothing beside them."""


def fields_of(cls: type) -> Iterator[tuple[str, Any]]:
    """All fields of a type and of the types in it."""
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{cls.__name__}.{name}", hint
        for part in leaves(hint):
            if dataclasses.is_dataclass(part):
                yield from fields_of(typing.cast(type, part))


def leaves(hint: Any) -> Iterator[Any]:
    arguments = typing.get_args(hint)
    if not arguments:
        yield hint
    for argument in arguments:
        yield from leaves(argument)


def test_replies_tell_only_what_is_listed() -> None:
    fields = [f for cls in REPLIES + FAILURES for f in fields_of(cls)]
    allowed = {int, float, bool, str, Tensor, types.NoneType, Ellipsis}
    for name, hint in fields:
        for leaf in leaves(hint):
            assert leaf in allowed or dataclasses.is_dataclass(leaf), f"{name} holds {leaf}"
    assert {name for name, hint in fields if str in leaves(hint)} == TEXT_FIELDS
    assert {name for name, hint in fields if Tensor in leaves(hint)} == TENSOR_FIELDS


def test_maps_and_gradients_hold_tensors_and_nothing_else() -> None:
    for cls in PER_VOXEL:
        assert set(typing.get_type_hints(cls).values()) == {tuple[Tensor, ...]}
    several = {cls for cls in REPLIES if any(h == tuple[Tensor, ...] for _, h in fields_of(cls))}
    assert several == {*PER_VOXEL, Blinded, Placed}
    assert {n: h for n, h in typing.get_type_hints(Looked).items() if h is not int} == {
        "maps": tuple[tuple[Tensor, ...], ...]
    }


def test_no_reply_has_a_field_for_a_name_or_a_path() -> None:
    names = {name.partition(".")[2] for cls in REPLIES + FAILURES for name, _ in fields_of(cls)}
    words = {
        "name",
        "path",
        "file",
        "folder",
        "text",
        "message",
        "host",
        "user",
        "date",
        "id",
        "uid",
        "image",
        "voxels",
    }
    assert not {n for n in names - {"file_ending"} if words & set(n.split("_"))}
    hints = {name: hint for cls in REPLIES for name, hint in fields_of(cls)}
    assert hints["Score.case"] is int
    assert hints["Score.patient"] is int


# --------------------------------------------------------------------------------------------------- tensors on disk


def test_tensors_on_disk_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.safetensors"
    tensors = {str(i): t for i, t in enumerate(TENSORS)}
    wire.write_tensors(path, tensors, {"model": "m"})
    back, about = wire.read_tensors(path)
    assert about == {"model": "m"}
    assert all(same(back[name], tensors[name]) for name in tensors)
    wire.write_tensors(path, {}, {})
    assert wire.read_tensors(path) == ({}, {})
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    wire.write_tensors(path, {"x": torch.ones(2)}, {})

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(wire.os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        wire.write_tensors(path, {"x": torch.zeros(2)}, {})
    assert wire.read_tensors(path)[0]["x"].sum() == 2


@pytest.mark.parametrize(
    "content", [None, b"", b"\x80\x04.", b"garbage" * 100], ids=["missing", "empty", "pickle", "garbage"]
)
def test_a_file_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ContractError, match=r"m\.safetensors cannot be read"):
        wire.read_tensors(path)
