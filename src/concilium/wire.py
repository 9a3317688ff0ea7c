"""Message <-> bytes: a JSON header and safetensors. Nothing is ever unpickled.

Layout: `CNC1`, header length (4 bytes, little endian), header (JSON, UTF-8), tensors (safetensors). In the header a tensor
stands as `{"#": index}`, a mapping as `{"%": [[key, value], ...]}`, a value of a message type as `{"@": type, ...fields}`, and a
float that JSON does not know as `{"~": "nan"}`. Reading builds only the types named in `messages.py`, checks every field
against its declared type, and refuses what is larger than `limit`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import math
import os
import struct
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from concilium import messages
from concilium.errors import ContractError

T = TypeVar("T")
MAGIC = b"CNC1"
LIMIT = 8 * 2**30
"""Largest message [bytes] that is read unless the caller says otherwise."""

_TYPES: dict[str, type] = {
    name: value
    for name, value in vars(messages).items()
    if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == messages.__name__
}


@dataclasses.dataclass(frozen=True)
class Envelope:
    """Travels beside each message: its run, which life of the site it is for (`epoch`), and its number within the run."""

    run: str
    epoch: int
    sequence: int


def pack(message: object) -> bytes:
    """The message as bytes.

    Raises:
        ContractError: no type of `messages.py`, or a field holds what its declared type does not allow.
    """
    _check_type(message)
    tensors: list[torch.Tensor] = []
    try:
        header = json.dumps(_encode(message, tensors), allow_nan=False, separators=(",", ":")).encode()
        body = save({str(i): t for i, t in enumerate(tensors)})
    except (RuntimeError, ValueError) as e:
        raise ContractError(
            f"{type(message).__name__} cannot be packed ({type(e).__name__}). Expected dense tensors that share no memory, "
            "and whole numbers of at most 4300 digits. Clone the tensors."
        ) from e
    return b"".join((MAGIC, struct.pack("<I", len(header)), header, body))


def unpack(packed: bytes, *, limit: int = LIMIT) -> Any:
    """The message.

    Raises:
        ContractError: not a message, damaged, too large, or of a type or with a field that `messages.py` does not have.
    """
    if len(packed) > limit:
        raise ContractError(
            f"A message of {len(packed)} bytes arrived; at most {limit} are read. Raise the limit or send less."
        )
    if packed[:4] != MAGIC or len(packed) < 8:
        raise ContractError(
            f"Expected a message that starts with {MAGIC!r}, got {bytes(packed[:4])!r}. The sender must pack it."
        )
    (size,) = struct.unpack_from("<I", packed, 4)
    try:
        header = json.loads(packed[8 : 8 + size])
        message = _build(header, load(packed[8 + size :]), "message")
    except ContractError:
        raise
    except Exception as e:  # whatever a stranger's bytes provoke
        raise ContractError(
            f"A damaged message arrived ({type(e).__name__}). The sender must pack it with this version."
        ) from e
    _check_type(message)
    return message


def _check_type(message: object) -> None:
    if type(message) not in _TYPES.values():
        raise ContractError(
            f"{type(message).__name__} is no message. Only the types in messages.py may cross a site's boundary. Send one."
        )


def _encode(value: object, tensors: list[torch.Tensor]) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else {"~": repr(float(value))}
        case torch.Tensor():
            tensors.append(value.detach().cpu().contiguous())
            return {"#": len(tensors) - 1}
        case tuple():
            return [_encode(v, tensors) for v in value]
        case collections.abc.Mapping():
            if not all(isinstance(k, str) for k in value):
                raise ContractError(f"A mapping in a message has keys {list(value)[:3]}. Only text can be a key.")
            return {"%": [[k, _encode(v, tensors)] for k, v in value.items()]}
    _check_type(value)
    cls: type = type(value)
    fields: dict[str, Any] = {}
    for key, hint in _hints(cls).items():
        held = getattr(value, key)
        _check_fits(held, hint, f"{cls.__name__}.{key}")
        fields[key] = _encode(held, tensors)
    return {"@": cls.__name__, **fields}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(value: Any, expected: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    decoded = _build(value, tensors, where)
    _check_fits(decoded, expected, where)
    return decoded


def _check_fits(value: object, expected: Any, where: str) -> None:
    if not _fits(value, expected):
        raise ContractError(
            f"{where} holds {type(value).__name__}. Expected {expected}. The sender must pack it with this version."
        )


def _build(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    if isinstance(value, list):
        return tuple(_build(v, tensors, f"{where}[{i}]") for i, v in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "#" in value:
        return tensors.pop(str(int(value["#"])))  # each once: two fields never share memory
    if "~" in value:
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[value["~"]]
    if "%" in value:
        return {str(k): _build(v, tensors, f"{where}.{k}") for k, v in value["%"]}
    name = value.get("@")
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ContractError(f"{where} is of type {name!r}. Known are: {', '.join(_TYPES)}.")
    hints = _hints(cls)
    given = {k: v for k, v in value.items() if k != "@"}
    if set(given) != set(hints):
        raise ContractError(f"{where} ({name}) has fields {sorted(given)}. Expected {sorted(hints)}.")
    return cls(**{k: _decode(v, hints[k], tensors, f"{where}.{k}") for k, v in given.items()})


def _fits(value: Any, expected: Any) -> bool:
    if isinstance(expected, typing.ForwardRef):  # `Json` refers to itself
        return _is_json(value)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, collections.abc.Mapping) and all(_fits(v, arguments[1]) for v in value.values())
    if expected in (None, types.NoneType):
        return value is None
    if expected is float:  # a whole number will do, if it can be made a float
        return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
    if expected is torch.Tensor:
        return isinstance(value, torch.Tensor)
    return type(value) is expected


def _is_json(value: Any) -> bool:
    match value:
        case None | bool() | int() | float() | str():
            return True
        case tuple():
            return all(map(_is_json, value))
        case collections.abc.Mapping():
            return all(map(_is_json, value.values()))
    return False


# ------------------------------------------------------------------------------------------------------ tensors on disk


def part(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What stands under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def write_tensors(path: Path, tensors: messages.Tensors, about: collections.abc.Mapping[str, str]) -> None:
    """Write a safetensors file with `about` in its header, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    # with neither tensors nor `about`, safetensors 0.8 writes an empty `about` that it cannot read
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=dict(about) or None)
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def header_of(path: Path) -> dict[str, str]:
    """What stands in the header of a safetensors file; no tensor is read.

    Raises:
        ContractError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and what stands in its header.

    Raises:
        ContractError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as e:
        raise ContractError(
            f"{path} cannot be read ({type(e).__name__}). Expected a safetensors file. Restore it, or start again."
        ) from e
