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
import struct
import types
import typing
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from concilium import messages
from concilium.errors import ContractError

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
    """Around each message: which run it belongs to, which life of the site (`epoch`), and its number within that life."""

    run: str
    epoch: int
    sequence: int


def pack(message: object, envelope: Envelope) -> bytes:
    """The message as bytes.

    Raises:
        ContractError: the message holds something that is no message type, number, text, tuple, mapping or tensor.
    """
    tensors: list[torch.Tensor] = []
    header = {"envelope": dataclasses.asdict(envelope), "message": _encode(message, tensors)}
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    body = save({str(i): t for i, t in enumerate(tensors)})
    return b"".join((MAGIC, struct.pack("<I", len(text)), text, body))


def with_envelope(packed: bytes, envelope: Envelope) -> bytes:
    """The same message in another envelope, without packing its tensors again."""
    header, start = _header(packed)
    header["envelope"] = dataclasses.asdict(envelope)
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    return b"".join((MAGIC, struct.pack("<I", len(text)), text, memoryview(packed)[start:]))


def unpack(packed: bytes, *, limit: int = LIMIT) -> tuple[Any, Envelope]:
    """The message and its envelope.

    Raises:
        ContractError: not a message, damaged, too large, or of a type or with a field that `messages.py` does not have.
    """
    if len(packed) > limit:
        raise ContractError(f"A message of {len(packed)} bytes arrived; at most {limit} are read. Raise the limit or send less.")
    header, start = _header(packed)
    try:
        tensors = load(packed[start:])
        envelope = Envelope(**header["envelope"])
        if not (isinstance(envelope.run, str) and type(envelope.epoch) is int and type(envelope.sequence) is int):
            raise ContractError(f"An envelope holds {envelope}. Expected a run id and two whole numbers.")
        return _decode(header["message"], Any, tensors, "message"), envelope
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ContractError(f"A damaged message arrived ({type(e).__name__}). The sender must pack it with this version.") from e


def _header(packed: bytes) -> tuple[dict[str, Any], int]:
    if packed[:4] != MAGIC or len(packed) < 8:
        raise ContractError(f"Expected a message that starts with {MAGIC!r}, got {bytes(packed[:4])!r}.")
    (size,) = struct.unpack_from("<I", packed, 4)
    try:
        header = json.loads(bytes(packed[8 : 8 + size]))
    except (ValueError, RecursionError) as e:
        raise ContractError("A damaged message arrived: its header is not JSON.") from e
    if not isinstance(header, dict) or set(header) != {"envelope", "message"}:
        raise ContractError("A damaged message arrived: its header has not the fields envelope and message.")
    return header, 8 + size


def _encode(value: object, tensors: list[torch.Tensor]) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"~": repr(value)}
        case torch.Tensor():
            tensors.append(value.detach().cpu().contiguous())
            return {"#": len(tensors) - 1}
        case tuple():
            return [_encode(v, tensors) for v in value]
        case collections.abc.Mapping():
            if not all(isinstance(k, str) for k in value):
                raise ContractError(f"A mapping in a message has keys {list(value)[:3]}. Only text can be a key.")
            return {"%": [[k, _encode(v, tensors)] for k, v in value.items()]}
    name = type(value).__name__
    if _TYPES.get(name) is not type(value):
        raise ContractError(f"{type(value).__name__} cannot be sent. Only the types in messages.py may cross a site's boundary.")
    fields = {f.name: _encode(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
    return {"@": name, **fields}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(value: Any, expected: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """Build the value; `expected` is its annotation (`Any`: whatever message type it says it is)."""
    decoded = _build(value, tensors, where)
    if not _fits(decoded, expected):
        raise ContractError(f"{where} holds {type(decoded).__name__} where {expected} belongs.")
    return decoded


def _build(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    if isinstance(value, list):
        return tuple(_build(v, tensors, f"{where}[{i}]") for i, v in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "#" in value:
        return tensors[str(int(value["#"]))]
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
    if expected is Any:
        return True
    if isinstance(expected, typing.ForwardRef):  # `Json` refers to itself
        expected = _json()
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if expected in (None, types.NoneType):
        return value is None
    if expected is float:
        return type(value) in (float, int)
    return type(value) is expected


@functools.cache
def _json() -> Any:
    return None | bool | int | float | str | tuple[Any, ...] | collections.abc.Mapping[str, Any]
