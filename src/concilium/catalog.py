"""Name -> plug-in. The folder is the registry: one folder per kind, one file per plug-in, the file's name is its name.

The entry of a file is a function whose keyword-only parameters are the plug-in's options, except those that Concilium itself
supplies. Code outside the package is named `module:function`.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from concilium.errors import StudyError

ENTRIES: Mapping[str, str | None] = {
    "aggregation": "rule",
    "attacks": "attack",
    "collect": "collect",
    "defences": "defend",
    "engines": "connect",
    "exports": "export",
    "filters": "filter",
    "local_updates": "step",
    "losses": "loss",
    "metrics": "metric",
    "networks": "build",
    "protocols": None,
}
"""Kind -> name of the function in each of its files; `None`: the file's own name."""

SUPPLIED: Mapping[str, frozenset[str]] = {
    "aggregation": frozenset({"before"}),
    "attacks": frozenset({"seed"}),
    "collect": frozenset({"blocks", "weigh", "asked", "see_updates", "spool"}),
    "defences": frozenset({"n_channels", "n_axes"}),
    "engines": frozenset({"sites", "folder", "test", "run"}),
    "exports": frozenset({"card", "intended_use"}),
    "losses": frozenset({"batch_dice", "regions", "ignore"}),
    "networks": frozenset({"n_channels", "n_labels", "plan", "deep_supervision"}),
    "protocols": frozenset(
        {
            "model",
            "collect",
            "rule",
            "rounds",
            "steps",
            "min_sites",
            "deadline_s",
            "network",
            "training",
            "seed",
            "device",
            "cases",
            "weigh",
            "sharing",
            "begin_with",
            "box_s",
        }
    ),
}
"""Kind -> parameters that are no options, because Concilium passes them."""

TRAINER = "trainer"
"""Option that names code, the class of a trainer."""
STOCK_TRAINERS = "nnunetv2.training.nnUNetTrainer."
"""Where those lie that come with nnU-Net, which Concilium imports anyway."""

UNANNOTATED = bool | int | float | str
"""What an option may be whose parameter has no annotation, as in code outside the package."""


def names(kind: str) -> tuple[str, ...]:
    """The plug-ins of a kind, without importing any."""
    folder = Path(__file__).parent / kind
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")))


@functools.cache
def load(kind: str, name: str) -> Callable[..., Any]:
    """The function behind a name.

    Raises:
        StudyError: there is no such plug-in; the known ones are listed.
    """
    module, _, function = name.partition(":")
    if not function:
        if name not in names(kind):
            raise StudyError(f"{kind} has no {name!r}. {allowed(name, names(kind))}")
        module, function = f"concilium.{kind}.{name}", ENTRIES[kind] or name
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as e:  # the module is somebody else's, and runs as it is imported
        raise StudyError(
            f"{kind}: {name!r} cannot be loaded ({type(e).__name__}: {e}). Expected `module:function` of an installed module. "
            "Check the spelling, or install the module where the study runs."
        ) from e
    if not callable(found):
        raise StudyError(f"{kind}: {name!r} is a {type(found).__name__}. Expected a function. Name one.")
    return typing.cast(Callable[..., Any], found)


def options(kind: str, name: str) -> Mapping[str, inspect.Parameter]:
    """The options of a plug-in: its keyword-only parameters without those that Concilium supplies.

    Raises:
        StudyError: there is no such plug-in, or its parameters cannot be read.
    """
    function = load(kind, name)
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception as e:  # annotations are evaluated
        raise StudyError(
            f"{kind}: the parameters of {name!r} cannot be read ({type(e).__name__}: {e}). Expected a function of Python with "
            "annotations that its own module can evaluate. Correct them there."
        ) from e
    supplied = SUPPLIED.get(kind, frozenset())
    return {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in supplied}


def fill(
    kind: str, name: str, given: Mapping[str, Any], where: str, *, more: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The options of a plug-in with defaults filled in, and what is wrong with those given. `more`: what else is known there."""
    try:
        known = options(kind, name)
    except StudyError as e:
        return {}, [f"{where} name = {name!r} is not allowed: {e}"]
    problems = [
        f"{where} {key} = {value!r} is not known. {allowed(key, [*known, *more])}"
        for key, value in given.items()
        if key not in known
    ]
    filled: dict[str, Any] = {}
    for key, parameter in known.items():
        if key in given:
            try:
                filled[key] = coerce(given[key], parameter.annotation)
            except ValueError as e:
                problems.append(f"{where} {key} = {given[key]!r} is not allowed. {e}")
        elif parameter.default is parameter.empty:
            problems.append(f"{where} {key} is missing. {name} needs it ({spell(parameter.annotation)}). Add it.")
        else:
            filled[key] = parameter.default
    return filled, problems


def code_from_outside(name: str, given: Mapping[str, Any]) -> list[str]:
    """The code that a plug-in of this name with these options would import, and that does not come with Concilium."""
    trainer = str(given.get(TRAINER, ""))
    return [code for code in (name, "" if is_stock_trainer(trainer) else trainer) if ":" in code]


def is_stock_trainer(name: str) -> bool:
    """Whether `module:Class` is named among the trainers of the installed nnU-Net."""
    return name.startswith(STOCK_TRAINERS)


def allowed(given: str, known: Iterable[str]) -> str:
    """The sentence that follows an unknown name: the nearest known one, and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."


def coerce(value: Any, annotation: Any) -> Any:
    """The value from a TOML file as the annotated type.

    Raises:
        ValueError: it is not of that type; the text says what is allowed.
    """
    if annotation is inspect.Parameter.empty:
        annotation = UNANNOTATED
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, arguments, annotation)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(coerce(v, arguments[0]) for v in value)
    if origin is collections.abc.Mapping and isinstance(value, Mapping):
        return {str(key): coerce(v, arguments[1]) for key, v in value.items()}
    if annotation is float and type(value) in (int, float):
        return float(value)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if annotation is types.NoneType and value is None:
        return None
    if annotation in (int, str, bool) and type(value) is annotation:
        return value
    raise ValueError(f"Allowed: {spell(annotation)}.")


def _first_that_fits(value: Any, arguments: Iterable[Any], annotation: Any) -> Any:
    for argument in arguments:
        try:
            return coerce(value, argument)
        except ValueError:
            continue
    raise ValueError(f"Allowed: {spell(annotation)}.")


def spell(annotation: Any) -> str:
    """The annotation in words a user of a TOML file knows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(a) for a in arguments if a is not types.NoneType)
    if origin is tuple:
        return f"a list, each {spell(arguments[0])}"
    if origin is collections.abc.Mapping:
        return f"a table, each value {spell(arguments[1])}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return words.get(annotation, str(annotation))
