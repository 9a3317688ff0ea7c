"""Training here against stock nnU-Net: Dice on the same held-out cases after the same plan, training cases, recipe and steps.

    python benchmarks/stock_nnunet.py data/hippocampus/north data/hippocampus/south data/hippocampus/west \
        --test data/hippocampus/test

The folders' cases are pooled into one. Ours is `concilium.run` with the protocol `local` and that one site, which is what
`centralized` trains, predicted by `concilium predict`. Stock is nnU-Net's own preprocessing, trainer (`run_training`, the
function behind `nnUNetv2_train`) and predictor, in folders of its own, with our run's plans.json and, as `splits_final.json`, our
run's fold. Both are scored by `concilium evaluate`.

Set from outside in the stock trainer: the number of epochs (our rounds) and of iterations in each (our steps); one validation
batch an epoch; no prediction of the validation fold at the end; the optimiser with `--optimizer adamw`; bfloat16 with
`--precision bfloat16` (on a CPU stock computes in float32). What still differs: initial weights and batches, which each side
draws for itself, and the learning rate, which stock lowers every epoch and we lower every step. So one pair of seeds says
little: the difference of the means is read beside the scatter between seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring

import concilium
from concilium.evaluation import evaluate

TARGET = 0.01
"""Difference of the mean Dice."""
PLANS, TRAINER = "nnUNetPlans", nnUNetTrainerNoMirroring
"""The trainer is nnU-Net's own too, and does as our studies on a CPU do: mirrored predictions cost eight times as much."""
SITE, MEAN = "all_sites", "foreground_mean"
RATE = {"sgd": 1e-2, "adamw": 1e-3}


@dataclass(frozen=True)
class Setup:
    """What both sides are told."""

    pooled: Path
    """nnU-Net raw folder with the cases of all sites."""
    test: Path
    configuration: str
    rounds: int
    steps: int
    base_features: int
    batch_size: int
    optimizer: str
    precision: str
    threads: int


def pool(sites: Sequence[Path], folder: Path) -> Path:
    """One raw folder with links to the cases of all; the patients are kept together in folds as they are at the sites.

    Raises:
        ValueError: two folders hold a case of the same name, or differ in channels, labels or format.
    """
    about = [json.loads((site / "dataset.json").read_text(encoding="utf-8")) for site in sites]
    for key in ("channel_names", "labels", "file_ending"):
        if any(a[key] != about[0][key] for a in about):
            raise ValueError(f"The data sets differ in {key}. Expected the same in all. Give others.")
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
        for site in sites:
            for file in sorted((site / kind).iterdir()):
                link = folder / kind / file.name
                if link.is_symlink():
                    raise ValueError(f"{file.name} is in two data sets. Expected names that differ. Give others.")
                link.symlink_to(file.resolve())
    pooled = {key: about[0][key] for key in ("channel_names", "labels", "file_ending")}
    pooled["numTraining"] = sum(1 for _ in (folder / "labelsTr").iterdir())
    if all("patient" in a for a in about):
        pooled["patient"] = {case: patient for a in about for case, patient in a["patient"].items()}
    (folder / "dataset.json").write_text(json.dumps(pooled), encoding="utf-8")
    return folder


def dice(predictions: Path, test: Path) -> dict[str, float]:
    """Label -> mean Dice over the held-out patients, by `concilium evaluate`.

    Raises:
        RuntimeError: a case has no prediction, or cannot be scored.
    """
    found = evaluate(predictions, test / "labelsTr", labels=test / "dataset.json")
    n = sum(1 for _ in (test / "labelsTr").iterdir())
    if found.problems or len({row["case"] for row in found.cases}) != n:
        raise RuntimeError(f"Not all of {n} cases are scored: {found.problems}.")
    return {row["label"]: row["mean"] for row in found.summary if row["metric"] == "dice"}


# ----------------------------------------------------------------------------------------------------------------- ours


def train_ours(setup: Setup, seed: int, out: Path) -> float:
    """Train by a study of one site; the seconds that the rounds took."""
    study = {
        "study": {"name": "stock", "seed": seed},
        "sites": {SITE: {"data": str(setup.pooled)}},
        "protocol": {"name": "local", "rounds": setup.rounds, "steps": setup.steps},
        "plan": {"configuration": setup.configuration},
        "network": {"name": "nnunet", "base_features": setup.base_features},
        "training": {
            "optimizer": setup.optimizer, "learning_rate": RATE[setup.optimizer], "batch_size": setup.batch_size,
            "precision": setup.precision, "mirror": False,
        },
        "engine": {"threads": setup.threads, "device": "cpu", "cache": str(out.parent / "cache")},
    }  # fmt: skip
    run = concilium.run(study, out)
    if not run.complete:
        raise RuntimeError(f"The run is not complete: {run.problems}.")
    return float(run.rounds["seconds"].sum())


def fold_of(setup: Setup, out: Path) -> dict[str, list[str]]:
    """The run's fold, as an entry of nnU-Net's `splits_final.json`: what was scored at the site was not trained on."""
    ending = json.loads((setup.pooled / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    every = sorted(file.name.removesuffix(ending) for file in (setup.pooled / "labelsTr").iterdir())
    rows = concilium.open_run(out).results["cases"]
    held_out = sorted({row["case"] for row in rows if row["subset"] == "validation"})
    return {"train": [case for case in every if case not in held_out], "val": held_out}


# ---------------------------------------------------------------------------------------------------------------- stock


@contextlib.contextmanager
def stock_folders(folder: Path) -> Iterator[None]:
    """nnU-Net's three folders, and batches made in the training's own process, as ours are."""
    named = {f"nnUNet_{kind}": str(folder / kind) for kind in ("raw", "preprocessed", "results")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, named | {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}))
        # nnU-Net's search by name imports every trainer there is; one of them needs torchvision, which nothing else does
        for module in ("run.run_training", "inference.predict_from_raw_data"):
            search = f"nnunetv2.{module}.recursive_find_trainer_class_by_name"
            stack.enter_context(mock.patch(search, return_value=TRAINER))
        yield


def prepare_stock(setup: Setup, plans: Path, folder: Path) -> str:
    """Preprocess by nnU-Net with our plan; the data set's name."""
    name = str(json.loads(plans.read_text(encoding="utf-8"))["dataset_name"])
    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir(parents=True)
    (folder / "raw" / name).symlink_to(setup.pooled.resolve())
    prepared = folder / "preprocessed" / name
    prepared.mkdir()
    shutil.copy(plans, prepared / f"{PLANS}.json")
    shutil.copy(setup.pooled / "dataset.json", prepared / "dataset.json")
    number = int(name[len("Dataset") :][:3])
    with stock_folders(folder), contextlib.redirect_stdout(io.StringIO()):
        extract_fingerprints([number], num_processes=1, show_progress_bar=False)
        preprocess([number], PLANS, [setup.configuration], [1], show_progress_bar=False)
    return name


def set_from_outside(setup: Setup) -> contextlib.ExitStack:
    """The stock trainer with our length, and where it is asked for our optimiser and precision."""
    begin, initialize = nnUNetTrainer.__init__, nnUNetTrainer.initialize

    def with_length(self: Any, plans: Any, configuration: Any, fold: Any, dataset_json: Any, device: Any) -> None:
        begin(self, plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = setup.rounds, setup.steps, 1
        self.save_every, self.initial_lr = setup.rounds + 1, RATE[setup.optimizer]

    def adamw(self: Any) -> tuple[Any, Any]:
        chosen = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return chosen, PolyLRScheduler(chosen, self.initial_lr, self.num_epochs)

    def in_bfloat16(self: Any) -> None:
        initialize(self)
        forward = self.network.forward

        def computed(x: torch.Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(x)
            return [y.float() for y in logits] if isinstance(logits, list | tuple) else logits.float()

        self.network.forward = computed

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(nnUNetTrainer, "__init__", with_length))
    for left_out in ("perform_actual_validation", "plot_network_architecture"):
        stack.enter_context(mock.patch.object(nnUNetTrainer, left_out))
    if setup.optimizer == "adamw":
        stack.enter_context(mock.patch.object(nnUNetTrainer, "configure_optimizers", adamw))
    if setup.precision == "bfloat16":
        stack.enter_context(mock.patch.object(nnUNetTrainer, "initialize", in_bfloat16))
    return stack


def train_stock(setup: Setup, name: str, seed: int, folder: Path, predictions: Path) -> float:
    """Train and predict by nnU-Net; the seconds that the training took, its validation batches included."""
    for draw in (random.seed, np.random.seed, torch.manual_seed):
        draw(seed)
    torch.set_num_threads(setup.threads)
    began = time.perf_counter()
    with stock_folders(folder), contextlib.redirect_stdout(io.StringIO()):
        with set_from_outside(setup):
            run_training(name, setup.configuration, 0, TRAINER.__name__, PLANS, device=torch.device("cpu"))
        seconds = time.perf_counter() - began
        trained = folder / "results" / name / f"{TRAINER.__name__}__{PLANS}__{setup.configuration}"
        predictor = nnUNetPredictor(
            use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(trained), (0,), "checkpoint_final.pth")
        predictions.mkdir()
        predictor.predict_from_files_sequential(str(setup.test / "imagesTr"), str(predictions))
        shutil.rmtree(trained)
    return seconds


# ------------------------------------------------------------------------------------------------------------ the command


def measure(setup: Setup, seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    """Train both sides with each seed, in turn; all figures."""
    ours, stock, name, n_trained = [], [], "", 0
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    for seed in seeds:
        out = folder / f"run{seed}"
        seconds["ours"].append(train_ours(setup, seed, out))
        failed = concilium.open_run(out).predict(
            setup.test / "imagesTr", folder / f"ours{seed}", model=f"local:{SITE}", device="cpu", precision="float32"
        )
        if failed:
            raise RuntimeError(f"Cases that could not be segmented: {failed}.")
        ours.append(dice(folder / f"ours{seed}", setup.test))
        if not name:
            name = prepare_stock(setup, out / "plans.json", folder / "stock")
        fold = fold_of(setup, out)
        n_trained = len(fold["train"])
        split = folder / "stock" / "preprocessed" / name / "splits_final.json"
        split.write_text(json.dumps([fold]), encoding="utf-8")
        seconds["stock"].append(train_stock(setup, name, seed, folder / "stock", folder / f"stock{seed}"))
        stock.append(dice(folder / f"stock{seed}", setup.test))
        print(f"seed {seed}: ours {_shown(ours[-1])} · stock {_shown(stock[-1])}", flush=True)
    means = [[found.get(MEAN, next(iter(found.values()))) for found in side] for side in (ours, stock)]
    difference = statistics.fmean(means[0]) - statistics.fmean(means[1])
    scatter = [statistics.variance(side) for side in means] if len(seeds) > 1 else []
    return {
        "cases": n_trained, "steps": setup.rounds * setup.steps, "seeds": list(seeds), "ours": ours, "stock": stock,
        "mean_ours": means[0], "mean_stock": means[1], "difference": difference, "target": TARGET,
        "standard_error": math.sqrt(sum(scatter) / len(seeds)) if scatter else None, "seconds": seconds,
        **{key: getattr(setup, key) for key in ("base_features", "batch_size", "optimizer", "precision", "threads")},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the figures as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sites", type=Path, nargs="+", help="nnU-Net raw folders, whose cases are pooled")
    parser.add_argument("--test", type=Path, required=True, help="raw folder of the held-out cases")
    parser.add_argument("--configuration", default="3d_fullres", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="of ours, epochs of stock (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="in each (default: %(default)s)")
    parser.add_argument("--base-features", type=int, default=16, help="half of nnU-Net's 32 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--optimizer", choices=tuple(RATE), default="sgd", help="(default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of both sides (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    o = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        try:
            pooled = pool(o.sites, Path(name) / "pooled")
        except ValueError as e:
            parser.error(str(e))
        setup = Setup(
            pooled, o.test, o.configuration, o.rounds, o.steps, o.base_features, o.batch_size, o.optimizer, o.precision,
            o.threads,
        )  # fmt: skip
        figures = measure(setup, o.seeds, Path(name))
    print("\n".join(_lines(figures)))
    if o.out is not None:
        o.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def _shown(found: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {value:.4f}" for label, value in found.items())


def _lines(f: Mapping[str, Any]) -> Iterator[str]:
    how = f"{f['base_features']} features, batch {f['batch_size']}, {f['optimizer']}, {f['precision']}, threads {f['threads']}"
    yield f"{f['cases']} training cases, {f['steps']} steps, {how}"
    for side in ("ours", "stock"):
        took = ", ".join(f"{s:.0f}" for s in f["seconds"][side])
        yield f"{side:6s} mean Dice {', '.join(f'{m:.4f}' for m in f[f'mean_{side}'])}   training [s] {took}"
    e = f["standard_error"]
    error = "one seed: no standard error" if e is None else f"standard error {e:.4f}"
    yield f"ours - stock {f['difference']:+.4f} ({error}); target: within {f['target']}"


if __name__ == "__main__":
    main()
