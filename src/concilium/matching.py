"""Which tensors of a network others of the same name and shape can take the place of, and what to say where they cannot."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from concilium.errors import DataError, StudyError
from concilium.messages import Tensors
from concilium.optimization import all_finite

PREFIXES = ("_orig_mod.", "module.")
"""Before a name, from torch.compile and DistributedDataParallel; ignored."""
_SHOWN = 5
Refit: TypeAlias = Callable[[str, Tensor, torch.Size], Tensor | None]


@dataclass
class Matched:
    """What fits, and what does not."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    other_shape: dict[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    """Name -> shape there, shape here."""
    refitted: dict[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    """Of `weights`, those that were made to fit: name -> shape there, shape here."""
    unused: list[str] = field(default_factory=list)
    fraction: float = 0.0
    """Of the values of this network, heads not counted, which may have other labels, nor what was added and is not there."""


def match(
    fresh: Tensors,
    there: Tensors,
    elsewhere: Mapping[str, str],
    file: Path,
    *,
    refit: Refit | None = None,
    added: Callable[[str], bool] | None = None,
) -> Matched:
    """Tensors of the same name and shape, in the type that they have here.

    Args:
        fresh: the network's.
        there: those of the file, in which `elsewhere` tells our name of some.
        file: where they are, for errors.
        refit: what of our name, a tensor and a shape gives the tensor in this shape, where it depends on the size of images.
        added: whether a tensor of this name was added to the network that the file is of, and so cannot be there.

    Raises:
        DataError: a tensor that fits is not finite, or two that are one here differ.
    """
    found, given = Matched(), _by_our_names(fresh, there, elsewhere, file)
    for name, new in fresh.items():
        old = given.pop(name, None)
        if old is None:
            found.missing.append(name)
            continue
        shapes, alike = (old.shape, new.shape), old.is_floating_point() == new.is_floating_point()
        fits = refit(name, old.to(new), new.shape) if refit and alike and old.shape != new.shape else None
        if fits is not None:
            old, found.refitted[name] = fits, shapes
        if old.shape != new.shape or not alike:
            found.other_shape[name] = shapes
        else:
            found.weights[name] = old.to(new.dtype, copy=True).contiguous()
            if not all_finite([found.weights[name]]):
                raise DataError(
                    f"{name} in {file} is not finite. Expected numbers. Give weights that were trained well."
                )
    found.unused = list(given)
    own = [n for n in fresh if n in found.weights or added is None or not added(n)]
    body = {name: fresh[name].numel() for name in own if not name.startswith("head")}
    found.fraction = sum(n for name, n in body.items() if name in found.weights) / max(1, sum(body.values()))
    return found


def _by_our_names(fresh: Tensors, there: Tensors, elsewhere: Mapping[str, str], file: Path) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    for key, tensor in there.items():
        name = key
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        name = name if name in fresh else elsewhere.get(name, name)
        other = given.setdefault(name, tensor)
        if other is not tensor and not (other.shape == tensor.shape and torch.equal(other, tensor)):
            raise DataError(
                f"{file} holds two tensors for {name}, one of them {key}, which differ. Expected equal ones. Save it again."
            )
    return given


def as_table(file: Path, digest: str, matched: Matched, fresh: Tensors) -> dict[str, Any]:
    """How the weights were matched, as it stands in the run folder."""
    return {
        "file": str(file),
        "sha256": digest,
        "fraction": round(matched.fraction, 6),
        "tensors": len(fresh),
        "matched": list(matched.weights),
        "missing": matched.missing,
        "other_shape": _shapes(matched.other_shape),
        "refitted": _shapes(matched.refitted),
        "unused": matched.unused,
    }


def _shapes(found: Mapping[str, tuple[torch.Size, torch.Size]]) -> list[dict[str, Any]]:
    return [{"name": name, "there": list(there), "here": list(here)} for name, (there, here) in found.items()]


def note_of(table: Mapping[str, Any]) -> str:
    """The same in a line."""
    new = [*table["missing"], *(f"{e['name']} ({_shape(e['there'])} there)" for e in table["other_shape"])]
    text = f"Starting from {table['file']}: {len(table['matched'])} of {table['tensors']} tensors"
    refitted = [
        f"{e['name']} ({_shape(e['there'])} there, {_shape(e['here'])} here)" for e in table.get("refitted", ())
    ]
    text += f"; interpolated from another size: {_first(refitted)}" if refitted else ""
    text += f"; drawn anew: {_first(new)}" if new else ""
    if "licence" not in table:
        return text
    licence = table["licence"] or "not told there; look where it came from"
    return f"{text} (SHA-256 {table['sha256'][:12]}..., licence: {licence})"


def require(matched: Matched, least: float, *, fresh: Tensors, file: Path) -> None:
    """Raise StudyError, which says what does not fit, where less than the share `least` of the network matches."""
    if matched.fraction >= least:
        return

    def nearest(name: str) -> str:
        near = difflib.get_close_matches(name, matched.unused, n=1, cutoff=0.4)
        return f"{name} {_shape(fresh[name].shape)}" + (f" (nearest there: {near[0]})" if near else "")

    shapes = [f"{n} {_shape(there)} instead of {_shape(here)}" for n, (there, here) in matched.other_shape.items()]
    found = {
        "not there": list(map(nearest, matched.missing[:_SHOWN])) + matched.missing[_SHOWN:],
        "of another shape": shapes,
    }
    why = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in found.items() if names)
    raise StudyError(
        f"[network] weights: {len(matched.weights)} of {len(fresh)} tensors fit from {file}, {matched.fraction:.0%} of the "
        f"network's values before its heads ({why}). At least {least:.0%} must. Give weights of this network and plan, or a "
        "lower min_matched."
    )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "single"
