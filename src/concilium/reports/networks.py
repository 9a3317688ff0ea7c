"""What `concilium network` counted, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from concilium.network_sizes import PARTS, CutSizes, NetworkSizes, StageSizes

COUNTED = "GFLOPs: one image, one pass forward; a multiplication and an addition are two."
SENT = "MB: up from a site and down to it for one image in training, in float32."


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def parameters(networks: Sequence[NetworkSizes]) -> Grid:
    """A row per network and cut: parameters of front, body, tail and whole."""
    rows = [
        (n.name, _called(cut), *(f"{getattr(cut, p).parameters:,}" for p in PARTS), f"{n.whole.parameters:,}")
        for n in networks
        for cut in n.cuts
    ]
    rows += [(n.name, "cannot be cut", "", "", "", f"{n.whole.parameters:,}") for n in networks if not n.cuts]
    return Grid(f"Parameters ({_title(networks)})", ("network", "cut after", *PARTS, "whole"), tuple(rows))


def operations(networks: Sequence[NetworkSizes]) -> Grid:
    """A row per network and cut: operations of front, body, tail and whole, and what travels."""
    rows = [
        (
            n.name, cut.name, *(giga(getattr(cut, p).flops) for p in PARTS), giga(n.whole.flops),
            f"{cut.up / 1e6:.2f}", f"{cut.down / 1e6:.2f}",
        )
        for n in networks
        for cut in n.cuts
    ]  # fmt: skip
    rows += [(n.name, "", "", "", "", giga(n.whole.flops), "", "") for n in networks if not n.cuts]
    header = ("network", "cut", *PARTS, "whole", "MB up", "MB down")
    return Grid(f"GFLOPs ({_title(networks)})", header, tuple(rows), (COUNTED, SENT))


def by_stage(network: NetworkSizes) -> Grid:
    """A row per stage: its size, where the network may be cut, and what is on the stack after it."""
    rows = [
        (s.name, f"{s.size.parameters:,}", giga(s.size.flops), "yes" if s.split_point else _why_not(s), _stack(s))
        for s in network.stages
    ]
    whole = ("whole", f"{network.whole.parameters:,}", giga(network.whole.flops), "", "")
    note = "The stack: the lowest map first, channels × voxels. Of it only what later parts read crosses a cut."
    header = ("stage", "parameters", "GFLOPs", "cut after it", "stack after it")
    return Grid(f"{network.name} ({_title([network])})", header, (*rows, whole), (COUNTED, note))


def giga(flops: int) -> str:
    """Operations in thousands of millions, with three digits at least."""
    return f"{flops / 1e9:.3g}" if flops < 1e11 else f"{flops / 1e9:.0f}"


def _called(cut: CutSizes) -> str:
    """Its name, where it has one, and the stages."""
    after = ", ".join(cut.after)
    return after if cut.name == " ".join(cut.after) else f"{cut.name}: {after}"


def _title(networks: Sequence[NetworkSizes]) -> str:
    image, labels = networks[0].image, networks[0].n_labels
    size = "×".join(map(str, image[1:]))
    return f"{size}, {image[0]} channel{'s' if image[0] > 1 else ''}, {labels} labels"


def _why_not(stage: StageSizes) -> str:
    return "no: the image" if "image" in stage.kinds else "no"


def _stack(stage: StageSizes) -> str:
    told = {"features": "", "places": " places", "image": " image"}
    return " + ".join(
        "×".join(map(str, shape)) + told[kind]
        for shape, kind in zip(stage.stack, stage.kinds, strict=True)
        if shape[0] or kind != "features"
    )
