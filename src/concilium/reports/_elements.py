"""HTML as a tree, so that whatever a name or a message holds stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

Child: TypeAlias = "Element | str | Iterable[Child] | None"

MISSING = "–"
SHORT = 24
"""Letters that a table does not break into lines."""
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def e(tag: str, *children: Child, **attributes: object) -> Element:
    """An element; `class_` is `class`, other underscores in names of attributes are hyphens. `None` is left out."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set("viewBox" if name == "viewBox" else name.rstrip("_").replace("_", "-"), _clean(value))
    _add(made, children)
    return made


def _add(parent: Element, children: Iterable[Child]) -> None:
    for child in children:
        if isinstance(child, Element):
            parent.append(child)
        elif isinstance(child, str):
            if len(parent):
                parent[-1].tail = (parent[-1].tail or "") + _clean(child)
            else:
                parent.text = (parent.text or "") + _clean(child)
        elif child is not None:
            _add(parent, child)


def _clean(value: object) -> str:
    """The value as text without characters that no document may hold."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value))


def document(title: str, style: str, *body: Child) -> str:
    """A whole page that needs nothing from elsewhere."""
    head = e(
        "head",
        e("meta", charset="utf-8"),
        e("meta", name="viewport", content="width=device-width, initial-scale=1"),
        e("meta", name="color-scheme", content="light dark"),
        e("title", title),
        e("style", style),
    )
    return "<!doctype html>\n" + tostring(
        e("html", head, e("body", *body), lang="en"), encoding="unicode", method="html"
    )


def table(header: Sequence[Child], rows: Iterable[Sequence[Child]], *, caption: str = "", words: int = 1) -> Element:
    """A table that scrolls by itself where it is too wide; its first `words` columns are text, the others figures."""

    def kind(i: int, content: Child) -> str | None:
        return "n" if i >= words else "t" if isinstance(content, str) and len(content) <= SHORT else None

    def cell(i: int, content: Child) -> Element:
        content = MISSING if content is None else content
        return e("td" if i else "th", content, scope=None if i else "row", class_=kind(i, content))

    head = e("tr", [e("th", h, scope="col", class_=kind(i, h)) for i, h in enumerate(header)])
    body = e("tbody", [e("tr", [cell(i, c) for i, c in enumerate(row)]) for row in rows])
    made = e("table", e("caption", caption) if caption else None, e("thead", head), body)
    return e("div", made, class_="wide", tabindex="0")


def fold(title: str, *content: Child) -> Element:
    """Content that opens at a click."""
    return e("details", e("summary", title), *content)


def figure(content: Child, caption: Child) -> Element:
    """A figure with its caption."""
    return e("figure", content, e("figcaption", caption))


def listed(lines: Iterable[Child]) -> Element:
    """A list with a point per line."""
    return e("ul", [e("li", line) for line in lines])


# ------------------------------------------------------------------------------------------------------------- figures


def number(value: float | None, digits: int = 3) -> str:
    """The number with so many decimals, its minus a real one."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """The number with its sign."""
    return MISSING if value is None else f"{value:+.{digits}f}".replace("-", "−")


def amount(value: float | None) -> str:
    """The number with three significant digits."""
    if value is None:
        return MISSING
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 or value == 0 else 3
    return f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "−")


def size(n_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} GB"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def p_value(p: float | None) -> str:
    """A p-value as journals want it."""
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
