"""What `concilium plan` found, as tables and sentences for the terminal, and as JSON. It tells of each site alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from concilium.advice import OF_PARTIES, Planned
from concilium.forecast import Cost
from concilium.reports._elements import duration, size
from concilium.suitability import Outline, View, runs, spell


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def grids(planned: Planned) -> tuple[Grid, ...]:
    """What the sites have, what plans they would get, what the joint plan does to them, and what training would cost; for a
    terminal of 80 columns."""
    costs = (_times(planned), _machines(planned)) if planned.costs else ()
    return (_images(planned), _plans(planned), _effects(planned), *costs)


def lines(planned: Planned) -> Iterator[tuple[str, str]]:
    """Style of rich, text: the advice, then what else should be known."""
    yield "bold", planned.advice.headline
    yield from (("", f"  {reason}") for reason in planned.advice.reasons)
    yield from (("", note) for note in planned.advice.notes)
    yield from (("yellow", f"Warning: {text}") for text in planned.warnings)
    yield from (("yellow", f"Excluded: {x['site']}, case {x['case']}: {x['text']}") for x in planned.excluded)
    yield from (("red", f"Not as asked: {text}") for text in planned.problems)


def rows(planned: Planned) -> list[dict[str, Any]]:
    """A row per site; of its own plan, where it has one, what is compared."""
    of_site = ("n_cases", "shape", "spacing", "anisotropy", "factor", "voxels", "covered", "filled", "shared")
    of_plan = ("patch_size", "batch_size", "kernels", "strides")
    return [
        {"site": name} | {key: getattr(v, key) for key in of_site} | {key: getattr(v.own, key, None) for key in of_plan}
        for name, v in planned.sites.items()
    ]


def to_json(planned: Planned) -> str:
    """Everything, for a program."""
    table = asdict(planned)
    for name, view in planned.sites.items():
        table["sites"][name] |= {"anisotropy": view.anisotropy, "voxels": view.voxels}
    return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _images(planned: Planned) -> Grid:
    joint = planned.joint
    across = "×".join(joint.axes)
    named = len(planned.channels) > 1
    rows = [
        (
            name, str(v.n_cases), numbers(v.shape), numbers(v.spacing), f"{v.anisotropy:.3g}",
            _ranges(v.ranges, planned.channels if named else (), held_only=planned.advice == OF_PARTIES),
        )
        for name, v in planned.sites.items()
    ]  # fmt: skip
    own = max(joint.spacing) / min(joint.spacing)
    ranges = _ranges(joint.ranges, planned.channels if named else ())
    rows.append(("joint plan", str(planned.n_cases), numbers(joint.size), numbers(joint.spacing), f"{own:.3g}", ranges))
    header = ("site", "cases", f"{across} [voxels]", "spacing [mm]", "anisotropy", "intensities")
    note = "Medians of the cases, cropped to what is not zero. Intensities: from 0.5 to 99.5 % of the foreground"
    clipped = [c for c, clips in zip(planned.channels, joint.clips, strict=True) if clips]
    how = f"; the joint plan clips {', '.join(clipped)} to its range." if clipped else ", and only for information."
    return Grid(f"Images ({planned.configuration})", header, tuple(rows), (note + how,))


def _plans(planned: Planned) -> Grid:
    def row(name: str, plan: Outline | None, shared: float | None) -> tuple[str, ...]:
        if plan is None:
            return (name, *["–"] * 6)
        share = "" if shared is None else f"{shared:.0%}"
        patch = "×".join(map(str, plan.patch_size))
        return (
            name, patch, str(plan.batch_size), str(len(plan.strides)), runs(plan.kernels), runs(plan.strides[1:]), share
        )  # fmt: skip

    alone = {} if planned.advice == OF_PARTIES else planned.sites
    rows = [row("joint plan", planned.joint, None)]
    rows += [row(f"{name} alone", v.own, v.shared) for name, v in alone.items()]
    notes = ["Strides: from the second stage on."]
    if alone:
        notes.append("Shared: of the parameters, those that a run by own plans would average.")
    notes += [f"{name} has no plan of its own: {v.why_not}" for name, v in alone.items() if v.own is None]
    header = ("plan", "patch", "batch", "stages", "kernels", "strides", "shared")
    return Grid("Plans", header, tuple(rows), tuple(notes))


def _effects(planned: Planned) -> Grid:
    rows = [(name, _factors(v), _voxels(v), f"{v.covered:.0%}", f"{v.filled:.0%}") for name, v in planned.sites.items()]
    across = "×".join(planned.joint.axes)
    header = ("site", f"voxels along {across}", "voxels in all", "patch covers", "image fills")
    note = (
        "Of the median image: how much of it one patch covers, and how much of a patch it fills (the rest is padding)."
    )
    return Grid("What the joint plan does to a site's images", header, tuple(rows), (note,))


def _factors(view: View) -> str:
    return " ".join(f"×{f:.2f}" for f in view.factor)


def _voxels(view: View) -> str:
    """What becomes of all voxels; within 1 %, nothing."""
    if abs(view.voxels - 1) < 0.01:
        return "as they are"
    change = f"{1 - 1 / view.voxels:.0%} interpolated" if view.voxels > 1 else f"{1 - view.voxels:.0%} lost"
    return f"×{view.voxels:.2f}, {change}"


def _ranges(ranges: Sequence[tuple[float, float] | None], channels: Sequence[str], *, held_only: bool = False) -> str:
    if held_only:  # a party tells of its own channels
        channels = [name for name, r in zip(channels, ranges, strict=True) if r is not None]
        return "\n".join(f"{name} {spell(r)}" for name, r in zip(channels, filter(None, ranges), strict=True))
    told = ["no foreground" if r is None else spell(r) for r in ranges]
    if len(set(told)) == 1:
        return told[0]
    return "\n".join(f"{name} {text}" for name, text in zip(channels, told, strict=True))


def _times(planned: Planned) -> Grid:
    """A row for each way to train, of the site that it costs most."""
    told = planned.hardware

    def machine(gflops: float | None) -> str:
        return "as this one" if gflops is None else f"{gflops:g} GFLOP/s"

    title = (
        f"What training would cost: links of {told.mbit:g} Mbit/s and {told.ms:g} ms, sites "
        f"{machine(told.site_gflops)}, server "
        f"{machine(told.server_gflops)}"
    )
    rows = [
        (
            _way(cost), cost.transport if cost.cut else "", *(size(_most(cost, key)) for key in ("up", "down")),
            duration(cost.seconds), duration(cost.rounds * cost.seconds),
        )
        for cost in planned.costs
    ]  # fmt: skip
    note = "Sent and received in a round by the site that it costs most; the time of a round and of all, the link included."
    if any(cost.name for cost in planned.costs):
        note += " Variants of the study come last, by their names."
    header = ("way", "maps as", "sent", "received", "a round", "all rounds")
    return Grid(title, header, tuple(rows), (note,))


def _machines(planned: Planned) -> Grid:
    """The same of what the machines do, which does not depend on how maps travel, and of what travels outside of rounds."""
    ways = {_way(cost): cost for cost in reversed(planned.costs)}
    rows = [
        (
            way, size(_most(cost, "memory")), size(cost.server_memory),
            duration(_most(cost, "seconds")), duration(cost.server_seconds),
            size(max((s.besides_up + s.besides_down for s in cost.sites.values()), default=0)),
        )
        for way, cost in reversed(ways.items())
    ]  # fmt: skip
    note = (
        "Memory of tensors, to which that of libraries comes; and what is computed in a round, at the site that it costs most "
        "and at the server for all. Besides: what that site sends and receives outside of rounds in the whole run (validation, "
        "the finished model, scoring), maps as float32."
    )
    header = ("way", "memory at a site", "at the server", "computing at a site", "at the server", "besides")
    return Grid("What machines it needs", header, tuple(rows), (note,))


def _way(cost: Cost) -> str:
    return cost.name or " ".join(part for part in (cost.protocol, cost.variant, *cost.cut) if part)


def _most(cost: Cost, key: str) -> float:
    return max((getattr(site, key) for site in cost.sites.values()), default=0.0)


def numbers(values: Sequence[float]) -> str:
    """`40×56×40`, `1×0.8×2.5`."""
    return "×".join(f"{v:.3g}" for v in values)
