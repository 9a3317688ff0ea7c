"""What a pickle says, without doing any of it: the bytes are read as a description, and nothing in them is imported or called.

A pickle is a program for a small stack machine, which may import and call anything; `weights_only` of PyTorch narrows that, and
has been got round (CVE-2025-32434, CVE-2026-24747). Here the machine knows text, numbers, lists, tuples and mappings. Every
object of a class, and every result of a call, is a `Named` or a `Called`, which only hold what was written; what a
`BUILD` would set on an object is dropped. Nothing here recurses, so depth costs nothing; the number of operations is limited.
"""

from __future__ import annotations

import pickletools  # takes the bytes apart into operations, and executes none of them
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from concilium.errors import DataError

MAX_OPERATIONS = 2_000_000
"""A checkpoint of nnU-Net's largest network, after 1000 epochs, has about 200,000."""


@dataclass(frozen=True, eq=False)
class Named:
    """The name of a class or a function, which is never looked up."""

    name: str
    """Module and name, with a space between."""


@dataclass(frozen=True, eq=False)
class Called:
    """What a call would have given."""

    function: object
    arguments: object


@dataclass(frozen=True, eq=False)
class Stored:
    """Something that is kept beside the pickle, in torch's files a tensor's memory."""

    key: object


Step = Callable[["_Machine", object], None]
_PUSHED = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_NOTHING = frozenset({"PROTO", "FRAME", "STOP", "READONLY_BUFFER"})


def read_pickle(file: BinaryIO, *, stored: list[Stored] | None = None) -> object:
    """What the pickle that begins here describes; the file is left at its end. Of mappings, entries with text as key are kept.

    Args:
        stored: gets everything that is kept beside the pickle, also where it is in no entry that is kept.

    Raises:
        DataError: it is damaged, or of more than `MAX_OPERATIONS` operations.
    """
    machine = _Machine([] if stored is None else stored)
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if number >= MAX_OPERATIONS:
                raise DataError(
                    f"A pickle has more than {MAX_OPERATIONS} operations. Weights need fewer. Save the weights alone."
                )
            machine.step(operation.name, argument)
        return machine.stack.pop()
    except DataError:
        raise
    except Exception as e:  # whatever a stranger's bytes provoke
        raise DataError(f"A pickle is damaged ({type(e).__name__}). Expected one that torch.save wrote.") from e


class _Machine:
    """Stack, marks and memo of a pickle that is being read."""

    def __init__(self, stored: list[Stored]) -> None:
        self.stored = stored
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def step(self, name: str, argument: object) -> None:
        """One operation."""
        if name in _PUSHED:
            self.stack.append(argument)
        elif name not in _NOTHING:
            _STEPS[name](self, argument)

    def to_mark(self) -> list[object]:
        """What lies above the last mark, which goes."""
        above = self.stack
        self.stack = self.marks.pop()
        return above


def _push(value: Callable[[], object]) -> Step:
    return lambda m, _: m.stack.append(value())


def _mark(m: _Machine, _: object) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _pop(m: _Machine, _: object) -> None:
    if m.stack:
        m.stack.pop()
    else:  # the mark itself
        m.to_mark()


def _tuple(n: int) -> Step:
    def step(m: _Machine, _: object) -> None:
        items = [m.stack.pop() for _ in range(n)]
        m.stack.append(tuple(reversed(items)))

    return step


def _memoize(m: _Machine, number: object) -> None:
    m.memo[len(m.memo) if number is None else _whole(number)] = m.stack[-1]


def _recall(m: _Machine, number: object) -> None:
    m.stack.append(m.memo[_whole(number)])


def _append(m: _Machine, items: list[object]) -> None:
    if isinstance(m.stack[-1], list):  # otherwise what a call would have given
        m.stack[-1].extend(items)


def _set(m: _Machine, items: list[object]) -> None:
    if isinstance(m.stack[-1], dict):
        m.stack[-1].update(_entries(items))


def _entries(items: list[object]) -> dict[str, object]:
    """Key, value, key, value, ... as a mapping, without keys that are no text: numbers can be made to collide."""
    return {key: value for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str)}


def _collect(make: Callable[[list[object]], object]) -> Step:
    """Put what is made of everything above the mark in its place."""

    def step(m: _Machine, _: object) -> None:
        made = make(m.to_mark())
        m.stack.append(made)

    return step


def _drop(m: _Machine, _: object) -> None:
    m.stack.pop()


def _drop_to_mark(m: _Machine, _: object) -> None:
    m.to_mark()


def _call(m: _Machine, _: object) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    empty = isinstance(function, Named) and function.name == "collections OrderedDict" and arguments == ()
    m.stack.append({} if empty else Called(function, arguments))


def _new_with_names(m: _Machine, _: object) -> None:
    m.stack.pop()
    _call(m, None)


def _named_on_stack(m: _Machine, _: object) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(Named(f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else ""))


def _store(m: _Machine, key: object) -> None:
    m.stored.append(Stored(key))
    m.stack.append(m.stored[-1])


def _whole(number: object) -> int:
    if not isinstance(number, int):
        raise TypeError("no number")
    return number


_STEPS: dict[str, Step] = {
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "EMPTY_TUPLE": _push(tuple),
    "EMPTY_SET": _push(lambda: Called(Named("builtins set"), ())),
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": _drop_to_mark,
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "LIST": _collect(list),
    "TUPLE": _collect(tuple),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "DICT": _collect(_entries),
    "FROZENSET": _collect(lambda items: Called(Named("builtins frozenset"), tuple(items))),
    "APPEND": lambda m, _: _append(m, [m.stack.pop()]),
    "APPENDS": lambda m, _: _append(m, m.to_mark()),
    "ADDITEMS": _drop_to_mark,
    "SETITEM": lambda m, _: _set(m, [m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, _: _set(m, m.to_mark()),
    "BUILD": _drop,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _recall),
    "GLOBAL": lambda m, name: m.stack.append(Named(str(name))),
    "STACK_GLOBAL": _named_on_stack,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda m, code: m.stack.append(Named(f"copyreg {code}"))),
    "REDUCE": _call,
    "NEWOBJ": _call,
    "NEWOBJ_EX": _new_with_names,
    "OBJ": _collect(lambda items: Called(items[0], tuple(items[1:]))),
    "INST": _collect(lambda items: Called(None, tuple(items))),
    "PERSID": _store,
    "BINPERSID": lambda m, _: _store(m, m.stack.pop()),
    "NEXT_BUFFER": _push(lambda: Called(Named("buffer"), ())),
}  # fmt: skip
