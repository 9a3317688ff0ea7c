"""leakage.json: what an audit found, by `leakage.schema.json`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from concilium import __version__
from concilium.leakage.audit import ALL_CHANNELS, Attack, Row
from concilium.leakage.subject import Subject

VERSION = 1
CAUTION = "An attack that finds little proves nothing: another may find more. Figures hold for these attacks, cases and settings."


def write_leakage(
    folder: Path, subject: Subject, attacks: Sequence[Attack], rows: Sequence[Row], notes: Sequence[str]
) -> dict[str, Any]:
    """Write the file; what stands in it."""
    found = {
        "version": VERSION,
        "concilium": __version__,
        "study": subject.study.study.name,
        "model": subject.name,
        "seed": subject.study.study.seed,
        "victims": sorted(subject.sites),
        "n_own_cases": len(subject.attacker.entries["training"]),
        "attacks": [
            {"name": a.name, "sees": sees, "guesses": guesses, "who": who, "options": dict(a.options)}
            for a in attacks
            for sees, guesses, who in [a.about]
        ],
        "rows": list(rows),
        "notes": [*notes, CAUTION],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "leakage.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def depth_of(rows: Sequence[Row]) -> list[str]:
    """A sentence for each attack that was run at four cuts or more: how its SSIM falls with the depth of the cut.

    Of several maps at a cut the last counts, which the stage before the cut made.
    """
    series: dict[tuple[str, int, str], dict[str, float]] = defaultdict(dict)
    channels = {r["channel"] for r in rows}
    for r in rows:
        whole = ALL_CHANNELS in channels
        first = r["cut"].partition(" ")[0]
        if r["metric"] == "ssim" and r["map"].partition(".")[0] == first and (r["channel"] == ALL_CHANNELS) == whole:
            series[r["attack"], r["round"], r["channel"]][r["cut"]] = r["value"]
    told = []
    for (attack, number, _), by_cut in series.items():
        if len(by_cut) > 3:
            rank = float(spearmanr(range(len(by_cut)), list(by_cut.values())).statistic)
            values = ", ".join(f"{value:.2f}" for value in by_cut.values())
            told.append(
                f"{attack}, round {number}: SSIM from the shallowest cut to the deepest {values}; Spearman {rank:.2f}."
            )
    return told
