"""Label spaces: what the ids of a label map stand for.

Labels are a mapping from name to id, as in nnU-Net's `dataset.json`: `background` is 0, `ignore` (where there is one) the
highest, and voxels with it are neither learnt from nor scored. A region is several ids, and may overlap others; the first of
its ids is the one that a predicted label map holds where this region, and none after it, was found (nnU-Net keeps these in
`regions_class_order`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from concilium.messages import Labels

__all__ = [
    "Labels",
    "all_ids",
    "annotation_mask",
    "flaw",
    "foreground",
    "from_nnunet",
    "has_regions",
    "ids_of",
    "ignored",
    "n_heads",
    "silenced",
    "to_nnunet",
    "unknown_ids",
    "unknown_labels",
]
NEVER = -1e4
"""A logit that is never chosen, and that half precision can hold."""
BACKGROUND, IGNORE = "background", "ignore"


def foreground(labels: Labels) -> dict[str, tuple[int, ...]]:
    """The ids of every label or region that is learnt and scored: all but `background` and `ignore`."""
    return {name: ids_of(value) for name, value in labels.items() if name not in (BACKGROUND, IGNORE)}


def has_regions(labels: Labels) -> bool:
    """Whether any label is made of several ids; then every one is learnt for itself, by a sigmoid."""
    return any(isinstance(value, tuple) for value in labels.values())


def ignored(labels: Labels) -> int | None:
    """The id of voxels that take no part, or None."""
    value = labels.get(IGNORE)
    return value if isinstance(value, int) else None


def looked_for(labels: Labels, annotated: Sequence[str] | None) -> tuple[str, ...]:
    """What was looked for; `None`: all labels."""
    return tuple(foreground(labels)) if annotated is None else tuple(annotated)


def annotation_mask(labels: Labels, annotated: Sequence[str]) -> tuple[bool, ...]:
    """For each channel of the logits whether its label or region was looked for; the background where anything was."""
    mask = tuple(name in annotated for name in foreground(labels))
    return mask if has_regions(labels) else (any(mask), *mask)


def unknown_ids(labels: Labels, annotated: Sequence[str]) -> tuple[int, ...]:
    """The ids that stand for nothing that was looked for: voxels with them may be anything."""
    known = {i for name, ids in foreground(labels).items() if name in annotated for i in ids}
    return tuple(i for ids in foreground(labels).values() for i in ids if i not in known)


def unknown_labels(labels: Labels, annotated: Iterable[Sequence[str] | None]) -> tuple[str, ...]:
    """The labels that were looked for in none of these cases (`None`: all were, in that case)."""
    known: set[str] = set()
    for one in annotated:
        if one is None:
            return ()
        known |= set(one)
    return tuple(name for name in foreground(labels) if name not in known)


def silenced(logits: Tensor, labels: Labels, names: Sequence[str]) -> Tensor:
    """Logits (L, ...) in which these labels or regions never win. Finite, since logits are interpolated afterwards."""
    if not names:
        return logits
    mask = torch.tensor([not on for on in annotation_mask(labels, [n for n in foreground(labels) if n not in names])])
    if not has_regions(labels):
        mask[0] = False
    logits = logits.clone()
    logits[mask] = NEVER
    return logits


def all_ids(labels: Labels) -> tuple[int, ...]:
    """Every id that a label map may hold, ascending."""
    return tuple(sorted({i for value in labels.values() for i in ids_of(value)}))


def n_heads(labels: Labels) -> int:
    """Channels of a network's logits: one for each region, or one for each label and the background."""
    n = len(foreground(labels))
    return n if has_regions(labels) else n + 1


def with_labels(plan: Mapping[str, Any], labels: Labels) -> dict[str, Any]:
    """A configuration of the plan with what networks are told of labels beside their number: whether they are regions."""
    return {**plan, "regions": has_regions(labels)}


def to_nnunet(labels: Labels) -> dict[str, Any]:
    """`labels`, and where there are regions `regions_class_order`, as in nnU-Net's `dataset.json`."""
    table: dict[str, Any] = {"labels": {n: sorted(v) if isinstance(v, tuple) else v for n, v in labels.items()}}
    if has_regions(labels):
        table["regions_class_order"] = [ids[0] for ids in foreground(labels).values()]
    return table


def from_nnunet(table: Mapping[str, Any]) -> Labels:
    """The labels of a `dataset.json`.

    Raises:
        ValueError: they cannot be used; the text is what to do.
    """
    given = table.get("labels")
    if not isinstance(given, dict) or len(given) < 2:
        raise ValueError("Write it so")
    labels = {name: _value(value) for name, value in given.items()}
    if has_regions(labels):
        labels = _ordered(labels, table.get("regions_class_order"))
    else:
        labels = dict(sorted(labels.items(), key=lambda item: ids_of(item[1])))
    if problem := flaw(labels):
        raise ValueError(problem)
    return labels


def flaw(labels: Labels) -> str | None:
    """What to do about labels that cannot be used, or None."""
    ids: list[Any] = [i for value in labels.values() for i in ids_of(value)]
    if any(type(i) is not int or i < 0 for i in ids) or not all(ids_of(value) for value in labels.values()):
        return "Number the labels so, in the label maps too"
    if labels.get(BACKGROUND) != 0:
        return "Call label 0 background"
    if ids.count(0) > 1 or any(len(set(ids_of(v))) < len(ids_of(v)) for v in labels.values()):
        return "Take 0 out of the regions, and name each id once in each"
    if not foreground(labels):
        return "Name a label beside background and ignore"
    if IGNORE in labels and (
        isinstance(labels[IGNORE], tuple) or labels[IGNORE] != max(ids) or ids.count(max(ids)) > 1
    ):
        return "Give ignore one id, above all others"
    if sorted(set(ids)) != list(range(len(set(ids)))) or (not has_regions(labels) and len(ids) > len(set(ids))):
        return "Number the labels so, in the label maps too"
    return _hidden(labels)


def _value(value: Any) -> Any:
    """A list of ids as a tuple; of one id as that id, which nnU-Net takes for the same."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def _ordered(labels: dict[str, Any], order: Any) -> dict[str, Any]:
    """Each region with the id first that `regions_class_order` gives it."""
    named = [name for name in labels if name not in (BACKGROUND, IGNORE)]
    if not isinstance(order, list) or len(order) != len(named):
        raise ValueError(f"Regions need regions_class_order, one id for each of {', '.join(named)}: add it")
    for name, first in zip(named, order, strict=True):
        ids = ids_of(labels[name])
        if type(first) is not int or first not in ids:
            raise ValueError(f"Correct regions_class_order: {first!r} is no id of {name}")
        labels[name] = labels[name] if isinstance(labels[name], int) else (first, *(i for i in ids if i != first))
    return labels


def _hidden(labels: Labels) -> str | None:
    """What to do about a region that a later one covers wherever it is found."""
    regions = list(foreground(labels).items()) if has_regions(labels) else []
    for place, (name, ids) in enumerate(regions):
        for later, others in regions[place + 1 :]:
            if set(ids) <= set(others) and others[0] not in ids:
                return f"Name {later} before {name}, which it holds: later regions are drawn over earlier ones"
    return None


def ids_of(value: Any) -> tuple[Any, ...]:
    """The id, or the ids of a region, as a tuple."""
    return value if isinstance(value, tuple) else (value,)
