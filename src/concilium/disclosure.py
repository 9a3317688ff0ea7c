"""What may be said where the patients are others': how few are too few, and texts without small numbers, paths and names."""

from __future__ import annotations

import re
from collections.abc import Iterable

MIN_CASES = 5
"""A figure over fewer patients tells too much of each: at a site that tells averages, and in what a server shows of its sites."""


def count(n: int, least: int = MIN_CASES) -> str:
    """The number, unless it is small; none at all is no secret."""
    return f"fewer than {least}" if 0 < n < least else str(n)


def without_counts(text: str, least: int = MIN_CASES) -> str:
    """The text without small numbers of cases and patients."""

    def told(found: re.Match[str]) -> str:
        n, whole, noun = int(found[1]), found[2], found[3]
        if not 0 < n < least:
            return found[0]
        return f"fewer than {least}{' of the' if whole else ''} {noun}s"

    return re.sub(r"\b(\d+)( of \d+)? (case|patient)s?\b", told, text)


def without_paths(text: str) -> str:
    """The text on one line, without whatever looks like a path."""
    return re.sub(r"\S*[/\\]\S+", "[path]", " ".join(text.split()))


def without_names(text: str, names: Iterable[str]) -> str:
    """The text without paths, and without the names of cases and patients; bare numbers are no names."""
    long = sorted((n for n in names if not n.isdecimal()), key=len, reverse=True)
    text = without_paths(text)
    return re.sub("|".join(map(re.escape, long)), "[case]", text) if long else text
