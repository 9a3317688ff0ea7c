"""Each benchmark runs, at its smallest, and counts what it says. How quick anything is, is not tested."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from skimage import io

from concilium import wire
from concilium.answers import time_box
from concilium.messages import Trained
from concilium.study import read_study

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[1] / "benchmarks"

STUDY = """
[study]
name = "small"
[sites.north]
data = "{data}/north"
[sites.south]
data = "{data}/south"
[test]
data = "{data}/test"
[protocol]
rounds = 7
{length}
compare = ["local"]
[network]
base_features = 4
[training]
batch_size = 2
patch_size = [16, 16, 16]
precision = "bfloat16"
"""


def load(name: str, folder: Path = FOLDER) -> ModuleType:
    spec = spec_from_file_location(f"benchmarks_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def aggregation() -> ModuleType:
    return load("aggregation")


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    return load("federation_overhead")


# ------------------------------------------------------------------------------------------------------------ aggregation


def test_aggregation_runs(aggregation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    small = ["--parameters", "20000", "--sites", "3", "2", "--timed-sites", "2", "--threads", "1"]
    figures = aggregation.main([*small, "--out", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text())["parameters"] == figures["parameters"]
    assert figures["parameters"] == pytest.approx(20_000, rel=0.2)
    assert [m["sites"] for m in figures["memory"]] == [2, 3]
    (times,) = figures["times"]
    assert len(times["ours"]) == len(times["floor"]) == len(times["in_place"]) == 2  # the warm-up is not among them
    assert min(*times["ours"], *times["floor"], *times["in_place"]) > 0
    assert "growth / update" in capsys.readouterr().out
    torch.set_num_threads(threads)


def test_the_update_is_as_large_as_a_network_of_nnunet(aggregation: ModuleType) -> None:
    n = len(aggregation.WIDTHS)
    with torch.device("meta"):
        network = PlainConvUNet(
            1, n, aggregation.WIDTHS, torch.nn.Conv3d, 3, [1] + [2] * (n - 1), 2, 3, 2, conv_bias=True,
            norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=torch.nn.LeakyReLU, deep_supervision=True,
        )  # fmt: skip
    theirs = sorted(tuple(p.shape) for p in network.parameters())
    assert sorted(aggregation.shapes(aggregation.WIDTHS).values()) == theirs


def test_a_round_gives_the_update_that_all_sites_sent(aggregation: ModuleType, tmp_path: Path) -> None:
    like = aggregation.write_reply(20_000, tmp_path / "reply")
    sent = wire.unpack((tmp_path / "reply").read_bytes())
    assert isinstance(sent, Trained)
    mean = aggregation.run_round(aggregation.answering(tmp_path / "reply"), 3, like)
    assert mean.keys() == sent.weights.keys()
    for name, tensor in sent.weights.items():
        assert torch.equal(mean[name], tensor), name


def test_a_refused_update_is_not_measured(aggregation: ModuleType, tmp_path: Path) -> None:
    like = aggregation.write_reply(20_000, tmp_path / "reply")
    with pytest.raises(RuntimeError, match="3 updates were refused"):
        aggregation.run_round(aggregation.answering(tmp_path / "reply"), 3, {"other": next(iter(like.values()))})


# ----------------------------------------------------------------------------------------------------- federation overhead


def study_file(tmp_path: Path, phantom: Path, length: str) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(data=phantom.as_posix(), length=length))
    return path


def test_federation_overhead_runs(
    overhead: ModuleType, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    taken: list[int] = []
    steps = overhead.Plain.steps

    def counted(plain: Any, n: int) -> float:
        before = [p.detach().clone() for p in plain.network.parameters()]
        seconds = steps(plain, n)
        taken.append(n)
        assert any(not torch.equal(a, b) for a, b in zip(before, plain.network.parameters(), strict=True))
        return float(seconds)

    monkeypatch.setattr(overhead.Plain, "steps", counted)
    study = study_file(tmp_path, phantom, "steps = 9")
    small = ["--rounds", "2", "--steps", "3", "--threads", "1", "--repeats", "2"]
    f = overhead.main(["--study", str(study), *small, "--out", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text())["pairs"] == f["pairs"]
    assert taken == [1, 6, 6] * 2  # a warm-up, then as many as both sites take in a round
    assert len(f["federated_s"]) == len(f["plain_s"]) == len(f["pairs"]) == 4
    assert (f["sites"], f["rounds"], f["steps"], f["precision"]) == (2, 2, 3, "bfloat16")
    assert sum(f["parts_s"].values()) == pytest.approx(sum(f["federated_s"]) / 2)
    assert (
        min(f["parts_s"].values()) > -0.01
    )  # rounds.jsonl is written in milliseconds; the plain loop's turn is not in it
    assert min(f["federated_s"]) > 0
    assert 1 < f["bytes"]["ratio_down"] < 1.5  # the network is so small that names and shapes weigh
    assert 1 < f["bytes"]["ratio_up"] < 1.5
    assert not list(tmp_path.glob("run*"))
    torch.set_num_threads(threads)


def test_both_sides_have_the_same_parameters(overhead: ModuleType, phantom: Path, tmp_path: Path) -> None:
    study = read_study(study_file(tmp_path, phantom, "steps = 1"))
    study = overhead.comparable(study, rounds=1, steps=1, threads=1, cache=tmp_path / "cache")
    overhead.federate(study, tmp_path / "run", float)
    overhead.copy_cases(
        tmp_path / "cache",
        tmp_path / "cases",
        overhead.open_plan((tmp_path / "run/plans.json").read_text(), "3d_fullres"),
    )
    plain = overhead.plain_training(study, tmp_path / "run", tmp_path / "cases")
    (checkpoint,) = (tmp_path / "run" / "checkpoints" / "federated").glob("*.safetensors")
    ours = [t for name, t in wire.read_tensors(checkpoint)[0].items() if name.startswith("weights/")]
    assert sorted(tuple(t.shape) for t in ours) == sorted(tuple(p.shape) for p in plain.network.parameters())
    assert len(plain.loader.indices) == 10  # the cases of both sites
    assert plain.optimizer.param_groups[0]["lr"] == study.training.learning_rate


@pytest.mark.parametrize(
    ("length", "message"), [("epochs = 1", "counts epochs"), ("steps = 1\nname = 'local'", "The study has local")]
)
def test_a_study_that_would_do_something_else_is_refused(
    overhead: ModuleType,
    phantom: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    length: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--study", str(study_file(tmp_path, phantom, length))])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- split training, connections


def test_split_step_runs(phantom: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    study = read_study(study_file(tmp_path, phantom, "steps = 9"))
    found = load("split_step").measure(study, tmp_path / "run", cut=("deep",), rounds=1, steps=2)
    assert {side: len(s) for side, s in found["seconds"].items()} == {"whole": 1, "split": 1}
    assert found["ratio"] == found["pairs"][0] > 0
    for measured, forecast in found["bytes"].values():
        assert forecast <= measured <= 1.1 * forecast  # headers weigh, where maps are this small
    torch.set_num_threads(threads)


def test_transport_runs(phantom: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    study = read_study(study_file(tmp_path, phantom, "steps = 9"))
    found = load("transport").measure(study, tmp_path / "run", cut=("deep",), rounds=1, steps=2)
    errors = {(row["way"], row["step"], row["kind"]): row for row in found["errors"]}
    assert len(errors) == 4 * 2 * 4
    for (way, _, kind), row in errors.items():
        assert 0 <= row["worst"] <= {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0.004}.get(kind, 1.0), (way, kind)
        assert row["largest"] > 0
    assert found["bytes"]["float32"] == found["bytes"]["bfloat16"], "it computes in bfloat16"
    torch.set_num_threads(threads)


def test_connection_runs(tmp_path: Path) -> None:
    rows = load("connection").measure(tmp_path, most=1 << 20)
    assert [(row["what"], row["bytes"]) for row in rows] == [("exchange", 1 << 12), ("exchange", 1 << 20)]
    for row in rows:
        assert {side: len(s) for side, s in row["seconds"].items()} == {"ours": row["n"], "gRPC": row["n"]}
        assert row["ratio"] == pytest.approx(row["median_s"]["ours"] / row["median_s"]["gRPC"])


def test_statistics_coverage_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = load("statistics_coverage").main(["--repeats", "3"])
    assert {row["n"] for row in found["intervals"]} == {row["n"] for row in found["tests"]} == {6, 10, 20, 50}
    for row in (*found["intervals"], *found["tests"]):
        for method in ("ours", "percentile", "t", "wilcoxon"):
            share = row.get(method, 0.0)
            assert 0 <= (share[0] if isinstance(share, list) else share) <= 1
    assert "Coverage of 95 % intervals" in capsys.readouterr().out


def test_the_true_means_of_the_made_up_scores_are_true() -> None:
    made = load("statistics_coverage")
    rng = np.random.default_rng(0)
    for kind in made.SITES:
        mean = np.mean([made.dice(kind, 50, rng).mean() for _ in range(4000)])
        assert mean == pytest.approx(made.true_mean(kind, 50), abs=0.002)
    for make in made.DIFFERENCES.values():
        assert np.mean([make(50, rng).mean() for _ in range(4000)]) == pytest.approx(0, abs=0.002)


# ---------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_runs_and_both_sides_score_the_same_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    small = [
        "--shape",
        "30",
        "64",
        "64",
        "--labels",
        "3",
        "--size",
        "60",
        "--radius",
        "14",
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    figures = load("metrics").main([*small, "--out", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    for task, metrics in (("label map", {"dice", "hd95", "nsd"}), ("pair", {"hd95", "nsd"})):
        ours, theirs = figures[task]["values"]["ours"], figures[task]["values"]["monai"]
        assert ours.keys() == theirs.keys() == metrics
        for metric in metrics - {"hd95"}:
            assert ours[metric] == pytest.approx(theirs[metric], abs=1e-5)  # the same definition
        assert ours["hd95"] == pytest.approx(theirs["hd95"], rel=0.5)
        assert figures[task]["ratio"] == pytest.approx(figures[task]["pairs"][0])
        assert figures[task]["ratio"] > 0
    assert "Target: the pair in at most 0.4 s" in capsys.readouterr().out
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------- exports


def test_exports_runs_every_program_of_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = load("made", Path(__file__).parent / "exports")
    data = made.write_volumes(tmp_path / "data", n=2, spacing=(1.0, 1.1, 1.2))
    run = made.make_run(tmp_path / "run", data, patch=[16, 24, 24], precision="bfloat16")
    figures = load("exports").main(
        [str(run), str(data / "imagesTr"), "--cases", "1", "--out", str(tmp_path / "f.json")]
    )
    assert json.loads((tmp_path / "f.json").read_text()) == figures
    rows = {row["program"]: row for row in figures["programs"]}
    ours = ["concilium predict, float32", "concilium predict, bfloat16"]
    assert list(rows) == [*ours, "monai", "nnunet", "onnx", "onnx, plain.py"]
    assert figures["refused"] == {}
    for program, row in rows.items():
        assert row["cases"] == 1
        assert row["voxels"] == 14 * 40 * 36
        assert row["seconds_per_case"] > 0
        assert row["differ"] <= {"onnx": 2, "onnx, plain.py": 2, ours[1]: 2000}.get(program, 0)
    assert rows[ours[1]]["differ"] > 0  # two precisions of a network that was never trained
    assert "1 of 1 identical   0 of 20,160 voxels differ" in capsys.readouterr().out


def test_a_voxel_that_differs_is_counted(tmp_path: Path) -> None:
    labels = np.zeros((2, 3, 4), np.uint8)
    labels[0, 0, :3] = 1
    for folder, n_changed in (("expected", 0), ("found", 1)):
        (tmp_path / folder).mkdir()
        for case in ("a", "b"):
            written = labels.copy()
            written.flat[: n_changed if case == "b" else 0] = 0
            sitk.WriteImage(sitk.GetImageFromArray(written), str(tmp_path / folder / f"{case}.nii.gz"))
    compare = load("exports").compare
    assert compare(tmp_path / "found", tmp_path / "expected", ".nii.gz") == {
        "cases": 2, "identical": 1, "voxels": 48, "differ": 1, "lowest_dice": pytest.approx(2 * 2 / 5),
    }  # fmt: skip
    (tmp_path / "found" / "b.nii.gz").unlink()
    with pytest.raises(RuntimeError, match=r"b\.nii\.gz was not segmented"):
        compare(tmp_path / "found", tmp_path / "expected", ".nii.gz")


# ------------------------------------------------------------------------------------------------------------ stock nnU-Net


@pytest.mark.exhaustive  # nnU-Net forks its workers: behind tests that have left threads of gRPC they may hang
def test_stock_nnunet_trains_on_the_same_cases(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    stock = load("stock_nnunet")
    step, seen, trained = stock.nnUNetTrainer.train_step, [], set[str]()

    def counted(trainer: Any, batch: dict[str, Any]) -> Any:
        trained.update(batch["keys"])
        seen.append((trainer.do_split(), trainer.optimizer.param_groups[0]["lr"]))
        return step(trainer, batch)

    monkeypatch.setattr(stock.nnUNetTrainer, "train_step", counted)
    sites = [str(phantom / name) for name in ("north", "south")]
    small = ["--rounds", "2", "--steps", "3", "--base-features", "4", "--seeds", "4", "--optimizer", "adamw"]
    f = stock.main([*sites, "--test", str(phantom / "test"), *small, "--precision", "bfloat16"])
    assert len(seen) == f["steps"] == 6
    assert [rate for _, rate in seen] == pytest.approx([1e-3] * 3 + [1e-3 * 0.5**0.9] * 3)
    (names, held_out) = seen[0][0]
    assert trained <= set(names)
    assert len(names) == f["cases"] == 7, "of 10: two patients of both sites' nine are held out, one with two cases"
    assert not set(names) & set(held_out)
    assert f["difference"] == pytest.approx(f["mean_ours"][0] - f["mean_stock"][0])
    assert f["standard_error"] is None
    assert "one seed: no standard error" in capsys.readouterr().out
    torch.set_num_threads(threads)


def test_cases_of_the_same_name_are_not_pooled(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in two data sets"):
        load("stock_nnunet").pool([phantom / "north", phantom / "north"], tmp_path / "pooled")


# ------------------------------------------------------------------------------------------------------------ local updates


def test_local_updates_run_and_count_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--patch", "16", "16", "--features", "4", "--steps", "2", "--out", str(tmp_path / "figures.json")]
    found = load("local_updates").main(small)
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    held = {name: round(f["held"], 2) for name, f in found["updates"].items()}
    # a teacher; a network, its gradient and AdamW's two moments; c, c_i, c - c_i and the sum of directions
    assert held == {"plain": 0, "proximal": 0, "distill": 1, "condistfl": 1, "ditto": 4, "scaffold": 4, "fedadamw": 3}
    assert {name for name, f in found["updates"].items() if f["sent"] == 1} == {"scaffold", "fedadamw"}
    assert min(f["ratio"] for f in found["updates"].values()) > 0
    assert "| scaffold |" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- many sites


@pytest.mark.exhaustive
def test_many_sites_runs_and_tells_the_straggler(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_text(STUDY.format(data=phantom, length="steps = 1"))
    small = ["--study", str(tmp_path / "study.toml"), "--rounds", "4", "--steps", "1", "--round-seconds", "12"]
    figures = load("many_sites").main([*small, "--sites", "11", "--out", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    (f,) = figures
    assert f["sites"] == f["cases_scored"] == 11, "each site's other case"
    assert f["asked"] == [10] * 4
    (failure,) = f["failures"]["3"].values()
    assert failure == {"type": "SiteTimeout", "text": "no reply within 12 s"}
    assert (list(f["failures"]), f["exit_code"]) == (["3"], 4)
    assert len(f["round_s"]) == len(f["turn_s"]) == 3
    assert all(5 <= a / b <= 10 for a, b in zip(f["round_s"], f["turn_s"], strict=True))
    assert f["straggler_s"] >= 12
    assert 0 < f["server_before_mb"] <= f["server_peak_mb"]
    assert f["worker_peak_mb"] > 100
    assert "round 3: " in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- unequal hardware


def test_unequal_hardware_runs(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time_box, "ROOM", 0.8)  # such short rounds on a busy machine
    threads = torch.get_num_threads()
    sites = [str(phantom / name) for name in ("north", "south", "west")]
    small = ["--rounds", "2", "--steps", "8", "--features", "4", "--patch", "16", "16", "16"]
    found = load("unequal_hardware").main(
        [*sites, "--test", str(phantom / "test"), *small, "--out", str(tmp_path / "f.json")]
    )
    assert json.loads((tmp_path / "f.json").read_text()) == found
    runs = found["runs"]
    assert list(runs) == ["equal", "waiting", "boxed"]
    assert runs["equal"]["taken"] == runs["waiting"]["taken"] == {"north": 1, "south": 1, "west": 1}
    assert 0 < runs["boxed"]["taken"]["west"] < 1
    assert runs["waiting"]["seconds"] > 2 * runs["equal"]["seconds"]
    assert runs["boxed"]["seconds"] < runs["waiting"]["seconds"]
    assert all(0 <= f["dice"] <= 1 for f in runs.values())
    assert 0 < found["held"]["2"] < found["held"]["6"]
    assert "| boxed |" in capsys.readouterr().out
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------ wrong masks


def test_corrupted_masks_runs_and_moves_half_of_them(phantom: Path, tmp_path: Path) -> None:
    module = load("corrupted_masks")
    n = module.corrupt(phantom / "north", tmp_path / "copy")
    names = sorted(p.name for p in (phantom / "north" / "labelsTr").iterdir())
    same = [
        (phantom / "north" / "labelsTr" / x).read_bytes() == (tmp_path / "copy" / "labelsTr" / x).read_bytes()
        for x in names
    ]
    assert same.count(False) == n == (len(names) + 1) // 2
    study = {
        "study": {"name": "wrong", "seed": 1},
        "sites": {name: {"data": str(phantom / name)} for name in ("north", "south", "west")},
        "test": {"data": str(phantom / "test")},
        "protocol": {"rounds": 1, "steps": 1},
        "network": {"base_features": 4},
        "training": {"batch_size": 2, "patch_size": [16, 16, 8], "mirror": False},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }
    found = module.measure(study, "north", tmp_path / "runs", seeds=1)
    assert found["dice"].keys() == {"mean, with north", "quality", "agreement", "mean, without north"}
    assert found["lost"]["mean, without north"] == 0


def test_the_zoo_is_trained_in_four_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = load("zoo")
    draw = np.random.default_rng(0)
    for site in (*zoo.SITES["skin"], "test"):
        folder = tmp_path / "data" / "skin" / site
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        for i in range(5):
            picture = draw.integers(0, 255, (40, 48, 3)).astype(np.uint8)
            label = np.zeros((40, 48), np.uint8)
            label[8:24, 8:24] = 1
            sitk.WriteImage(sitk.GetImageFromArray(picture, isVector=True), folder / "imagesTr" / f"{site}{i}_0000.png")
            sitk.WriteImage(sitk.GetImageFromArray(label), folder / "labelsTr" / f"{site}{i}.png")
        about = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "lesion": 1}}
        (folder / "dataset.json").write_text(json.dumps(about | {"numTraining": 5, "file_ending": ".png"}))
    how = [str(tmp_path / "data"), "--out", str(tmp_path / "runs"), "--tasks", "skin", "--networks", "cgnet"]
    for more in (["--rounds", "1", "--steps", "1"], ["--table"]):
        with pytest.raises(SystemExit) as ended:
            zoo.main([*how, *more])
        assert ended.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        tables = [i for i, line in enumerate(lines) if line.startswith("|---")]
        found = [lines[i + 1] for i in tables]
        assert all(lines[i - 1].count("|") == lines[i].count("|") == lines[i + 1].count("|") for i in tables)
        assert len(found) == 3
        assert all(row.startswith("| skin | cgnet |") for row in found)
        ways = zoo.rows(tmp_path / "runs" / "skin" / "cgnet")
        for metric, row in zip(("iou", "dice"), found[:2], strict=True):
            told = [float(cell.split()[0]) for cell in row.split("|")[3:-1]]
            assert told == [round(ways[way][metric]["mean"], 3) for way in zoo.WAYS]
        assert ways["federated"]["operations"][0] > ways["splitfed"]["operations"][0] > 0
        assert any(line.startswith("Split − alone, IoU: ") for line in lines)


@pytest.mark.exhaustive
def test_a_simulation_and_a_loopback_train_the_same(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback = load("loopback")
    monkeypatch.setattr(loopback, "PROTOCOLS", ("splitfed",))
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(data=phantom, length="steps = 2"))
    (found,) = loopback.main(["--study", str(study), "--site", "north", "--rounds", "2", "--steps", "2"])
    assert found["same_bits"]
    assert found["loopback"]["up"] == pytest.approx(found["simulation"]["up"], rel=0.01)
    assert found["loopback"]["step_s"] > 0


# ------------------------------------------------------------------------------------------------------------ secure sum


def test_a_secure_sum_costs_the_bytes_of_a_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In tensors so small that headers and shares count, more; the means are the same."""
    small = ["--parameters", "100000", "--sites", "3", "--repeats", "1", "--out", str(tmp_path / "figures.json")]
    (figures,) = load("secure_sum").main(small)
    assert 0.9 < figures.bytes_up < 1.1
    assert 0.99 < figures.bytes_down < 1.1
    assert figures.error < 2e-6
    assert set(figures.rounds) == {"plain", "secure", "lost"}
    assert json.loads((tmp_path / "figures.json").read_text())[0]["sites"] == 3
    assert "Targets" in capsys.readouterr().out


@pytest.mark.slow
def test_pretraining_reads_other_federations_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off after two of four steps, the file is the same; studies of `sam` with its options start from it."""
    rng = np.random.default_rng(0)
    for folder in ("skin/one", "skin/two", "skin/three", "lungs/shenzhen", "lungs/montgomery"):
        for part in ("imagesTr", "labelsTr"):
            (tmp_path / folder / part).mkdir(parents=True)
        colours = (3,) if folder.startswith("skin") else ()
        for i in range(3):
            label = np.zeros((40, 30), np.uint8)
            label[10:20, 8:20] = 1
            image = rng.integers(0, 255, (40, 30, *colours), dtype=np.uint8)
            io.imsave(tmp_path / folder / f"imagesTr/c{i}_0000.png", image, check_contrast=False)
            io.imsave(tmp_path / folder / f"labelsTr/c{i}.png", label, check_contrast=False)
        channels = {str(k): f"c{k}" for k in range(3 if colours else 1)}
        about = {
            "channel_names": channels,
            "labels": {"background": 0, "x": 1},
            "numTraining": 3,
            "file_ending": ".png",
        }
        (tmp_path / folder / "dataset.json").write_text(json.dumps(about))
    made = load("pretrain_encoder")
    monkeypatch.setattr(made, "SAVE", 2)
    monkeypatch.setattr(
        made, "NETWORK", {**made.NETWORK, "width": 32, "heads": 2, "depth": 2, "whole_image_blocks": (0,)}
    )
    asked = [str(tmp_path), "--leave-out", "polyps", "--steps", "4", "--batch-size", "4"]
    made.main([*asked, "--out", str(tmp_path / "whole.safetensors")])
    told = capsys.readouterr().out
    assert "step 4/4 loss" in told
    assert "skin: Dice" in told
    train, out = made.train, tmp_path / "twice.safetensors"

    def cut_off(*given: Any, **how: Any) -> Any:
        yield next(train(*given, **how))
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "train", cut_off)
    with pytest.raises(KeyboardInterrupt):
        made.main([*asked, "--out", str(out)])
    monkeypatch.setattr(made, "train", train)
    made.main([*asked, "--out", str(out)])
    whole, again = (wire.read_tensors(path)[0] for path in (tmp_path / "whole.safetensors", out))
    assert whole.keys() == again.keys()
    assert all(torch.equal(t, again[n]) for n, t in whole.items())
    assert "skin 4, lungs 3" in wire.read_tensors(out)[1]["data"]
    with pytest.raises(SystemExit):
        made.main([str(tmp_path / "skin"), "--out", str(out)])


def test_kept_maps_train_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--size", "32", "--width", "16", "--depth", "2", "--decoder-features", "16", "--batch-size", "2"]
    load("kept_maps").main([*small, "--steps", "2"])
    assert "32 px, width 16, depth 2, batch 2: encoder every time" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ adapters in one place


def test_each_variant_has_its_own_baseline_in_one_place(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = load("adapters")
    study = study_file(tmp_path, phantom, "steps = 2")
    told = study.read_text().replace("rounds = 7", "rounds = 1").replace("[training]", "[training]\nmirror = false")
    study.write_text(
        f"{told}\n[validation]\nleave_one_site_out = true\n[variants.wide]\nnetwork = {{ base_features = 8 }}\n"
    )
    adapters.main([str(study), "--variants", "wide", "--seeds", "1", "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/wide/results.json").read_text())
    models = {m["name"]: m for m in results["models"]}
    assert models.keys() == {"federated", "centralized", "centralized_long"}, "and no site is left out"
    assert len({m["parameters"] for m in models.values()}) == 1
    assert models["federated"]["parameters"] > 50_000, "of the variant, not of the study"
    assert (models["centralized"]["updates"], models["centralized_long"]["updates"]) == (2, 4)
    table = capsys.readouterr().out
    means = dict.fromkeys(models, 0.0)
    for s in results["summary"]:
        if (s["site"], s["metric"], s["label"]) == ("test", "dice", "foreground_mean"):
            means[s["model"]] = s["mean"]
    for name, mean in means.items():
        assert f"| wide | {name} | {mean:.3f} |" in table
    (pair,) = (
        c
        for c in results["comparisons"]
        if {c["a"], c["b"]} == {"federated", "centralized"} and (c["metric"], c["label"]) == ("dice", "foreground_mean")
    )
    more = pair["difference"] * (1 if pair["a"] == "federated" else -1)
    assert f"| wide | centralized | {means['centralized']:.3f} | {more:+.3f}" in table


def test_steps_of_adapters_are_timed_beside_whole_ones(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    load("adapters").main([str(FOLDER.parent / "studies/fedsam-lungs.toml"), "--only-steps", "1"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["whole", "msa", "lora"]
    assert all(float(line.split()[1]) > 0 for line in lines)
