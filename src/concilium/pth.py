"""Weights from a file of torch.save, without executing anything in it: a description (`pickled.py`) and blocks of numbers.

Since PyTorch 1.6 the file is a zip: `NAME/data.pkl` describes the objects, `NAME/data/KEY` is the memory of a tensor. Before,
it was five pickles, and then the blocks, in the order of the last pickle. What is neither a mapping, a name nor a tensor of plain
numbers is passed over. Of many objects in a checkpoint (optimiser, logs, arguments) only the weights are returned, and only
their blocks are read. A tensor must lie within its block, and together the blocks are no larger than the file.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from concilium.errors import DataError
from concilium.pickled import Called, Named, Stored, read_pickle

LIMIT = 8 * 2**30
"""Largest file [bytes] that is read."""
DESCRIPTION_LIMIT = 64 * 2**20
"""Largest description [bytes]."""
MAX_ENTRIES, MAX_AXES = 100_000, 16
WEIGHTS = ("network_weights", "state_dict", "model_state_dict", "model")
"""Where a checkpoint keeps its weights: the first of these that is there (nnU-Net's is the first). Without, it is them itself."""
AGAIN = "Copy it again from where it came."
MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a file from before PyTorch 1.6."""
_TYPES: Mapping[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
}


@dataclass(frozen=True)
class _Block:
    """The memory of tensors, as described."""

    key: str
    dtype: torch.dtype
    n: int
    """Elements."""

    @property
    def n_bytes(self) -> int:
        return self.n * self.dtype.itemsize


def read_pth(path: Path) -> dict[str, Tensor]:
    """The weights in a `.pth` file, by name; tensors of one block share its memory.

    Raises:
        DataError: the file is missing, damaged or too large, or holds no weights that can be read so.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LIMIT:
                raise DataError(f"It has {size} bytes. At most {LIMIT} are read. Save the weights alone.")
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zip(file, size) if is_zip else _read_old(file, size)
    except DataError as e:
        raise DataError(f"{path} cannot be used as weights. {e}") from e
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror}). Expected a file of torch.save. Check the path.") from e
    except Exception as e:  # whatever a stranger's bytes provoke
        raise DataError(f"{path} is damaged ({type(e).__name__}). Expected a file of torch.save. {AGAIN}") from e


# -------------------------------------------------------------------------------------------------------- containers


def _read_zip(file: BinaryIO, size: int) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(entries) > MAX_ENTRIES or len(set(names)) < len(names):
            raise DataError(f"It has {len(names)} entries. Allowed are {MAX_ENTRIES} of different names.")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise DataError(
                    f"{entry.filename} in it is compressed or encrypted. torch.save does neither. Save it anew."
                )
            if not entry.file_size == entry.compress_size <= size:
                raise DataError(f"{entry.filename} in it would be larger than the file. {AGAIN}")
        found = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise DataError(f"It has {len(found)} descriptions data.pkl. Expected one, as torch.save writes.")
        prefix = found[0].removesuffix("data.pkl")

        def read(name: str, limit: int) -> bytes:
            if archive.getinfo(name).file_size > limit:
                raise DataError(f"{name} has more than {limit} bytes. Save the weights alone.")
            return archive.read(name)

        if f"{prefix}byteorder" in names and (order := read(f"{prefix}byteorder", 16)) != b"little":
            raise DataError(
                f"Its numbers are written {order!r}. Expected little-endian ones. Save it on another machine."
            )
        root = read_pickle(io.BytesIO(read(found[0], DESCRIPTION_LIMIT)))
        return _tensors(root, lambda block: read(f"{prefix}data/{block.key}", block.n_bytes), size)


def _read_old(file: BinaryIO, size: int) -> dict[str, Tensor]:
    head = io.BytesIO(file.read(min(size, DESCRIPTION_LIMIT)))
    if (magic := read_pickle(head)) != MAGIC:
        raise DataError(f"It begins with {type(magic).__name__}. Expected a .pth file of torch.save. Give one.")
    read_pickle(head)
    read_pickle(head)  # version, and sizes of C's types where it was written
    stored: list[Stored] = []
    root = read_pickle(head, stored=stored)
    keys = read_pickle(head)
    file.seek(head.tell())
    places = _places(file, keys, [block for s in stored if (block := _block(s)) is not None], size)

    def read(block: _Block) -> bytes:
        file.seek(places[block.key])
        return file.read(block.n_bytes)

    return _tensors(root, read, size)


def _places(file: BinaryIO, keys: object, described: Sequence[_Block], size: int) -> dict[str, int]:
    """Where the blocks of an old file begin: each is its number of elements (8 bytes), and then these."""
    blocks = {block.key: block for block in described}
    places: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else []:
        (n,) = struct.unpack("<q", file.read(8))
        if key not in blocks or blocks[key].n != n or key in places:
            raise DataError(f"Block {key!r} is not as it is described. {AGAIN}")
        places[key] = file.tell()
        if places[key] + blocks[key].n_bytes > size:
            raise DataError(f"It ends at {size} bytes, within block {key!r}. {AGAIN}")
        file.seek(blocks[key].n_bytes, os.SEEK_CUR)
    return places


# ----------------------------------------------------------------------------------------------------------- tensors


def _tensors(root: object, read: Callable[[_Block], bytes], size: int) -> dict[str, Tensor]:
    """The tensors among the weights; what else is there, such as a number, is passed over."""
    described = _weights(root)
    memory: dict[str, tuple[_Block, Tensor]] = {}
    total = 0
    tensors: dict[str, Tensor] = {}
    for name, value in described.items():
        if (found := _described(value)) is None:
            continue
        block, offset, shape, strides = found
        _check_within(name, block, offset, shape, strides)
        if block.key not in memory:
            total += block.n_bytes
            if total > size:
                raise DataError(f"Its blocks would have {total} bytes, more than itself. {AGAIN}")
            memory[block.key] = block, _loaded(block, read(block))
        known, flat = memory[block.key]
        if known != block:
            raise DataError(f"Block {block.key!r} is described in two ways. Save the weights again.")
        tensors[name] = flat.as_strided(shape, strides, offset)
    if not tensors:
        raise DataError(
            f"Among {len(described)} entries are no weights by name. Expected a state dict, or a checkpoint with one. Save one."
        )
    return tensors


def _weights(root: object) -> Mapping[str, object]:
    mapping = root if isinstance(root, dict) else {}
    inner = next((mapping[key] for key in WEIGHTS if isinstance(mapping.get(key), dict)), mapping)
    return inner if isinstance(inner, dict) else {}


def _described(value: object) -> tuple[_Block, int, tuple[int, ...], tuple[int, ...]] | None:
    """Block, offset, shape and strides [elements] of a tensor; `None` for what is no tensor of plain numbers."""
    match value:
        case Called(Named("torch._utils _rebuild_parameter"), (tensor, *_)):
            value = tensor
    match value:
        case Called(Named("torch._utils _rebuild_tensor_v2"), (Stored() as stored, offset, shape, strides, *_)):
            block, sizes, steps = _block(stored), _sizes(shape), _sizes(strides)
            if block and sizes is not None and steps is not None and len(sizes) == len(steps) and type(offset) is int:
                return block, offset, sizes, steps
    return None


def _block(stored: Stored) -> _Block | None:
    match stored.key:
        case ("storage", Named(name), str(key), _, int(n), *_) if n >= 0 and not isinstance(n, bool):
            module, _, kind = name.partition(" ")
            return _Block(key, _TYPES[kind], n) if module == "torch" and kind in _TYPES else None
    return None


def _sizes(value: object) -> tuple[int, ...] | None:
    sizes = tuple(n for n in value if type(n) is int and 0 <= n < 2**62) if isinstance(value, tuple) else ()
    return sizes if isinstance(value, tuple) and len(sizes) == len(value) <= MAX_AXES else None


def _check_within(name: str, block: _Block, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Raise DataError where a tensor reaches beyond its block, or repeats elements to be larger than that."""
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    fits = 0 <= offset <= block.n if 0 in shape else offset >= 0 and last < block.n
    if not fits or math.prod(shape) > block.n:
        raise DataError(
            f"{name!r} has shape {shape}, strides {strides} and offset {offset}. Its block has {block.n} elements, and it must "
            "lie within. Save the weights again."
        )


def _loaded(block: _Block, content: bytes) -> Tensor:
    if len(content) != block.n_bytes:
        raise DataError(f"Block {block.key!r} has {len(content)} bytes. Expected {block.n_bytes}. {AGAIN}")
    return torch.frombuffer(bytearray(content), dtype=block.dtype) if content else torch.empty(0, dtype=block.dtype)
