"""Sequences of the same patients at three institutes: what each is worth, and what it costs when they do not match.

    python benchmarks/vertical.py data/glioma --out data/glioma-parties
    concilium run studies/glioma-vertical.toml --out runs/glioma-vertical
    python benchmarks/vertical.py data/glioma --out data/glioma-mixed --mix FLAIR --study studies/glioma-vertical.toml
    concilium run data/glioma-mixed/study.toml --out runs/glioma-mixed
    python benchmarks/vertical.py --out data/sequences        # a phantom whose lesions need two sequences
    concilium run studies/two-sequences.toml --out runs/two-sequences

The first command lays `glioma` out as three folders, one for each sequence, of the patients of all its institutions (links, no
copies); the institute with the T1 images has the label maps. `--leave` holds an institution out: its patients are the test set.
`--mix` gives one sequence's images to other patients, at the institute only: what happens where identifiers
do not mean the same. `--study` writes that study beside the data, on them and without its variants.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from concilium.data.phantom_sequences import write_sequences
from concilium.study import read_study, to_toml

SEQUENCES = ("T1", "FLAIR", "T1ce")
INSTITUTIONS = ("du", "ht", "cs", "fg")
LABELS_AT = "T1"
ENDING = ".png"


def lay_out(data: Path, out: Path, *, leave: str | None, mix: str | None, seed: int = 0) -> None:
    """Write the three folders, and `test` with all sequences."""
    shutil.rmtree(out, ignore_errors=True)
    training = {name: _cases(data / name) for name in INSTITUTIONS if name != leave}
    patients = {case: patient for of in training.values() for case, patient in of.items()}
    at = {case: name for name, of in training.items() for case in of}
    for sequence in SEQUENCES:
        shown = dict(zip(patients, _mixed(patients, seed) if sequence == mix else patients, strict=True))
        for case, other in shown.items():
            place = SEQUENCES.index(sequence)
            source = data / at[other] / "imagesTr" / f"{other}_{place:04d}{ENDING}"
            _link(source, out / sequence / "imagesTr" / f"{case}_0000{ENDING}")
            if sequence == LABELS_AT:
                _link(data / at[case] / "labelsTr" / f"{case}{ENDING}", out / sequence / "labelsTr" / f"{case}{ENDING}")
        _describe(out / sequence, [sequence], patients)
    held_out = data / (leave or "test")
    for folder in ("imagesTr", "labelsTr"):
        for path in sorted((held_out / folder).iterdir()):
            _link(path, out / "test" / folder / path.name)
    _describe(out / "test", SEQUENCES, _cases(held_out))


def _cases(folder: Path) -> dict[str, str]:
    """Case -> patient."""
    found: dict[str, str] = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["patient"]
    return found


def _mixed(patients: Mapping[str, str], seed: int) -> list[str]:
    """The cases in another order, none where a case of the same patient was."""
    rng, order = random.Random(seed), list(patients)
    while any(patients[a] == patients[b] for a, b in zip(patients, order, strict=True)):
        rng.shuffle(order)
        for i, (a, b) in enumerate(zip(patients, order, strict=True)):
            if patients[a] == patients[b]:
                j = rng.randrange(len(order))
                order[i], order[j] = order[j], order[i]
    return order


def _describe(folder: Path, channels: Sequence[str], patients: Mapping[str, str]) -> None:
    about: dict[str, Any] = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": len(patients),
        "file_ending": ENDING,
        "patient": dict(patients),
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(source.resolve(), target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Lay the data out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, nargs="?", help="the federation glioma; omitted: a phantom")
    parser.add_argument("--out", type=Path, required=True, help="folder for the institutes; replaced")
    parser.add_argument("--leave", choices=INSTITUTIONS, help="institution whose patients become the test set")
    parser.add_argument("--mix", choices=SEQUENCES, help="sequence whose images go to other patients")
    parser.add_argument("--study", type=Path, help="study to write beside the data, without its variants")
    given = parser.parse_args(arguments)
    if given.data is None:
        write_sequences(given.out, n_cases=30, n_test=10)
    else:
        lay_out(given.data, given.out, leave=given.leave, mix=given.mix)
    if given.study is not None:
        study = read_study(given.study, check_data=False)
        sites = {
            n: replace(site, data=given.out.resolve() / str(site.data and site.data.name))
            for n, site in study.sites.items()
        }
        test = replace(study.test, data=given.out.resolve() / "test") if study.test else None
        (given.out / "study.toml").write_text(
            to_toml(replace(study, sites=sites, test=test, variants={})), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
