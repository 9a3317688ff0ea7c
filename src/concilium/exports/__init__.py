"""A finished model for other programs. One file here: one format, `export(finished, out, *, card, intended_use) -> str`.

    export(finished: Finished, out: Path, *, card: str, intended_use: str) -> str

It writes into `out`, an empty folder, and returns the command that comes next, where need be with more to know on lines of their
own; `{out}` in it stands for the folder. `finished` may have several members (one per fold): all of them go in, and what is
written averages their logits. `card` is the model card (Markdown), written from the run's record; `export_run` puts it into
`out` as MODEL_CARD.md. Formats carry no path, no case and no patient. A model that a format cannot hold is refused with a
`StudyError` that names the formats that can.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from concilium import catalog
from concilium.data.labels import to_nnunet
from concilium.defences import described
from concilium.errors import DataError, StudyError
from concilium.exports._model_card import model_card
from concilium.finished import Finished, finished_models, open_finished
from concilium.study import SiteTable, Study, read_study

NOT_STATED = "Not stated."


def export_run(
    run: Path,
    out: Path,
    *,
    format: str,
    model: str | None = None,
    intended_use: str | None = None,
    fold: bool = False,
) -> tuple[Path, str]:
    """Write a model of a run into a new folder, with its model card; the folder, and the command that comes next.

    Args:
        out: does not exist, or is empty.
        format: one of the files in this folder.
        model: as in results.json; omitted: the study's own protocol.
        intended_use: what the model is for: a text, or a text file. All else in the card comes from the record.
        fold: without what was added to the network to be trained (low rank), in whose place other weights have changed.

    Raises:
        StudyError: no finished run, no such model or format, a folder in use, or a model that the format cannot hold.
    """
    if format not in catalog.names("exports"):
        raise StudyError(
            f"Format {format!r} is not known. {catalog.allowed(format, catalog.names('exports'))} Choose one with --format."
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise StudyError(f"{out} is not empty. Expected a new folder for the export. Give another -o.")
    finished = _open(run, model)
    if finished.unknown:
        raise StudyError(
            f"{finished.name} never learnt {', '.join(finished.unknown)}: no site whose cases its last layers saw looked for "
            "that. Exported, it would draw that all the same. Export a model of all labels, or use concilium predict."
        )
    _refuse_defences(finished, format)
    finished = finished.folded() if fold else finished
    purpose = _intended_use(intended_use)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        card = model_card(finished, _results(run), intended_use=purpose)
        after = catalog.load("exports", format)(finished, unfinished, card=card, intended_use=purpose)
        (unfinished / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return out, str(after).replace("{out}", str(out))


def members(finished: Finished) -> dict[int, str]:
    """Fold -> the name its files bear, such as `model` where there is one member, `model_0`, `model_1`, ... where several are."""
    n = len(finished.files)
    fold = finished.study.validation.fold
    return {fold if isinstance(fold, int) else 0: "model"} if n == 1 else {i: f"model_{i}" for i in range(n)}


def without_paths(study: Study) -> Study:
    """The study without the places of its data, which say nothing elsewhere and may tell names."""
    return dataclasses.replace(
        study,
        sites={name: SiteTable() for name in study.sites},
        test=None if study.test is None else SiteTable(),
        engine=dataclasses.replace(study.engine, cache=None),
    )


def dataset_description(finished: Finished) -> dict[str, Any]:
    """nnU-Net's dataset.json."""
    fingerprint = finished.run / "fingerprint.json"
    n = json.loads(fingerprint.read_text(encoding="utf-8"))["n_cases"] if fingerprint.is_file() else 0
    return {
        "channel_names": {str(i): name for i, name in enumerate(finished.channels)},
        **to_nnunet(finished.labels),
        "numTraining": n,
        "file_ending": finished.file_ending,
    }


def write_json(path: Path, value: object) -> None:
    """Write a JSON file; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def comparison(finished: Finished) -> str:
    """Lines below the command of a format that computes in float32, where the study does not: what gives the same label maps."""
    precision = finished.study.training.precision
    if precision == "float32":
        return ""
    named = "" if finished.name == finished.study.protocol.name else f" --model {finished.name}"
    return (
        f"\nCompare with: concilium predict {finished.run} -i IMAGES -o LABEL_MAPS{named} --precision float32\n"
        f"The study computes in {precision}, and without that option so does predict: single voxels at edges then differ."
    )


def _refuse_defences(finished: Finished, format: str) -> None:
    """Refuse a network with defences in it, of which other programs know nothing.

    Raises:
        StudyError: it has some.
    """
    if finished.study.defences and format != "safetensors":
        raise StudyError(
            f"{finished.name} cannot be exported as {format}: it was trained and scored with defences in its middle, "
            f"{described(finished.study.defences)}. Without them it would be another network than the one that was scored. "
            "Allowed: safetensors, the weights as they are, or concilium predict, which has them."
        )


def refuse_other_networks(finished: Finished, format: str) -> None:
    """Refuse a network that nnU-Net's packages cannot build.

    Raises:
        StudyError: it is another than `nnunet`.
    """
    if finished.study.network.name != "nnunet":
        raise StudyError(
            f"[network] name = {finished.study.network.name!r} cannot be exported as {format}: nnU-Net's packages do not build "
            "it. Allowed there: 'nnunet'. Export it as onnx or safetensors."
        )


def _open(run: Path, model: str | None) -> Finished:
    try:
        return open_finished(run, model)
    except StudyError as e:
        if (run / "plans.json").is_file() and _named(run, model).partition(":")[0] == "local":
            raise StudyError(
                f"{run} holds no model {model or 'local'!r}: models of `local` stay at their sites, and only a simulation has "
                f"them, as local:SITE. Known: {', '.join(finished_models(run)) or 'none'}. Choose one with --model."
            ) from e
        raise


def _named(run: Path, model: str | None) -> str:
    return model or read_study(run / "study.toml", check_data=False).protocol.name


def _results(run: Path) -> Mapping[str, Any]:
    path = run / "results.json"
    if not path.is_file():
        raise StudyError(
            f"{run} has no results.json: the run did not come to its end. A finished run is needed, since the model card is "
            f"written from its results. Go on with: concilium run {run / 'study.toml'} --out {run} --resume"
        )
    results: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def _intended_use(given: str | None) -> str:
    if not given or not given.strip():
        return NOT_STATED
    try:
        path = Path(given)
        text = path.read_text(encoding="utf-8") if path.is_file() else given
    except UnicodeDecodeError as e:
        raise DataError(f"{given} is no text file. Expected UTF-8. Save it as text, or give the text itself.") from e
    except OSError:  # a text too long to be a file's name
        text = given
    return text.strip()
