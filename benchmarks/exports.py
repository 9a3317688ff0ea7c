"""Label maps of exported models, computed by the programs they are for, against `concilium predict --precision float32`.

    python benchmarks/exports.py runs/hippocampus data/hippocampus/test/imagesTr

A model of RUN goes out in each format that can hold it. nnU-Net's own `nnUNetv2_predict_from_modelfolder`, the exported scripts
and `monai.bundle run` then segment the first images of IMAGES, each in a process of its own, on the CPU. Every label map is
compared voxel by voxel with that of `concilium predict` in float32. `predict` in the study's own precision is in the table
too: so much differs where nothing was exported.

Seconds are those of the whole process over the number of cases, so starting it counts. Each program takes as many threads as it
does when it is started so: nnU-Net and onnxruntime all cores, the others what OMP_NUM_THREADS and the study say.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

import concilium
from concilium import catalog
from concilium.data.images import list_images
from concilium.errors import StudyError
from concilium.finished import Finished, open_finished

REFERENCE = "concilium predict, float32"
CPU = {"nnunet": " -device cpu -npp 1 -nps 1"}
"""What a format's command needs besides to use one process and no GPU."""


def first_images(finished: Finished, images: Path, n: int, folder: Path) -> int:
    """A folder with links to the first cases; how many there are."""
    cases = list_images(images, finished.channels, finished.file_ending)[:n]
    folder.mkdir()
    for case in cases:
        for file in case.images:
            (folder / file.name).symlink_to(file.resolve())
    return len(cases)


def programs(finished: Finished, images: Path, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Program -> its command, with SEGMENTATIONS for where to write; and format -> why it cannot hold the model.

    The exported folders are made here.
    """
    ours = f"{sys.executable} -m concilium predict {finished.run} -i {images} -o SEGMENTATIONS --model {finished.name}"
    commands = {REFERENCE: f"{ours} --device cpu --precision float32"}
    precision = finished.study.training.precision
    if precision != "float32":
        commands[f"concilium predict, {precision}"] = f"{ours} --device cpu"
    refused = {}
    for format in catalog.names("exports"):
        try:
            out, after = concilium.open_run(finished.run).export(folder / format, format=format, model=finished.name)
        except StudyError as e:
            refused[format] = str(e)
            continue
        command = after.splitlines()[0].replace("IMAGES", str(images)) + CPU.get(format, "")
        if "SEGMENTATIONS" in command:  # else it leaves to the user what to compute
            commands[format] = command
        if (out / "plain.py").is_file():
            commands[f"{format}, plain.py"] = command.replace("predict.py", "plain.py")
    return commands, refused


def timed(command: str, out: Path) -> float:
    """Run a command; the seconds it took.

    Raises:
        RuntimeError: it failed.
    """
    out.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    began = time.perf_counter()
    done = subprocess.run(
        command.replace("SEGMENTATIONS", str(out)),
        shell=True, capture_output=True, text=True, check=False, env=environment, cwd=out.parent,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - began


def compare(found: Path, expected: Path, ending: str) -> dict[str, Any]:
    """How many cases are identical, how many voxels differ, and the lowest Dice of a label that either holds.

    Raises:
        RuntimeError: a label map is missing, or has another size.
    """
    differing, identical, n_voxels, lowest = 0, 0, 0, 1.0
    files = sorted(p.name for p in expected.glob(f"*{ending}"))
    for name in files:
        if not (found / name).is_file():
            raise RuntimeError(
                f"{name} was not segmented. Found: {', '.join(p.name for p in sorted(found.iterdir()))}."
            )
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name))) for folder in (found, expected))
        if a.shape != b.shape:
            raise RuntimeError(f"{name} has {a.shape} voxels. Expected {b.shape}.")
        n = int((a != b).sum())
        differing, identical, n_voxels = differing + n, identical + (n == 0), n_voxels + a.size
        for label in (set(np.unique(a)) | set(np.unique(b))) - {0}:
            both = (a == label).sum() + (b == label).sum()
            lowest = min(lowest, float(2 * ((a == label) & (b == label)).sum() / both))
    return {"cases": len(files), "identical": identical, "voxels": n_voxels, "differ": differing, "lowest_dice": lowest}


def measure(finished: Finished, images: Path, n: int, folder: Path) -> dict[str, Any]:
    """Export, segment and compare; all figures."""
    n = first_images(finished, images, n, folder / "images")
    commands, refused = programs(finished, folder / "images", folder)
    rows = []
    for i, (program, command) in enumerate(commands.items()):
        seconds = timed(command, folder / f"found{i}")
        row = compare(folder / f"found{i}", folder / "found0", finished.file_ending)
        rows.append({"program": program, **row, "seconds_per_case": seconds / n})
        print(_line(rows[-1]), flush=True)
    return {"run": finished.study.study.name, "model": finished.name, "programs": rows, "refused": refused}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the figures as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("images", type=Path, help="folder of images, as `concilium predict` takes it")
    parser.add_argument("--cases", type=int, default=5, help="the first so many (default: %(default)s)")
    parser.add_argument("--model", help="as in results.json (default: the study's own)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    o = parser.parse_args(arguments)
    finished = open_finished(o.run.resolve(), o.model)
    with tempfile.TemporaryDirectory() as name:
        figures = measure(finished, o.images, o.cases, Path(name).resolve())
    print("\n".join(_refusals(figures)))
    if o.out is not None:
        o.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def _line(row: Mapping[str, Any]) -> str:
    differ = f"{row['differ']:,} of {row['voxels']:,} voxels differ, lowest Dice {row['lowest_dice']:.4f}"
    same = f"{row['identical']} of {row['cases']} identical"
    return f"{row['program']:29s} {same}   {differ}   {row['seconds_per_case']:6.1f} s per case"


def _refusals(figures: Mapping[str, Any]) -> Iterator[str]:
    for format, why in figures["refused"].items():
        yield f"{format:29s} not exported: {why}"


if __name__ == "__main__":
    main()
