"""Figures as inline SVG: text that scales, colours that follow the page. Each is 360 wide, to be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import numpy as np

from concilium.reports._elements import amount, e

WIDTH, RIGHT, TOP, BOTTOM = 360.0, 12.0, 26.0, 40.0
N_COLOURS = 6
NEUTRAL = -1
"""Number of a colour that no site has."""
MAX_POINTS = 200
"""Of a line; longer ones are thinned out."""
MAX_DOTS = 40
"""Of a box."""
MIN_BOX = 6
"""Fewer values are dots, and no box."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """One axis: the values at its ends, where they are drawn, and what it shows."""

    low: float
    high: float
    start: float
    end: float
    title: str
    log: bool = False

    def at(self, value: float) -> float:
        """Where the value is drawn; what is outside is drawn at the edge."""
        low, high, value = (_log(x) if self.log else x for x in (self.low, self.high, value))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values along the axis."""
        if self.log:
            return [10.0**k for k in range(math.ceil(_log(self.low) - 1e-9), math.floor(_log(self.high) + 1e-9) + 1)]
        return nice_ticks(self.low, self.high)


def _log(x: float) -> float:
    return math.log10(max(x, 1e-12))


def nice_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About `n` round values within [low, high]."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= n)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def curves(
    lines: Mapping[str, Points], *, title: str, x: str, y: str, colours: Mapping[str, int], span: Points
) -> Element:
    """Lines over a common axis.

    Args:
        lines: name -> points, ascending in x.
        colours: name -> number, the same in every figure.
        span: the points that the axes have to reach.
    """
    height = 230.0
    across = Axis(min(p[0] for p in span), _above([p[0] for p in span]), 44.0, WIDTH - RIGHT, x)
    up = Axis(*_padded([p[1] for p in span]), height - BOTTOM, TOP, y)
    drawn = []
    for name, points in lines.items():
        i = colours[name]
        at = [(across.at(a), up.at(b)) for a, b in _thinned(points)]
        if len(at) == 1:
            drawn.append(e("circle", cx=at[0][0], cy=at[0][1], r=2.5, class_=f"f{_class(i)}"))
        path = " ".join(f"{a},{b}" for a, b in at)
        dash = None if i < N_COLOURS else "6 3" if i < 2 * N_COLOURS else "2 2"
        drawn.append(e("polyline", e("title", name), points=path, class_=f"l s{_class(i)}", stroke_dasharray=dash))
    return _svg(height, title, _frame(across, up, title), drawn)


def boxes(
    groups: Mapping[str, Sequence[float]], *, title: str, x: str, low: float, high: float, strong: str
) -> Element:
    """A box per group, one below the other: median, quartiles, whiskers to 1.5 times their distance, and what is beyond.

    Args:
        strong: the group to be seen first.
    """
    row = 26.0
    height = TOP + row * len(groups) + BOTTOM
    across = Axis(low, high, 116.0, WIDTH - RIGHT, x)
    bottom = height - BOTTOM
    parts: list[Element] = _across(across, TOP, bottom)
    for i, (name, given) in enumerate(groups.items()):
        middle = TOP + row * (i + 0.5)
        parts.append(e("text", e("title", name), _short(name), x=108, y=middle + 4, class_="r"))
        if given:
            parts.append(_box(np.sort(np.asarray(given, float)), across, middle, name == strong))
    return _svg(height, title, [e("text", title, x=4, y=15, class_="h"), *parts], [])


def _box(values: np.ndarray[tuple[int], np.dtype[np.float64]], across: Axis, middle: float, strong: bool) -> Element:
    if len(values) < MIN_BOX:
        dots = [e("circle", cx=across.at(float(v)), cy=middle, r=3) for v in values]
        return e("g", dots, class_="box strong" if strong else "box")
    q1, q2, q3 = (float(q) for q in np.percentile(values, (25, 50, 75)))
    reach = 1.5 * (q3 - q1)
    inner = values[(values >= q1 - reach) & (values <= q3 + reach)]
    outer = [float(v) for v in values if v < inner[0] or v > inner[-1]]
    a, b, low, high = across.at(q1), across.at(q3), across.at(float(inner[0])), across.at(float(inner[-1]))
    dots = [e("circle", cx=across.at(v), cy=middle, r=2) for v in outer[:MAX_DOTS]]
    return e(
        "g",
        e("title", f"median {q2:.3f}, quartiles {q1:.3f} and {q3:.3f}, n = {len(values)}"),
        e("line", x1=low, x2=high, y1=middle, y2=middle),
        e("rect", x=a, y=middle - 7, width=max(b - a, 1.0), height=14),
        e("line", x1=across.at(q2), x2=across.at(q2), y1=middle - 7, y2=middle + 7, class_="m"),
        dots,
        class_="box strong" if strong else "box",
    )


def scatter(
    points: Mapping[str, Points], *, title: str, x: str, y: str, colours: Mapping[str, int], equal: bool = True
) -> Element:
    """Dots, by group; with `equal` both axes are alike and the line of equal values is drawn.

    Where values span more than a factor of 30, the axes are logarithmic, and zeros stand at the edge.
    """
    height = 330.0
    found = [v for group in points.values() for p in group for v in p]
    positive = sorted(v for v in found if v > 0)
    log = bool(positive) and positive[len(positive) * 95 // 100] > 30 * positive[len(positive) * 5 // 100]
    low, high = (positive[0] / 1.5, positive[-1] * 1.3) if log else (0.0, max([*found, 1e-9]) * 1.05)
    across = Axis(low, high, 60.0, WIDTH - RIGHT, x, log)
    up = Axis(low, high, height - BOTTOM, TOP, y, log)
    drawn = [e("line", x1=across.start, y1=up.start, x2=across.end, y2=up.end, class_="d")] if equal else []
    for name, group in points.items():
        dots = [e("circle", cx=across.at(a), cy=up.at(b), r=2.4) for a, b in group]
        drawn.append(e("g", e("title", name), dots, class_=f"dot f{_class(colours[name])}"))
    return _svg(height, title, _frame(across, up, title), drawn)


def _class(colour: int) -> int:
    return N_COLOURS if colour == NEUTRAL else colour % N_COLOURS


def legend(colours: Mapping[str, int], shown: Sequence[str]) -> Element:
    """Which colour stands for what."""
    return e(
        "p", [e("span", e("i", class_=f"b{_class(colours[n])}"), n) for n in colours if n in shown], class_="legend"
    )


# -------------------------------------------------------------------------------------------------------------- frames


def _svg(height: float, title: str, *parts: Sequence[Element]) -> Element:
    return e("svg", *parts, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", aria_label=title)


def _frame(across: Axis, up: Axis, title: str) -> list[Element]:
    """Title, grid and axes."""
    parts = [e("text", title, x=4, y=15, class_="h"), *_across(across, up.end, up.start)]
    for value in up.ticks():
        at = up.at(value)
        parts.append(e("line", x1=across.start, x2=across.end, y1=at, y2=at, class_="g"))
        parts.append(e("text", _tick(value), x=across.start - 5, y=at + 4, class_="r"))
    middle = (up.start + up.end) / 2
    parts.append(e("text", up.title, class_="c", transform=f"translate(11 {middle:.0f}) rotate(-90)"))
    return parts


def _across(axis: Axis, top: float, bottom: float) -> list[Element]:
    parts = []
    for value in axis.ticks():
        at = axis.at(value)
        parts.append(e("line", x1=at, x2=at, y1=top, y2=bottom, class_="g"))
        parts.append(e("text", _tick(value), x=at, y=bottom + 14, class_="c"))
    parts.append(e("line", x1=axis.start, x2=axis.end, y1=bottom, y2=bottom, class_="a"))
    parts.append(e("text", axis.title, x=(axis.start + axis.end) / 2, y=bottom + 31, class_="c"))
    return parts


def _tick(value: float) -> str:
    text = amount(value) if abs(value) >= 1000 else f"{value:.10g}"
    return text.replace("-", "−")


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def _above(values: Sequence[float]) -> float:
    return max(values) if max(values) > min(values) else min(values) + 1


def _thinned(points: Points) -> list[tuple[float, float]]:
    step = -(-len(points) // MAX_POINTS)
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _short(name: str) -> str:
    return name if len(name) <= 17 else name[:16] + "…"
