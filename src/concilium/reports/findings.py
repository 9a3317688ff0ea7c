"""What `concilium check` found, as lines for the terminal and as JSON: by data set, the gravest first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from concilium.data.check import Checked, Finding

STYLES = {"error": "red", "warning": "yellow", "note": "dim"}
Line = tuple[str, str]
"""Style of rich, text."""


def lines(checked: Checked, *, most: int = 20) -> Iterator[Line]:
    """A paragraph per data set; of each kind of finding at most `most` cases are named, and the others counted.

    What is said of all, or of more than two of them, in the same words stands once, in a paragraph of its own.
    """
    together = _together(checked)
    divided = [f.site for f in checked.findings if f.site not in checked.cases]  # cases are listed at the parts
    for site in dict.fromkeys([*divided, *checked.cases]):
        own = [f for f in checked.findings if f.site == site]
        n_cases = f"{_count(checked.cases[site], 'case')}. " if site in checked.cases else ""
        yield "bold", f"{site}: {n_cases}{_totals(own)}"
        yield from _groups([f for f in own if _said(f) not in together], most)
        yield "", ""
    for sites in dict.fromkeys(together.values()):
        yield "bold", "All of them:" if len(sites) == len(checked.cases) else f"{', '.join(sites)}:"
        first = [f for f in checked.findings if f.site == sites[0] and together.get(_said(f)) == sites]
        yield from _groups(first, most)
        yield "", ""
    whole = f"{_count(len(checked.cases), 'data set')}, {_count(sum(checked.cases.values()), 'case')}"
    yield "bold", f"{whole}. {_totals(checked.findings)}"
    n_safe = sum(f.safe for f in checked.findings)
    if n_safe and not checked.changes:
        yield "", f"--fix OUT mends {n_safe:,} of them, in copies of the data."


def _said(f: Finding) -> tuple[str, str, str]:
    return f.code, f.text, f.fix


def _together(checked: Checked) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """What is said of all data sets, or of more than two, and of which."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for f in checked.findings:
        if f.case is None and f.site in checked.cases:
            said.setdefault(_said(f), []).append(f.site)
    enough = min(3, max(2, len(checked.cases)))
    return {key: tuple(sites) for key, sites in said.items() if len(sites) >= enough}


def fixed(out: Path, n: int) -> str:
    """What became of `--fix`."""
    if not n:
        return f"Nothing can be mended safely: {out} is not written."
    return f"{_count(n, 'change')} in copies: {out}. {out / 'FIXES.txt'} lists them. What was checked is as it was."


def to_json(checked: Checked) -> str:
    """All findings; the cases' names are in it, so it stays at the site."""
    told = ("severity", "code", "site", "case", "text", "fix", "safe")
    found = [{key: getattr(f, key) for key in told} for f in checked.findings]
    return json.dumps({"cases": dict(checked.cases), "findings": found}, indent=2, ensure_ascii=False) + "\n"


def _groups(findings: Sequence[Finding], most: int) -> Iterator[Line]:
    """Findings of one kind with one remedy together."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for f in findings:
        groups.setdefault((f.severity, f.code, f.fix), []).append(f)
    for (severity, code, fix), group in groups.items():
        n_cases = len({f.case for f in group if f.case is not None})
        yield STYLES[severity], f"  {severity}: {code}" + (f", {_count(n_cases, 'case')}" if n_cases else "")
        yield from (("", f"    {text}") for text in _texts(group, most))
        yield "", f"    → {fix}{_safe(group)}"


def _safe(group: Sequence[Finding]) -> str:
    n = sum(f.safe for f in group)
    return "" if not n else " (--fix does it.)" if n == len(group) else f" (--fix does it for {n:,} of {len(group):,}.)"


def _texts(group: Sequence[Finding], most: int) -> Iterator[str]:
    """Each text with the case it is about; one that several cases share stands once, before their names."""
    shared: dict[str, list[str]] = {}
    for f in group:
        shared.setdefault(f.text, []).extend([] if f.case is None else [f.case])
    left = most
    for i, (text, cases) in enumerate(shared.items()):
        if left <= 0:
            yield f"and {len(shared) - i:,} more"
            return
        names = ", ".join(cases[:left]) + (f" and {len(cases) - left:,} more" if len(cases) > left else "")
        left -= max(1, len(cases))
        yield f"{names}: {text}" if len(cases) == 1 else f"{text} In {names}." if cases else text


def _totals(findings: Sequence[Finding]) -> str:
    n = {s: sum(f.severity == s for f in findings) for s in ("error", "warning", "note")}
    return ", ".join(_count(k, s) for s, k in n.items() if k) + "." if findings else "Nothing found."


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
