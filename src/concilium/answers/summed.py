"""Which sums a site has helped to unmask: of a round one, however often it is taken.

A site trains to the same bits when a round is taken again. Of two sums of one round over different sites, the difference would
tell the update of the site that is in the one and not in the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from concilium.errors import PrivacyError


def note_sum(path: Path, model: str, number: int, survivors: Sequence[str]) -> None:
    """Note in this file, which outlives the site's process, that a sum is unmasked.

    Raises:
        PrivacyError: one of the same round over other sites was.
    """
    noted: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    key = f"{model}/{number}"
    before = noted.setdefault(key, sorted(survivors))
    if before != sorted(survivors):
        raise PrivacyError(
            f"A sum of {', '.join(sorted(survivors))} was to be unmasked in round {number} of {model}. One of "
            f"{', '.join(before)} was before: the two differ by single updates. Take the round again with these sites, or begin "
            "another run.",
            rule="unmask",
        )
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(noted), encoding="utf-8")
    unfinished.replace(path)
