"""What federation costs: a round's wall time over that of the same number of steps in one plain nnU-Net loop, and its bytes.

A federated round does what plain training does, and besides packs, sends, checks, sums and unpacks the weights, swaps the sites'
models and optimisers, and writes snapshots and a checkpoint. This measures that "besides".

    python benchmarks/federation_overhead.py                                    # the built-in phantom
    python benchmarks/federation_overhead.py --study studies/hippocampus.toml

The federated side is `concilium.run`. Its time counts from the first request to train to the last checkpoint. The plain
side is nnU-Net's own: its network, data set, loader, loss and step, on the cases that the run prepared, with the same transforms,
optimiser, precision and threads, in one loop over the cases of all sites. They take turns, in one process: a round, then as many
steps as all sites took in it. A short run of both goes before, to prepare the cases and to warm up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from concilium.data.augment import training_transforms
from concilium.data.plan import Plan, open_plan
from concilium.data.preprocess import label_rules, open_prepared
from concilium.demo import demo_study
from concilium.engines.simulation import Simulation
from concilium.line import Event, run
from concilium.messages import Train
from concilium.optimization import autocast, make_optimizer
from concilium.study import Study, read_study, training_of

TARGET_TIME, TARGET_BYTES = 1.10, 1.01
CLIP_NORM = 12
"""Of nnU-Net's trainer."""


class Finished(Exception):
    """The last round is on disk; scoring is not measured."""


@dataclass
class Clock:
    """Seconds of a run as it goes; after each round `between` has its turn."""

    rounds: int
    between: Callable[[], float]
    start_up: dict[str, float] = field(default_factory=dict)
    federated: list[float] = field(default_factory=list)
    """Of each round, with its checkpoint."""
    plain: list[float] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)
    _stage: str = "opening"

    def training(self) -> None:
        """Requests to train are about to be packed."""
        if not self.federated:
            self._begin("training")

    def watch(self, event: Event) -> None:
        """What `run` calls."""
        if event.kind == "stage":
            self._begin(event.text.split()[0].lower())
        elif event.kind == "round":
            self.federated.append(time.perf_counter() - self._since)
            self.plain.append(self.between())
            if event.round == self.rounds:
                raise Finished
            self._since = time.perf_counter()

    def _begin(self, stage: str) -> None:
        now = time.perf_counter()
        self.start_up[self._stage] = now - self._since
        self._since, self._stage = now, stage


# --------------------------------------------------------------------------------------------------------- the federation


def federate(study: Study, out: Path, between: Callable[[], float]) -> Clock:
    """Run the study's rounds; nothing is scored."""
    clock = Clock(study.protocol.rounds, between)
    send = Simulation.send

    def noted(engine: Simulation, requests: Mapping[str, Any], **options: Any) -> None:
        if any(isinstance(request, Train) for request in requests.values()):
            clock.training()
        send(engine, requests, **options)

    # no event tells when training begins
    with mock.patch.object(Simulation, "send", noted), contextlib.suppress(Finished):
        run(study, out, watch=clock.watch)
    return clock


def comparable(study: Study, *, rounds: int, steps: int | None, threads: int | None, cache: Path) -> Study:
    """The study as it is measured: one process, no baselines, no test set, cases prepared once.

    Raises:
        ValueError: the plain loop would do something else than this study.
    """
    plug_ins = {"network": "nnunet", "loss": "dice_ce", "local_update": "plain"}
    other = {k: getattr(study, k).name for k, name in plug_ins.items() if getattr(study, k).name != name}
    if other or study.protocol.name != "federated" or study.engine.name != "simulation":
        raise ValueError(f"The study has {other or study.protocol.name}. Expected federated, simulated: {plug_ins}.")
    if steps is None and study.protocol.steps is None:
        raise ValueError("The study counts epochs, not steps. Give --steps.")
    p = replace(study.protocol, rounds=rounds, steps=steps or study.protocol.steps, epochs=None, compare=())
    engine = replace(study.engine, workers=1, threads=threads or study.engine.threads, cache=cache)
    return replace(study, protocol=p, training=replace(study.training, loader_workers=0), test=None, engine=engine)


# ---------------------------------------------------------------------------------------------------------- the plain loop


@dataclass(frozen=True)
class Plain:
    """nnU-Net's network, loader, loss and optimiser, and nothing else."""

    network: nn.Module
    loader: Any
    loss: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    scaler: Any
    """Does nothing but in float16."""
    device: torch.device
    precision: str

    def steps(self, n: int) -> float:
        """Take so many steps, as nnU-Net's trainer does (`nnUNetTrainer.train_step`); the seconds that it took."""
        began = time.perf_counter()
        self.network.train()
        for _ in range(n):
            batch = self.loader.generate_train_batch()
            image, target = batch["data"].to(self.device), batch["target"]
            target = [t.to(self.device) for t in target] if isinstance(target, list) else target.to(self.device)
            self.optimizer.zero_grad(set_to_none=True)
            with autocast(self.device, self.precision):
                logits = self.network(image)
            logits = [x.float() for x in logits] if isinstance(logits, list) else logits.float()
            loss = self.loss(logits, target)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if not math.isfinite(value := float(loss.detach())):
                raise FloatingPointError(f"The loss of the plain loop is {value}.")
        return time.perf_counter() - began


def copy_cases(cache: Path, folder: Path, plan: Plan) -> None:
    """The prepared cases as nnU-Net's own preprocessing would have left them."""
    folder.mkdir()
    for path in sorted(cache.rglob("*.safetensors")):
        case = open_prepared(path)
        image, label = np.array(case.image), np.array(case.label)
        layouts = [comp_blosc2_params(a.shape, plan.patch_size, a.itemsize)[::-1] for a in (image, label)]
        properties = dict(case.properties) | {"class_locations": {k: np.array(v) for k, v in case.locations.items()}}
        nnUNetDatasetBlosc2.save_case(image, label, properties, str(folder / path.stem), *layouts[0], *layouts[1])


def plain_training(study: Study, record: Path, cases: Path) -> Plain:
    """What nnU-Net would train by the run's plan, on these cases."""
    plan = open_plan((record / "plans.json").read_text(), study.plan.configuration)
    about, t = json.loads((record / "dataset.json").read_text()), study.training
    wanted = study.engine.device
    device = torch.device(wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    c = plan.configuration
    network = get_network_from_plans(
        c.network_arch_class_name, c.network_arch_init_kwargs, c.network_arch_init_kwargs_req_import,
        len(about["channel_names"]), len(about["labels"]), allow_init=True, deep_supervision=t.deep_supervision,
    ).to(device)  # fmt: skip
    transforms, initial, _ = training_transforms(
        plan, mirror=t.mirror, augmentation=t.augmentation, deep_supervision=t.deep_supervision
    )
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(cases)), plan.batch_size, initial, plan.patch_size, label_rules(plan, about["labels"]),
        oversample_foreground_percent=t.foreground, transforms=transforms,
    )  # fmt: skip
    dice = {"batch_dice": plan.batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss: Any = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    if t.deep_supervision:
        n = len(plan.strides) - 1
        halves = [2.0**-i if i < n - 1 or n == 1 else 0.0 for i in range(n)]
        loss = DeepSupervisionWrapper(loss, [h / sum(halves) for h in halves])
    scaler = torch.amp.GradScaler(device.type, enabled=t.precision == "float16")
    return Plain(network, loader, loss, make_optimizer(network, training_of(study)), scaler, device, t.precision)


# ------------------------------------------------------------------------------------------------------------- the figures


def account(record: Path, clock: Clock, network: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """Where a run's rounds went [s], and the most that a site received or sent in one, beside nnU-Net's own network [bytes]."""
    lines = [json.loads(line) for line in (record / "rounds.jsonl").read_text().splitlines()]
    sites = [site for line in lines for site in line["sites"].values()]
    at_sites = sum(site["seconds"] for site in sites)
    rounds = sum(line["seconds"] for line in lines)
    rest = sum(clock.federated) - rounds
    down, up = (max(site[f"bytes_{way}"] for site in sites) for way in ("down", "up"))
    unique = {id(t): t.numel() * t.element_size() for t in network.state_dict(keep_vars=True).values()}
    size = sum(unique.values())
    return (
        {"training": at_sites, "messages, sum, snapshots": rounds - at_sites, "checkpoints": rest},
        {"parameters": size, "down": down, "up": up, "ratio_down": down / size, "ratio_up": up / size},
    )


def measure(study: Study, folder: Path, *, repeats: int) -> dict[str, Any]:
    """Run both sides in turn, `repeats` times; all figures."""
    first, p, t = folder / "first", study.protocol, study.training
    start_up = federate(replace(study, protocol=replace(p, rounds=1, steps=1)), first, float).start_up
    torch.set_num_threads(study.engine.threads)
    plan = open_plan((first / "plans.json").read_text(), study.plan.configuration)
    copy_cases(folder / "cache", folder / "cases", plan)
    n_steps = (p.steps or 0) * len(study.sites)
    clocks: list[Clock] = []
    parts: list[dict[str, float]] = []
    for i in range(repeats):
        plain = plain_training(study, first, folder / "cases")
        plain.steps(1)
        clocks.append(federate(study, folder / f"run{i}", partial(plain.steps, n_steps)))
        seconds, n_bytes = account(folder / f"run{i}", clocks[-1], plain.network)
        parts.append(seconds)
    ours, theirs = [s for c in clocks for s in c.federated], [s for c in clocks for s in c.plain]
    return {
        "study": study.study.name, "sites": len(study.sites), "rounds": p.rounds, "steps": p.steps, "repeats": repeats,
        "threads": study.engine.threads, "device": plain.device.type, "precision": t.precision, "torch": torch.__version__,
        "patch_size": plan.patch_size, "batch_size": plan.batch_size,
        "federated_s": ours, "plain_s": theirs, "pairs": [a / b for a, b in zip(ours, theirs, strict=True)],
        "ratio": statistics.median(ours) / statistics.median(theirs), "ratio_of_sums": sum(ours) / sum(theirs),
        "target_ratio": TARGET_TIME, "parts_s": {name: sum(part[name] for part in parts) / repeats for name in parts[0]},
        "start_up_s": {"first run": start_up, "runs with prepared cases": clocks[-1].start_up},
        "bytes": n_bytes, "target_bytes": TARGET_BYTES,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and write it as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="study file (default: the study of `concilium demo`)")
    parser.add_argument("--rounds", type=int, default=5, help="of a run; each gives a pair (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimiser steps per site and round (default: the study's own)")
    parser.add_argument("--threads", type=int, help="of both sides (default: the study's own)")
    parser.add_argument("--repeats", type=int, default=1, help="runs, each from new weights (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = read_study(options.study) if options.study else demo_study(folder)
        try:
            study = comparable(
                study, rounds=options.rounds, steps=options.steps, threads=options.threads, cache=folder / "cache"
            )
        except ValueError as e:
            parser.error(str(e))
        figures = measure(study, folder, repeats=options.repeats)
    print("\n".join(_lines(figures)))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def _lines(f: Mapping[str, Any]) -> Iterator[str]:
    patch = "×".join(map(str, f["patch_size"]))
    yield f"{f['study']}: {f['sites']} sites, {f['steps']} steps each, patch {patch}, batch {f['batch_size']}, {f['precision']}"
    yield f"{f['device']}, threads: {f['threads']}, torch {f['torch']}"
    yield "\npair     federated [s]   plain [s]   ratio"
    for i, (a, b, ratio) in enumerate(zip(f["federated_s"], f["plain_s"], f["pairs"], strict=True), start=1):
        yield f"{i:6d}   {a:13.2f}   {b:9.2f}   {ratio:5.3f}"
    a, b = statistics.median(f["federated_s"]), statistics.median(f["plain_s"])
    yield f"median   {a:13.2f}   {b:9.2f}   {f['ratio']:5.3f}   target {f['target_ratio']:.2f}"
    yield f"sum      {sum(f['federated_s']):13.2f}   {sum(f['plain_s']):9.2f}   {f['ratio_of_sums']:5.3f}"
    yield "\nbytes of a site's round / bytes of the parameters, each once"
    for way in ("down", "up"):
        n, size, ratio = f["bytes"][way], f["bytes"]["parameters"], f["bytes"][f"ratio_{way}"]
        yield f"{way:6s}   {n:,} / {size:,} = {ratio:.4f}   target {f['target_bytes']}"
    yield "\nwhere a run's rounds went [s]: " + ", ".join(f"{k} {v:.2f}" for k, v in f["parts_s"].items())
    for which, stages in f["start_up_s"].items():
        yield f"before the first request, {which} [s]: " + ", ".join(f"{k} {v:.2f}" for k, v in stages.items())


if __name__ == "__main__":
    main()
