"""Segment new images with a finished model, from the run folder alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from concilium.answers.evaluate import segment
from concilium.data.dataset import reader
from concilium.data.images import images_as
from concilium.errors import DataError, StudyError
from concilium.finished import open_finished
from concilium.networks._fusion import without
from concilium.optimization import device_named
from concilium.prompts import answered, check_asked, check_cases, prompts_for, read_prompts


def predict(  # noqa: PLR0913  (options of a command)
    run: Path,
    images: Path,
    out: Path,
    *,
    model: str | None = None,
    device: str = "auto",
    precision: str | None = None,
    missing: Sequence[str] = (),
    boxes: Path | None = None,
    watch: Callable[[str, int, int], None] = lambda *_: None,
) -> list[tuple[str, str]]:
    """Write a label map for every image of a folder; the cases that could not be segmented, with the reason.

    Args:
        run: a run folder.
        images: files named CASE_0000.ENDING, one per channel, as in nnU-Net's imagesTs. In the run's order of channels, unless
            a dataset.json in the folder or above it says another: then they are matched by name.
        model: as in results.json, such as `federated` or `local:north`; omitted: the study's own protocol.
        precision: to compute in, `float32`, `bfloat16` or `float16`; omitted: that of training, in which the model was scored.
        missing: of a network of several parties, those whose channels these images lack; their files need not be there.
        boxes: a file of boxes and points (`prompts.py`), of a model of `sam`; a case that it does not name is not segmented.
        watch: is told each case, its number and how many there are.

    Raises:
        StudyError: no run folder, or it holds no such model.
        DataError: the folder holds no images of the right kind.
    """
    finished = open_finished(run, model)
    networks, study = finished.networks(), finished.study
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise StudyError(
            f"Device {device!r} is not available. Allowed: auto, cpu, and cuda where there is a GPU. Choose with --device."
        )
    where = device_named(device)
    torch.set_num_threads(study.engine.threads)
    ending = finished.file_ending
    lacking = without(networks, missing, finished.channels)
    dataset = images_as(images, finished.channels, finished.labels, ending, missing=lacking)
    cases = dataset.cases
    t = study.training
    prompts = read_prompts(boxes) if boxes is not None else {}
    if boxes is not None:
        check_asked(networks, finished.plan)
        check_cases(prompts, [case.name for case in cases], boxes)
    chosen = precision or t.precision
    cut = partial(
        segment,
        labels=finished.labels,
        networks=[network.to(where) for network in networks],
        mirror=t.mirror,
        unknown=finished.unknown,
        plan=finished.plan,
        device=where,
        precision=chosen,
    )
    ask = partial(answered, plan=finished.plan, device=where, precision=chosen)
    out.mkdir(parents=True, exist_ok=True)
    skipped: list[tuple[str, str]] = []
    for number, case in enumerate(cases, 1):
        watch(case.name, number, len(cases))
        try:
            asked = None if boxes is None else partial(ask, prompts=prompts_for(case.name, prompts))
            label_map, properties = cut(case, dataset, asked=asked)
            reader(ending)().write_seg(label_map, str(out / f"{case.name}{ending}"), properties)
        except DataError as e:
            skipped.append((case.name, str(e)))
    return skipped
