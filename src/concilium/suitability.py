"""Whether one plan suits all sites, or plans of their own: a small rule on what is known of the sites before anything trains.

One plan from the merged fingerprint is what usually wins: where Skorupko et al. 2025 (arXiv:2503.02549) compared it with a plan
per site ("asymmetric", of which only tensors of equal name and shape are averaged), it was better at nearly every centre, most of
all at the smallest and oddest. So own plans are named only where the joint one does a site visible harm (the constants below say
what that is) and the site has cases enough to plan by. Nothing here has been measured on outcomes: it is a hint, not a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

SPACING = 2.0
"""Largest ratio between a site's spacing and the joint plan's along an axis. Beyond it more than half of what the network sees
along that axis is made up by interpolation, or more than half of what the scanner saw is thrown away."""
COVERED = 0.25
"""Smallest share of a site's median image that a patch of the joint plan may cover: nnU-Net itself then adds a configuration of
low resolution. It counts only where a patch of the site's own plan covers more than that."""
FILLED = 0.25
"""Smallest share of a patch of the joint plan that a site's median image may fill: the rest, three quarters, is padding."""
STAGES = 2
"""Smallest difference in the number of resolutions that counts. One more may come from a single voxel at an edge of nnU-Net's
rule; two need images that differ by more than a factor of two."""
RANGE = 0.5
"""Smallest overlap (intersection over union) of a site's intensities, 0.5 to 99.5 %, with the joint range, where intensities are
clipped to that range (CT). Other images are normalised one by one."""
FEW = 10
"""Fewer cases are too few to plan by: a plan follows medians, and those of so few move with every case. A rule of thumb."""

Axes = tuple[float, ...]


@dataclass(frozen=True)
class Outline:
    """What a plan says, as far as plans are compared; along its own axes."""

    axes: tuple[str, ...]
    """The plan's axes, by their name in the file."""
    patch_size: tuple[int, ...]
    """[voxels]."""
    batch_size: int
    spacing: Axes
    """[mm]."""
    size: Axes
    """Of the median image, resampled [voxels]."""
    kernels: tuple[tuple[int, ...], ...]
    """Of each stage, per axis."""
    strides: tuple[tuple[int, ...], ...]
    clips: tuple[bool, ...]
    """Of each channel: whether intensities are clipped to a range of all cases together (CT)."""
    ranges: tuple[tuple[float, float] | None, ...]
    """Of each channel: from 0.5 to 99.5 % of the foreground; `None` without any."""
    resizes: bool = False
    """Whether every image is brought to one size: spacing then has no say."""

    @property
    def covered(self) -> float:
        """The share of the plan's own median image that a patch covers."""
        return _share(self.patch_size, self.size)


@dataclass(frozen=True)
class View:
    """A site beside the joint plan, along that plan's axes."""

    n_cases: int
    shape: Axes
    """Of the median image, cropped to what is not zero [voxels]."""
    spacing: Axes
    """Median [mm]."""
    factor: Axes
    """By how much the joint plan multiplies the voxels along each axis."""
    covered: float
    """The share of the site's median image, resampled, that a patch of the joint plan covers."""
    filled: float
    """The share of such a patch that the image fills."""
    ranges: tuple[tuple[float, float] | None, ...]
    own: Outline | None
    """The plan that the site's data alone would give."""
    why_not: str = ""
    """Why there is none."""
    differs: bool = False
    """Whether its own plan gives another network than the joint one."""
    shared: float | None = None
    """The share of its own network's parameters that a run by own plans would average with another site's."""

    @property
    def anisotropy(self) -> float:
        """The largest spacing over the smallest."""
        return max(self.spacing) / min(self.spacing)

    @property
    def voxels(self) -> float:
        """By how much the joint plan multiplies all voxels."""
        return float(np.prod(self.factor))


@dataclass(frozen=True)
class Ground:
    """One way in which a site does not fit the joint plan."""

    site: str
    kind: Literal["spacing", "kernels", "stages", "covered", "filled", "range"]
    text: str


@dataclass(frozen=True)
class Advice:
    """What the rule says."""

    suits: Literal["one", "asymmetric"]
    sites: tuple[str, ...]
    """Those that a plan of their own may suit."""
    headline: str
    reasons: tuple[str, ...]
    """A sentence for each of these sites."""
    grounds: tuple[Ground, ...]
    """All, of sites with too few cases too."""
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The advice with its reasons."""
        return " ".join([self.headline, *self.reasons])


def advise(joint: Outline, sites: Mapping[str, View]) -> Advice:
    """The rule, on all sites of a study."""
    grounds = tuple(chain.from_iterable(_grounds(name, view, joint) for name, view in sites.items()))
    odd = tuple(dict.fromkeys(g.site for g in grounds))
    few = {name: text for name, view in sites.items() if (text := _too_few(view))}
    chosen = tuple(name for name in odd if name not in few)
    notes = [f"{name} {text}." for name, text in few.items()]
    notes += [
        note for name, view in sites.items() if name not in (*odd, *few) for note in _difference(view, joint, name)
    ]
    notes += _turned(joint, sites)
    if not chosen:
        return Advice("one", (), _one(joint, sites, grounds), (), grounds, tuple(notes))
    reasons = [
        f"{name}: {'; '.join(g.text for g in grounds if g.site == name)}{_kept(sites[name])}." for name in chosen
    ]
    headline = f"Asymmetric plans may suit, for {', '.join(chosen)}."
    return Advice("asymmetric", chosen, headline, tuple(reasons), grounds, tuple(notes))


def _one(joint: Outline, sites: Mapping[str, View], grounds: Sequence[Ground]) -> str:
    """Why one plan suits."""
    if grounds:
        found = "; ".join(f"{g.site}: {g.text}" for g in grounds)
        return f"One plan suits: no site that differs from it should have one of its own ({found})."
    if joint.resizes:
        return "One plan suits: every image is brought to one size, so that all sites have the same patch and network."
    ratios = [max(a / b, b / a) for v in sites.values() for a, b in zip(v.spacing, joint.spacing, strict=True)]
    far = f"within {max(ratios):.3g} times" if max(ratios) > 1 else "equal to"
    return (
        f"One plan suits: every site's spacing is {far} that of the joint plan (allowed here: {SPACING:g} times), and its "
        "patch fits the images of all."
    )


# --------------------------------------------------------------------------------------------------------------- one site


def _grounds(name: str, view: View, joint: Outline) -> list[Ground]:
    found = [
        Ground(name, "spacing", f"its spacing along {axis} is {own:.3g} mm, the joint plan's {planned:.3g} mm")
        for axis, own, planned in zip(joint.axes, view.spacing, joint.spacing, strict=True)
        if max(own / planned, planned / own) > SPACING and not joint.resizes
    ]
    own = view.own
    if own is not None and view.differs:
        if _differ(own, joint):
            text = f"its own kernels are {runs(own.kernels)}, the joint plan's {runs(joint.kernels)}"
            found.append(Ground(name, "kernels", text))
        if abs(len(own.strides) - len(joint.strides)) >= STAGES:
            text = f"its own plan has {len(own.strides)} stages, the joint one {len(joint.strides)}"
            found.append(Ground(name, "stages", text))
    if view.covered < COVERED and own is not None and own.covered > COVERED:
        text = f"a patch of the joint plan covers {view.covered:.0%} of its images, one of its own {own.covered:.0%}"
        found.append(Ground(name, "covered", text))
    if view.filled < FILLED:
        found.append(Ground(name, "filled", f"its images fill {view.filled:.0%} of a patch of the joint plan"))
    for one, of_all, clips in zip(view.ranges, joint.ranges, joint.clips, strict=True):
        if clips and one is not None and of_all is not None and overlap(one, of_all) < RANGE:
            text = f"its intensities are {spell(one)}, and are clipped to {spell(of_all)} (is the unit the same?)"
            found.append(Ground(name, "range", text))
    return found


def _too_few(view: View) -> str:
    """Why a site is not to have a plan of its own; empty if it may."""
    if view.own is None:
        return f"cannot have a plan of its own ({view.why_not})"
    return (
        f"has {view.n_cases} cases, fewer than the {FEW} that a plan of its own should rest on"
        if view.n_cases < FEW
        else ""
    )


def _kept(view: View) -> str:
    return "" if view.shared is None else f"; by own plans it would share {view.shared:.0%} of its parameters"


def _difference(view: View, joint: Outline, name: str) -> list[str]:
    """What would differ at a site that gives no ground."""
    own = view.own
    if own is None or not view.differs:
        return []
    depth = f"{len(own.strides)} stages for {len(joint.strides)}" if len(own.strides) != len(joint.strides) else ""
    return [f"{name}'s own plan would have {depth or 'other strides'}; that alone is no ground."]


def _turned(joint: Outline, sites: Mapping[str, View]) -> list[str]:
    """Own plans that take the axes in another order: tensors of equal name and shape then lie along other axes."""
    turned = [name for name, view in sites.items() if view.own is not None and view.own.axes != joint.axes]
    if not turned:
        return []
    order = "×".join(joint.axes)
    return [
        f"Own plans of {', '.join(turned)} take the axes in another order than {order}: tensors of equal name and shape would "
        "lie along other axes there, and should not be averaged."
    ]


def _differ(own: Outline, joint: Outline) -> bool:
    """Whether a stage that both have has another kernel, along the axes of the file."""

    def in_file(plan: Outline) -> list[dict[str, int]]:
        return [dict(zip(plan.axes, kernel, strict=True)) for kernel in plan.kernels]

    return any(a != b for a, b in zip(in_file(own), in_file(joint), strict=False))


def _share(part: Sequence[float], whole: Sequence[float]) -> float:
    return float(np.prod([min(1.0, p / max(w, 1)) for p, w in zip(part, whole, strict=True)]))


def view_of(  # noqa: PLR0913  (all that is known of a site)
    joint: Outline,
    *,
    n_cases: int,
    shape: Axes,
    spacing: Axes,
    ranges: tuple[tuple[float, float] | None, ...],
    own: Outline | None,
    why_not: str = "",
    differs: bool = False,
    shared: float | None = None,
) -> View:
    """A site beside the joint plan."""
    mm = spacing if joint.resizes else joint.spacing
    there = tuple(max(1.0, n * s / m) for n, s, m in zip(shape, spacing, mm, strict=True))
    there = tuple(map(float, joint.patch_size)) if joint.resizes else there
    factor = tuple(b / n for b, n in zip(there, shape, strict=True))
    covered, filled = _share(joint.patch_size, there), _share(there, joint.patch_size)
    return View(n_cases, shape, spacing, factor, covered, filled, ranges, own, why_not, differs, shared)


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Intersection over union of two ranges."""
    both = min(a[1], b[1]) - max(a[0], b[0])
    either = max(a[1], b[1]) - min(a[0], b[0])
    return max(0.0, both) / either if either > 0 else 1.0


# ------------------------------------------------------------------------------------------------------------------ words


def spell(values: tuple[float, float]) -> str:
    """A range, as `-150 to 240`."""
    return " to ".join(f"{v:.3g}" if abs(v) < 100 else f"{v:.0f}" for v in values)


def runs(stages: Sequence[Sequence[int]]) -> str:
    """What each stage has, equal ones in a row together: `1×3×3, then 4 of 3×3×3`."""
    counted: list[tuple[str, int]] = []
    for stage in stages:
        text = "×".join(map(str, stage))
        n = counted.pop()[1] if counted and counted[-1][0] == text else 0
        counted.append((text, n + 1))
    return ", ".join(text if n == 1 else f"{n} of {text}" for text, n in counted)
