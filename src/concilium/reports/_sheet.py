"""A document of sections, tables and lists, as HTML and as Markdown. What it is made of is text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
from xml.etree.ElementTree import Element

from concilium.reports._elements import Child, document, e, listed, table

CLAIM = re.compile(r"\w*anonym\w*", re.IGNORECASE)
"""What no dossier says, whatever a study calls its sites: nothing here makes data of patients into anything else."""
INSTEAD = "[word left out]"

STYLE = """
main { max-width: 940px; }
td { overflow-wrap: anywhere; }
.wide table { width: 100%; }
.t { white-space: normal; }
table.sign td { height: 2.6em; min-width: 9em; }
@media print { section { break-before: page; } section:first-of-type { break-before: auto; } tbody th { position: static; } }
"""


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    figures: int = 0
    """How many of the last columns are figures."""
    kind: str = ""


@dataclass(frozen=True)
class Lines:
    """A list with a point for each line."""

    lines: Sequence[str]


Content: TypeAlias = "str | Grid | Lines"


@dataclass(frozen=True)
class Part:
    """A section with its heading. A plain text is a paragraph."""

    title: str
    content: Sequence[Content]


def without_claims(text: str) -> str:
    """The text without a word that a study may call its sites by, and that would claim too much."""
    return CLAIM.sub(INSTEAD, text)


def to_html(title: str, over: str, parts: Sequence[Part], style: str) -> str:
    """One page that needs nothing else."""
    links = [e("a", part.title, href=f"#{_slug(part.title)}") for part in parts]
    sections = [e("section", e("h2", p.title), *map(_element, p.content), id=_slug(p.title)) for p in parts]
    closing = e("footer", e("p", "Made by Concilium. Research software, not a medical device."))
    header = e("header", e("p", over, class_="over"), e("h1", title))
    body = e("main", header, e("nav", links), *sections, closing)
    return without_claims(document(f"{title}: dossier", style + STYLE, body))


def to_markdown(title: str, over: str, parts: Sequence[Part]) -> str:
    """The same as Markdown."""
    blocks = [f"# {_flat(title)}", _flat(over)]
    for part in parts:
        blocks.append(f"## {_flat(part.title)}")
        blocks += [_block(content) for content in part.content]
    return without_claims("\n\n".join(blocks) + "\n")


def _slug(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _element(content: Content) -> Element:
    if isinstance(content, str):
        return e("p", _coded(content))
    if isinstance(content, Lines):
        return listed(content.lines)
    rows: list[list[Child]] = [list(row) for row in content.rows]
    made = table(list(content.header), rows, caption=content.caption, words=len(content.header) - content.figures)
    if content.kind:
        made[0].set("class", content.kind)
    return made


def _coded(text: str) -> list[Child]:
    """The text with what stands between backticks as code, as Markdown has it."""
    return [e("code", part) if i % 2 else part for i, part in enumerate(text.split("`"))]


def _flat(text: str) -> str:
    return " ".join(text.split())


def _block(content: Content) -> str:
    if isinstance(content, str):
        return _flat(content)
    if isinstance(content, Lines):
        return "\n".join(f"- {_flat(line)}" for line in content.lines)
    n = len(content.header)
    rule = ["---"] * (n - content.figures) + ["---:"] * content.figures
    rows = [content.header, rule, *content.rows]
    lines = [f"| {' | '.join(_flat(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(([f"**{_flat(content.caption)}**", ""] if content.caption else []) + lines)
