"""Score label maps that lie in a folder against references: what `concilium evaluate` does. No model, no study."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.answers.evaluate import score_labels
from concilium.data.dataset import Case, Dataset, pixel_size, read_case, reader
from concilium.data.labels import IGNORE, Labels
from concilium.errors import ContractError, DataError
from concilium.messages import PlugIn
from concilium.results import METRICS, SCALES, score_row
from concilium.statistics import FOREGROUND_MEAN, summarize

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif")
"""Of label maps, where no dataset.json says it."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of label maps against references."""

    cases: tuple[dict[str, Any], ...]
    """One per case and label, as in results.json: case, patient, label, status, unit, metrics, volumes, lesions."""
    summary: tuple[dict[str, Any], ...]
    """One per label and metric: mean over patients, 95 % interval, and how many."""
    problems: tuple[tuple[str, str], ...]
    """Cases that are not scored, with the reason."""
    warnings: tuple[tuple[str, str], ...]
    """Cases that are scored, with what should be looked at."""


@dataclass(frozen=True)
class _About:
    """What is known of the maps. `labels` is empty where no dataset.json names them, `ignored` the id that does not count."""

    labels: Labels
    ignored: int | None
    ending: str
    patients: Mapping[str, str]


def evaluate(
    predictions: Path,
    reference: Path,
    *,
    labels: Path | None = None,
    tolerance: float = 1.0,
    watch: Callable[[str, int, int], None] = lambda *_: None,
) -> Evaluation:
    """Dice, IoU, HD95, NSD, volumes and lesions of every case that both folders hold, for each label.

    Args:
        predictions: folder of label maps, named CASE.ENDING.
        reference: folder of label maps of the same names, such as an nnU-Net data set's labelsTr.
        labels: dataset.json that names the labels (regions and `ignore` included) and the file ending; omitted: that in
            either folder or beside labelsTr; without any, every id found is a label.
        tolerance: of the surface Dice [mm, or px where the spacing is unknown].
        watch: is told each case, its number and how many there are.

    Raises:
        DataError: a folder is missing, holds no label map, or no case is in both; the dataset.json cannot be used.
    """
    about = _describe(predictions, reference, labels)
    predicted, expected = (_maps(folder, about.ending) for folder in (predictions, reference))
    common = sorted(predicted.keys() & expected.keys())
    if not common:
        raise DataError(
            f"{predictions} and {reference} have no case in common ({len(predicted)} and {len(expected)} label maps that end "
            f"in {about.ending}). A prediction has the name of its reference. Rename the files."
        )
    problems = [(case, f"{reference} has no label map of this case.") for case in predicted.keys() - expected.keys()]
    problems += [(case, f"{predictions} has no label map of this case.") for case in expected.keys() - predicted.keys()]
    rows: list[dict[str, Any]] = []
    warnings: list[tuple[str, str]] = []
    for number, case in enumerate(common, 1):
        watch(case, number, len(common))
        try:
            found, notes = _score(case, predicted[case], expected[case], about, tolerance)
        except (ContractError, DataError) as e:
            problems.append((case, str(e)))
            continue
        rows += found
        warnings += [(case, note) for note in notes]
    one = {"model": "", "site": "", "subset": ""}
    summary = [{k: v for k, v in s.items() if k not in one} for s in summarize([one | row for row in rows], SCALES)]
    return Evaluation(tuple(rows), tuple(summary), tuple(sorted(problems)), tuple(warnings))


def write_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Write cases, summary, problems and warnings as JSON; as a table of the cases where the name ends in .csv."""
    if file.suffix.lower() == ".csv":
        text = io.StringIO()
        table = csv.DictWriter(text, list(evaluation.cases[0]) if evaluation.cases else ["case"], lineterminator="\n")
        table.writeheader()
        table.writerows(evaluation.cases)
        content = text.getvalue()
    else:
        said: dict[str, Any] = {"cases": evaluation.cases, "summary": evaluation.summary}
        said |= {
            name: [{"case": case, "text": text} for case, text in getattr(evaluation, name)]
            for name in ("problems", "warnings")
        }
        content = json.dumps(said, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")


def mean_table(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """A heading, and a row of text for each label: means, how many cases, and how many lesions."""
    units = ", ".join(sorted({row["unit"] for row in evaluation.cases}))
    lesions = ("lesions_found", "lesions_missed", "lesions_false")
    counted = ("cases", "HD95 undefined", *(name.replace("_", " ") for name in lesions))
    table = [("label", "Dice", "IoU", f"HD95 [{units}]", "NSD", *counted)]
    means = {(s["label"], s["metric"]): s for s in evaluation.summary}
    for label in dict.fromkeys(s["label"] for s in evaluation.summary):
        found = [means[label, metric]["mean"] for metric in METRICS]
        numbers = [means[label, "hd95"][key] for key in ("n_cases", "n_undefined")]
        rows = [row for row in evaluation.cases if label in (row["label"], FOREGROUND_MEAN)]
        numbers += [sum(row[name] for row in rows) for name in lesions]
        table.append((label, *("–" if mean is None else f"{mean:.3f}" for mean in found), *map(str, numbers)))
    return table


# ------------------------------------------------------------------------------------------------------------ one case


def _score(
    case: str, prediction: Path, reference: Path, about: _About, tolerance: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one case, and what should be looked at."""
    predicted, of_prediction, _ = _read(prediction, about.ending)
    expected, of_reference, spacing = _read(reference, about.ending)
    if predicted.shape != expected.shape:
        raise DataError(
            f"The prediction has {predicted.shape} voxels, the reference {expected.shape}. Both must be equal. Resample the "
            "prediction to the grid of the reference."
        )
    ids = {int(i) for m in (predicted, expected) for i in np.unique(m) if i == int(i)} - {0, about.ignored}
    labels = about.labels or {str(i): i for i in sorted(ids)}
    unnamed = ids - {i for value in labels.values() for i in (value if isinstance(value, tuple) else (value,))}
    if unnamed:
        raise DataError(
            f"Its label maps hold {sorted(unnamed)}. dataset.json names {', '.join(f'{k} = {v}' for k, v in labels.items())}. "
            "Correct one of them."
        )
    known = labels if about.ignored is None else {**labels, IGNORE: about.ignored}
    metrics = [PlugIn(m, {"tolerance": tolerance} if m == "nsd" else {}) for m in METRICS]
    scores = score_labels(predicted, expected, spacing, known, metrics, case=0, patient=0)
    row = {"case": case, "patient": about.patients.get(case, case)}
    return [row | score_row(s) for s in scores], _differences(of_prediction, of_reference)


def _read(path: Path, ending: str) -> tuple[NDArray[np.float32], dict[str, Any], tuple[float, ...] | None]:
    """Ids (X, Y, Z), the reader's properties, and the spacing [mm] where the file tells it."""
    name = path.name[: -len(ending)]
    about = Dataset(path.parent, ("ids",), {}, ending, (), ())  # an image of one channel, whose values are ids
    case = Case(name, (path,), None, name)
    ids, _, properties = read_case(case, about)
    return ids[0], properties, pixel_size(case, about, properties)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two maps of the same shape lie in space, as far as it differs."""
    a, b = (p.get("sitk_stuff", {"spacing": p["spacing"]}) for p in (one, other))
    differ = [key for key in a if not np.allclose(a[key], b[key], rtol=1e-3, atol=1e-3)]
    if not differ:
        return []
    return [f"Prediction and reference differ in {', '.join(differ)}; voxels are compared one by one, and distances are in "
            "the reference's spacing."]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- what is there


def _maps(folder: Path, ending: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Expected one with label maps, CASE{ending}. Check the path.")
    found = (p for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))
    return {p.name[: -len(ending)]: p for p in found}


def _describe(predictions: Path, reference: Path, labels: Path | None) -> _About:
    places = [folder / "dataset.json" for folder in (predictions, reference, reference.resolve().parent)]
    file = labels or next((p for p in places if p.is_file()), None)
    if file is None:
        return _About({}, None, _common_ending(reference), {})
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        named = {str(k): tuple(v) if isinstance(v, list) else v for k, v in said["labels"].items()}
        ending = str(said.get("file_ending") or _common_ending(reference))
        patients = {str(k): str(v) for k, v in said.get("patient", {}).items()}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as e:
        raise DataError(
            f"{file} cannot be used ({e!r}). Expected a dataset.json with a table of labels. Repair it."
        ) from e
    for name, value in named.items():
        if not _are_ids(value if isinstance(value, tuple) else (value,)):
            raise DataError(f"{file}: label {name} is {value!r}. Allowed is an id, or a list of ids. Correct it.")
    reader(ending)
    ignored = named.pop("ignore", None)
    if isinstance(ignored, tuple):
        raise DataError(f"{file}: label ignore is {ignored!r}. Allowed is one id. Correct it.")
    return _About(named, ignored, ending, patients)


def _are_ids(values: Iterable[object]) -> bool:
    values = list(values)
    return bool(values) and all(type(v) is int and v >= 0 for v in values)


def _common_ending(folder: Path) -> str:
    """The ending of most files of a folder, among those that label maps have."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    counts = {ending: sum(name.endswith(ending) for name in names) for ending in ENDINGS}
    ending = max(counts, key=lambda e: counts[e])
    if not counts[ending]:
        raise DataError(
            f"{folder} holds no label map. Expected CASE{ENDINGS[0]} or another of {', '.join(ENDINGS)}. Check the path."
        )
    return ending
