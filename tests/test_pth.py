"""Weights out of `.pth` files: what torch wrote is read as torch reads it, and whatever else stands there, nothing is done."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import struct
import subprocess
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from concilium import pickled, pth
from concilium.errors import DataError
from concilium.pth import read_pth

WNET = Path(__file__).parents[2] / "shared" / "data" / "weights" / "wnet_drive.pth"
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def checkpoint() -> dict[str, Any]:
    """As nnU-Net's trainer writes one, with its logs, arguments and optimiser; two names share a tensor."""
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 2, 1))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
    network(torch.randn(1, 2, 8, 8)).sum().backward()
    optimizer.step()
    weights = network.state_dict()
    weights["again.weight"] = weights["0.weight"]
    return {
        "network_weights": weights,
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(1.5)] * 50, "lrs": [0.01] * 100},
        "_best_ema": np.float64(0.7),
        "current_epoch": 100,
        "init_args": {"plans": {"a": [1, (2, 3)], "b": {"c": None}}, "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }


def saved(value: object, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def packed(path: Path, description: bytes, blocks: dict[str, bytes] | None = None, **others: bytes) -> Path:
    """A zip as torch writes one, with this description; checksums are right."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", description)
        for name, content in {"byteorder": b"little", **others}.items():
            archive.writestr(f"x/{name}", content)
        for key, content in (blocks or {}).items():
            archive.writestr(f"x/data/{key}", content)
    return path


def refused(path: Path) -> str:
    with pytest.raises(DataError) as e:
        read_pth(path)
    assert str(path) in str(e.value)
    return str(e.value)


# -------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}, {"pickle_protocol": 5}]
)
def test_a_checkpoint_of_nnunet_gives_the_weights_that_torch_reads(options: dict[str, Any], tmp_path: Path) -> None:
    path = saved(checkpoint(), tmp_path / "checkpoint_final.pth", **options)
    expected = torch.load(path, weights_only=False)["network_weights"]
    read = read_pth(path)
    assert same(read, dict(expected))
    assert read["again.weight"].data_ptr() == read["0.weight"].data_ptr()


@pytest.mark.skipif(not WNET.is_file(), reason="needs published weights beside the repository")
def test_published_weights_of_an_older_torch_are_read_as_torch_reads_them() -> None:
    assert same(read_pth(WNET), dict(torch.load(WNET, map_location="cpu", weights_only=True)["model_state_dict"]))


@pytest.mark.parametrize("zipped", [True, False])
def test_types_shapes_and_views_are_kept(zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {t: torch.arange(6).to(getattr(torch, t)).reshape(2, 3) for t in DTYPES}
    state |= {
        "turned": base.reshape(4, 6).t(),
        "part": base[3:9:2],
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    state |= {"learnt": torch.nn.Parameter(base[:4])}
    path = saved(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_pth(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("key", [*pth.WEIGHTS, None])
def test_weights_are_found_where_a_checkpoint_keeps_them(key: str | None, tmp_path: Path) -> None:
    weights = OrderedDict(a=torch.ones(2), b=torch.zeros(3))
    path = saved({key: weights, "epoch": 3} if key else weights, tmp_path / "w.pth")
    assert same(read_pth(path), dict(weights))


def test_what_is_no_tensor_of_plain_numbers_is_passed_over(tmp_path: Path) -> None:
    state = {
        "a": torch.ones(2),
        "c": torch.ones(2, dtype=torch.complex64),
        "s": torch.eye(2).to_sparse(),
        "n": 3,
        "t": "x",
    }
    assert list(read_pth(saved(state, tmp_path / "w.pth"))) == ["a"]


# ----------------------------------------------------------------------------------------------- what is never executed


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def payloads(proof: Path) -> dict[str, object]:
    """Objects that leave a file when they are unpickled by one who looks up what they name."""
    touch = f"touch {proof}"
    weights = {"w": torch.ones(2)}
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, f"open({str(proof)!r}, 'w').close()"),
        "exec": Calls(exec, f"open({str(proof)!r}, 'w').close()"),
        "subprocess": Calls(subprocess.check_call, ["touch", str(proof)]),
        "a method": Calls(Path.touch, proof),
        "a torch function": Calls(torch.save, {}, str(proof)),
        "in what weights_only lets pass": Calls(torch._utils._rebuild_parameter, Calls(os.system, touch), False, None),
        "nested in a call": Calls(dict, [("w", Calls(os.system, touch))]),
        "beside weights": {"network_weights": weights, "logging": Calls(os.system, touch)},
        "within weights": {"network_weights": {**weights, "x": Calls(os.system, touch)}},
        "as a key": {Calls(os.system, touch): 1, **weights},
        "as a tensor's hook": {"w": Calls(torch._utils._rebuild_tensor_v2, Calls(os.system, touch), 0, (1,), (1,), False, {})},
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", payloads(Path("proof")))
def test_nothing_in_a_file_is_executed(name: str, zipped: bool, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = saved(payloads(proof)[name], tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with contextlib.suppress(DataError):
        assert list(read_pth(path)) == ["w"]
    assert not proof.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert proof.exists()  # the file is what it seems to be


@pytest.mark.parametrize(
    "description",
    [
        b"cos\nsystem\n(S'touch PROOF'\ntR.",
        b"(S'touch PROOF'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch PROOF'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'touch PROOF'\nt\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'touch PROOF'\nt}\x92.",
        b"\x80\x02\x82\x01.",
        b"ctorch\nOrderedDict.__reduce__\n)R}(S'__setstate__'\ncos\nsystem\nub.",
        b"ccollections\nOrderedDict\n)R(S'w'\ncos\nsystem\nS'touch PROOF'\n\x85Ru}b.",
        b"Pcos\n.",
        b"cos\nsystem\nQ.",
    ],
)
def test_operations_that_call_only_tell_of_it(description: bytes, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    pickled.read_pickle(io.BytesIO(description.replace(b"PROOF", str(proof).encode())))
    assert not proof.exists()


# ----------------------------------------------------------------------------------------------------- damaged or hostile


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    for zipped in (True, False):
        whole = saved(checkpoint(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped).read_bytes()
        expected = read_pth(tmp_path / "w.pth")
        for n in [*range(0, 400, 7), *range(400, len(whole), 97), *range(len(whole) - 60, len(whole))]:
            (tmp_path / "cut.pth").write_bytes(whole[:n])
            try:
                assert same(read_pth(tmp_path / "cut.pth"), expected)  # an old file's last block is the optimiser's
            except DataError:
                continue
            assert not zipped


@pytest.mark.parametrize("kind", ["zip", "old", "description"])
def test_flipped_bits_are_read_right_or_refused(kind: str, tmp_path: Path) -> None:
    """`description`: within it, with the right checksum, so that the damage is met by what reads it."""
    chance = random.Random(5)
    path = saved(checkpoint(), tmp_path / "w.pth", _use_new_zipfile_serialization=kind != "old")
    whole = path.read_bytes()
    with zipfile.ZipFile(saved(checkpoint(), tmp_path / "z.pth")) as archive:
        description = archive.read("z/data.pkl")
        blocks = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist() if "/data/" in name}
    expected, outcomes = read_pth(path), set()
    tracemalloc.start()
    for _ in range(200):
        content = bytearray(description if kind == "description" else whole)
        for _ in range(chance.choice((1, 1, 4))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        if kind == "description":
            packed(path, bytes(content), blocks)
        else:
            path.write_bytes(content)
        try:
            read = read_pth(path)
        except DataError:
            outcomes.add("refused")
            continue
        outcomes.add("read")
        assert all(t.numel() <= 1000 for t in read.values())
        if kind == "zip":  # its checksums tell
            assert same(read, expected)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcomes == {"read", "refused"}
    assert peak < 50 * 2**20


def class_of(kind: str, module: str = "torch") -> bytes:
    return f"c{module}\n{kind}\n".encode()


def written(
    *,
    kind: str = "FloatStorage",
    module: str = "torch",
    n: Any = 4,
    offset: Any = 0,
    shape: Any = (2, 2),
    strides: Any = (2, 1),
    key: Any = "0",
) -> bytes:
    """The description of a state dict with one tensor, `w`, in block `key`, operation by operation."""

    def value(v: Any) -> bytes:
        return pickle.dumps(v, 2)[2:-1]

    stored = b"(" + value("storage") + class_of(kind, module) + value(key) + value("cpu") + value(n) + b"tQ"
    place = value(offset) + value(shape) + value(strides)
    call = class_of("_rebuild_tensor_v2", "torch._utils") + b"(" + stored + place + b"\x89}tR"
    return b"\x80\x02}" + value("w") + call + b"s."


BLOCK = {"0": struct.pack("<4f", 1, 2, 3, 4)}


def test_a_description_made_here_is_read(tmp_path: Path) -> None:
    """So that the next test refuses what it changes and not what it all shares."""
    (read,) = read_pth(packed(tmp_path / "w.pth", written(), BLOCK)).values()
    assert read.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "change",
    [
        {"n": 5}, {"n": 3}, {"n": 0}, {"n": -1}, {"n": 2**40}, {"n": 2**70}, {"n": "4"}, {"n": True},
        {"offset": 1}, {"offset": -1}, {"offset": 2**63}, {"offset": "0"},
        {"shape": (2, 3)}, {"shape": (-2, -2)}, {"shape": (2**40, 2**40)}, {"shape": (5,), "strides": (0,)}, {"shape": (2,)},
        {"shape": [2, 2]}, {"shape": (2.0, 2)}, {"shape": 4}, {"shape": (1,) * 17, "strides": (1,) * 17},
        {"shape": (2**40,), "strides": (0,)}, {"shape": (0,), "strides": (1,), "offset": 5},
        {"strides": (3, 1)}, {"strides": (-2, 1)}, {"strides": (2**62, 1)}, {"strides": (2, None)},
        {"kind": "DoubleStorage"}, {"kind": "HalfStorage"}, {"kind": "UntypedStorage"}, {"kind": "ComplexFloatStorage"},
        {"module": "os", "kind": "system"}, {"module": "torch.storage"}, {"key": "1"}, {"key": "../data/0"}, {"key": 0},
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_within_its_block_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    refused(packed(tmp_path / "w.pth", written(**change), BLOCK))


def named(name: str, **change: Any) -> bytes:
    """One entry more for what `written` gives."""
    return written(**change)[3:-1].replace(b"X\x01\x00\x00\x00w", b"X\x04\x00\x00\x00" + name.encode(), 1)


def test_many_tensors_of_one_block_take_its_memory_once(tmp_path: Path) -> None:
    many = written()[:-1] + b"".join(named(f"{i:04d}") for i in range(1000)) + b"."
    read = read_pth(packed(tmp_path / "w.pth", many, BLOCK))
    assert len(read) == 1001
    assert len({t.untyped_storage().data_ptr() for t in read.values()}) == 1


@pytest.mark.parametrize("change", [{"n": 2, "shape": (2,), "strides": (1,)}, {"kind": "IntStorage"}])
def test_a_block_has_one_size_and_type(change: dict[str, Any], tmp_path: Path) -> None:
    both = written()[:-1] + named("more", **change) + b"."
    assert "described in two ways" in refused(packed(tmp_path / "w.pth", both, BLOCK))


def test_blocks_cannot_be_larger_than_the_file(tmp_path: Path) -> None:
    path = packed(tmp_path / "w.pth", written(n=2**28), {"0": b""})
    content = path.read_bytes()
    at = content.rindex(b"x/data/0") - 46 + 20  # sizes in the central directory
    path.write_bytes(content[:at] + struct.pack("<II", 2**30, 2**30) + content[at + 8 :])
    assert "larger than the file" in refused(path)


def test_zips_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    bomb, twice, two, none = (tmp_path / f"{n}.pth" for n in ("bomb", "twice", "two", "none"))
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", written(n=2**26))
        archive.writestr("x/data/0", bytes(2**28))
    assert bomb.stat().st_size < 2**19
    assert "compressed" in refused(bomb)
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("x/data.pkl", written())
        archive.writestr("x/data.pk_", written())
    twice.write_bytes(twice.read_bytes().replace(b"data.pk_", b"data.pkl"))
    assert "different names" in refused(twice)
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("x/data.pkl", written())
        archive.writestr("y/data.pkl", written())
    assert "2 descriptions" in refused(two)
    with zipfile.ZipFile(none, "w") as archive:
        archive.writestr("../data.pkl.txt", written())
    assert "0 descriptions" in refused(none)
    assert "little-endian" in refused(packed(tmp_path / "b.pth", written(), BLOCK, byteorder=b"big"))


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "w.pth", written(), BLOCK)
    for module, name, value, told in (
        (pth, "LIMIT", 100, "At most 100 are read"),
        (pth, "DESCRIPTION_LIMIT", 20, "more than 20 bytes"),
        (pth, "MAX_ENTRIES", 2, "Allowed are 2"),
        (pickled, "MAX_OPERATIONS", 10, "more than 10 operations"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert told in refused(path)
    assert read_pth(path)


@pytest.mark.parametrize(
    "description",
    [
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"]" * 100_000 + b"a" * 99_999 + b".",
        b"}(" + b"Vx\n}(" * 50_000 + b"u" * 50_001 + b".",
        b"cx\ny\n" + b")R" * 100_000 + b".",
        b"]q\x00" + b"h\x00a" * 50_000 + b".",
    ],
    ids=["tuples", "lists", "mappings", "calls", "itself"],
)
def test_depth_costs_nothing(description: bytes, tmp_path: Path) -> None:
    refused(packed(tmp_path / "w.pth", description))


def test_numbers_as_keys_cannot_be_made_to_collide(tmp_path: Path) -> None:
    """Python's hash of a whole number is that number modulo 2**61 - 1."""
    keys = b"".join(pickle.dumps(i * (2**61 - 1), 2)[2:-1] + b"N" for i in range(1, 50_000))
    refused(packed(tmp_path / "w.pth", b"}(" + keys + b"u."))


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04", b"\x80\x02", b"not weights", bytes(1000), b"PK\x03\x04" + bytes(1000)]
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    refused(tmp_path / "w.pth")
    refused(tmp_path)
    refused(tmp_path / "missing.pth")
