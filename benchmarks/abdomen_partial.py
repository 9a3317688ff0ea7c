"""Sites that each drew other organs, scored on one held-out set: the data for `studies/abdomen-partial.toml`, and its table.

    python benchmarks/abdomen_partial.py data/abdomen_partial --out data/abdomen_partial/test
    concilium run studies/abdomen-partial.toml --out runs/abdomen-partial
    python benchmarks/abdomen_partial.py --table runs/abdomen-partial

The first lays out one test set of several (folders that begin with `test_`), of which each was searched for some structures only:
links to their files, one numbering of all labels, and `annotated` for each case, so that a structure is scored in the cases in
which it was looked for. The last prints mean Dice per structure with a 95 % interval and the number of patients. A model that
stays at its site (`local:liver`) has figures for the structures of that site alone: of the others it learnt nothing.

More methods are more variants of the study; the table has a line for each model that it finds in the run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ABOUT = {
    "federated": "one network, marginal loss (FedAdamW)",
    "unweighted": "one network, marginal loss (FedAdamW), sites count equally",
    "exclusion": "one network, marginal loss with exclusion",
    "naive": "one network, what nobody drew is background",
    "heads": "shared body, each site's own heads (SegViz)",
    "plain": "one network, marginal loss, AdamW of each site's own",
    "condistfl": "one network, conditional distillation (ConDistFL)",
    "local": "each site alone, marginal loss",
}
"""What the models of such a study are; others stand under their own name."""
COMMON = ("channel_names", "labels", "file_ending")
"""What must be the same in all test sets."""


def lay_out(sets: Sequence[Path], out: Path) -> dict[str, int]:
    """One raw folder with links to the cases of all, and for each what was looked for; how many cases each set gave.

    Raises:
        ValueError: no set, `out` is not empty, or they differ in channels, labels or format, or hold a case of the same name.
    """
    if not sets:
        raise ValueError(
            "There are 0 test sets. Expected folders that begin with test_. Give the folder that holds them."
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty. Expected a folder that is not there yet. Give another --out.")
    about = [json.loads((folder / "dataset.json").read_text(encoding="utf-8")) for folder in sets]
    joint: dict[str, Any] = {key: about[0][key] for key in COMMON}
    for folder, one in zip(sets, about, strict=True):
        for key in (key for key in COMMON if one[key] != joint[key]):
            raise ValueError(
                f"{folder} has {key} {one[key]}, the first set {joint[key]}. Expected the same. Correct one."
            )
    joint |= {"numTraining": 0, "patient": {}, "annotated": {}}
    counts = {}
    for folder, one in zip(sets, about, strict=True):
        cases = _link(folder, out, str(joint["file_ending"]))
        every = [label for label in joint["labels"] if label != "background"]
        joint["patient"] |= {case: one.get("patient", {}).get(case, case) for case in cases}
        joint["annotated"] |= {case: _annotated(one, case, every) for case in cases}
        joint["numTraining"] += len(cases)
        counts[folder.name] = len(cases)
    (out / "dataset.json").write_text(json.dumps(joint, indent=1) + "\n", encoding="utf-8")
    return counts


def _link(folder: Path, out: Path, ending: str) -> list[str]:
    """Link the files of a set; its cases."""
    for kind in ("imagesTr", "labelsTr"):
        (out / kind).mkdir(parents=True, exist_ok=True)
        for file in sorted((folder / kind).iterdir()):
            link = out / kind / file.name
            if link.is_symlink():
                raise ValueError(f"{file.name} is in two test sets. Expected names that differ. Rename one.")
            link.symlink_to(file.resolve())
    return [file.name.removesuffix(ending) for file in sorted((folder / "labelsTr").iterdir())]


def _annotated(about: Mapping[str, Any], case: str, every: Sequence[str]) -> list[str]:
    told = about.get("annotated", every)
    return list(told.get(case, every) if isinstance(told, Mapping) else told)


# ------------------------------------------------------------------------------------------------------------------ table


def table(run: Path) -> str:
    """Mean Dice on the test set: a row per model, a column per structure, as Markdown."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    study = tomllib.loads((run / "study.toml").read_text(encoding="utf-8"))
    rows = [s for s in results["summary"] if (s["subset"], s["metric"]) == ("test", "dice")]
    drawn = {name: _drawn(Path(site["data"])) for name, site in study["sites"].items()}
    structures = sorted({label for labels in drawn.values() for label in labels})
    cells = {(s["model"], s["label"]): s for s in rows}
    lines = [f"| model | {' | '.join(structures)} |", "|---" * (len(structures) + 1) + "|"]
    models = list(dict.fromkeys(s["model"] for s in rows))
    staying = {model.partition(":")[0] for model in models if ":" in model}
    for model in (
        m for m in models if m not in staying
    ):  # not the mean over models of which some never learnt a structure
        name, _, site = model.partition(":")
        known = drawn[site] if site else set(structures)
        figures = [_figure(cells.get((model, label)) if label in known else None) for label in structures]
        lines.append(f"| {model}: {ABOUT.get(name, name)} | {' | '.join(figures)} |")
    return "\n".join([*lines, *(f"\nNot as asked: {problem}" for problem in results["problems"])])


def _drawn(site: Path) -> set[str]:
    """The structures that were looked for in some case of a site."""
    about = json.loads((site / "dataset.json").read_text(encoding="utf-8"))
    every = [label for label in about["labels"] if label != "background"]
    told = about.get("annotated", every)
    return {label for labels in (told.values() if isinstance(told, Mapping) else [told]) for label in labels}


def _figure(summary: Mapping[str, Any] | None) -> str:
    if summary is None or summary["mean"] is None:
        return "–"
    ends = "" if summary["ci_low"] is None else f" [{summary['ci_low']:.2f}, {summary['ci_high']:.2f}]"
    return f"{summary['mean']:.3f}{ends}, n = {summary['n']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Lay out the test set, or print a run's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder that holds the test sets")
    parser.add_argument("--out", type=Path, help="folder to write the test set into; not within this repository")
    parser.add_argument("--table", type=Path, metavar="RUN", help="print the table of this run instead")
    given = parser.parse_args(arguments)
    if given.table:
        sys.stdout.write(table(given.table) + "\n")
    elif given.data and given.out:
        for name, n in lay_out(sorted(given.data.glob("test_*")), given.out).items():
            sys.stdout.write(f"{name}: {n} cases\n")
    else:
        parser.error("Give DATA and --out, or --table RUN.")


if __name__ == "__main__":
    main()
