"""One of several sites with half of its masks moved elsewhere: test Dice with it, without it, and with rules that weigh sites.

    python benchmarks/corrupted_masks.py --study studies/corrupted-masks.toml --site a

The site's folder is copied into the run's, and every second label map is moved there by half of the image along both last axes.
One run then trains `mean`, `quality` (sites judge each other's updates) and `agreement` on the same folds with that site, another
`mean` without it. Target: weighting by quality comes within 0.02 of the run without the site.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import concilium
from concilium.data.dataset import open_dataset, reader

TARGET = 0.02
RULES: Mapping[str, Mapping[str, Any]] = {
    "quality": {"aggregation": {"name": "quality"}, "collect": {"name": "judged"}},
    "agreement": {"aggregation": {"name": "agreement"}},
}


def corrupt(folder: Path, out: Path) -> int:
    """Copy a raw folder, and move every second label map; how many were moved."""
    shutil.copytree(folder, out)
    dataset = open_dataset(out)
    labels = [case.label for case in dataset.cases[::2] if case.label is not None]
    for path in labels:
        io = reader(dataset.file_ending)()
        label, properties = io.read_seg(str(path))
        shift = [n // 2 for n in label.shape[-2:]]
        io.write_seg(np.roll(label[0], shift, axis=(-2, -1)), str(path), properties)
    return len(labels)


def measure(study: Mapping[str, Any], site: str, folder: Path, *, seeds: int) -> dict[str, Any]:
    """Mean test Dice of each way by seed, and which share of its weight the site kept in the last round."""
    wrong = folder / "data" / site
    print(f"{corrupt(Path(study['sites'][site]['data']), wrong)} label maps of {site} moved", flush=True)
    others = {name: table for name, table in study["sites"].items() if name != site}
    runs = {
        "with": {**study, "sites": {**others, site: {"data": str(wrong)}}, "variants": RULES},
        "without": {**study, "sites": others},
    }
    found: dict[str, dict[int, list[float]]] = {}
    for name, each in runs.items():
        results = concilium.run(each, folder / name, seeds=seeds).results
        for row in results["cases"]:
            if row["subset"] == "test" and row["dice"] is not None:
                way = row["model"] if row["model"] in RULES else f"mean, {name} {site}"
                found.setdefault(way, {}).setdefault(row["seed"], []).append(row["dice"])
    dice = {way: [statistics.fmean(of[seed]) for seed in sorted(of)] for way, of in found.items()}
    return {
        "dice": dice,
        "lost": {way: statistics.fmean(dice[f"mean, without {site}"]) - statistics.fmean(d) for way, d in dice.items()},
    }


def absolute(path: Path) -> dict[str, Any]:
    """The study of a file, with the places of its data in full."""
    study = tomllib.loads(path.read_text(encoding="utf-8"))
    for table in (*study["sites"].values(), *([study["test"]] if "test" in study else [])):
        table["data"] = str((path.parent / table["data"]).resolve())
    return study


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="Study file of three sites or more, with a test set.")
    parser.add_argument("--site", required=True, help="The site whose masks are moved.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="Where the runs go; omitted: a temporary folder.")
    parser.add_argument("--out", type=Path, help="JSON file for the figures.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(absolute(given.study), given.site, given.folder or Path(temporary), seeds=given.seeds)
    print(f"{'test Dice':<28} {'mean':>7} {'lost':>7}")
    for way, values in found["dice"].items():
        print(f"{way:<28} {statistics.fmean(values):7.4f} {found['lost'][way]:7.4f}   {[round(v, 4) for v in values]}")
    print(f"target: quality loses at most {TARGET}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
