"""Plans from merged fingerprints, against nnU-Net's own planners on the pooled folder (N2)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concilium.data.dataset import open_dataset, read_case
from concilium.data.fingerprint import fingerprint_of_case, merge, to_nnunet
from concilium.data.plan import PLANNERS, make_plans, open_plan
from concilium.errors import ContractError, DataError, StudyError
from concilium.messages import Fingerprint, Geometry, RelativeSize
from concilium.nnunet_parts import default_experiment_planner, get_network_from_plans

LABELS = {"background": 0, "anterior": 1, "posterior": 2}
ABOUT: dict[str, Any] = {"channels": ("MRI",), "labels": LABELS, "file_ending": ".nii.gz"}
SIZES = {"north": 9, "south": 6, "west": 3}
FEDERATIONS = sorted(
    p
    for p in Path(os.environ.get("CONCILIUM_DATA", "/nowhere")).glob("*")
    if p.is_dir() and all((f / "labelsTr").is_dir() for f in p.iterdir() if f.is_dir())
)
"""Not those whose sites hold one sequence each, most of them without label maps."""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.lower().startswith("nnunet")]:
        monkeypatch.delenv(name)


@cache
def fingerprints_of(*folders: Path) -> tuple[Fingerprint, Fingerprint]:
    """Of all cases of these sites: with exact geometry, and with binned."""
    exact, binned = [], []
    for folder in folders:
        dataset = open_dataset(folder)
        for case in dataset.cases:
            image, label, about = read_case(case, dataset)
            assert label is not None
            exact.append(fingerprint_of_case(image, label, about["spacing"], exact_geometry=True))
            binned.append(fingerprint_of_case(image, label, about["spacing"], exact_geometry=False))
    return merge(exact), merge(binned)


@pytest.fixture
def sites(tmp_path: Path, write_site: Callable[..., Path]) -> list[Path]:
    """Sites of 9, 6 and 3 cases; sizes and spacings differ; one in two cases of the last has wide margins of zeros."""
    rng = np.random.default_rng(5)
    found = []
    for name, spacing in zip(SIZES, ((1.0, 1.0, 1.0), (1.2, 0.9, 1.0), (1.1, 1.0, 1.0)), strict=True):
        cases = {}
        for i in range(SIZES[name]):
            shape = tuple(rng.integers((31, 40, 24), (43, 59, 47)))
            image = rng.normal(100, 10, (1, *shape)).astype(np.float32)
            label = np.zeros(shape, np.uint8)
            label[10:20, 10:30, 10:20] = 1 + i % 2
            if name == "west" and i % 2:
                image[:, :8] = 0
            cases[f"{name}{i}"] = (image, label)
        found.append(write_site(tmp_path / name, cases, spacing=spacing, labels=LABELS))
    return found


def made_up(geometry: list[tuple[tuple[int, ...], tuple[float, ...]]], share: int = 1024) -> Fingerprint:
    """A fingerprint of cases with this shape [voxels] and spacing [mm]."""
    image = np.arange(1, 9, dtype=np.float32).reshape(1, 2, 2, 2)
    one = fingerprint_of_case(image, np.ones_like(image), (1, 1, 1), exact_geometry=True)
    n = len(geometry)
    parts = tuple(Geometry(shape, spacing, 1) for shape, spacing in geometry)
    return merge([replace(one, n_cases=n, geometry=parts, relative_sizes=(RelativeSize(share, n),))])


SMALL = made_up([((36, 50, 35), (1.0, 1.0, 1.0))] * 60)
LARGE = made_up([((300, 512, 512), (1.5, 0.8, 0.8))] * 20)
FLAT = made_up([((1, 256, 240), (999.0, 1.0, 1.0))] * 100)


def planned(fingerprint: Fingerprint, configuration: str = "3d_fullres", **options: Any) -> dict[str, Any]:
    plans: dict[str, Any] = json.loads(make_plans(fingerprint, configuration=configuration, **ABOUT | options))
    return plans


def network(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    arguments: dict[str, Any] = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
    return arguments


def comparable(plans: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in plans.items() if k not in ("foreground_intensity_properties_per_channel", "dataset_name")}


# ------------------------------------------------------------------------------------------------- against nnU-Net (N2)


def test_the_plan_is_nnunets_own_on_the_pooled_folder(sites: list[Path], pool: Callable[..., Any]) -> None:
    """In every field but the intensities, which nnU-Net samples, for three memory targets and the residual presets."""
    merged, _ = fingerprints_of(*sites)
    pooled = pool(sites)
    pooled.fingerprint(n_samples=100_000)
    for planner, memory in (
        ("default", None),
        ("default", 2),
        ("default", 16),
        ("resenc_m", None),
        ("resenc_l", None),
        ("resenc_m", 1),
    ):
        options = {} if memory is None else {"gpu_memory_target_in_gb": memory}
        with pytest.warns(UserWarning, match="non-standard") if planner == "resenc_m" and memory else nullcontext():
            theirs = pooled.plans(PLANNERS[planner], **options)
        ours = planned(merged, planner=planner, memory_gb=memory)
        assert ours["configurations"].keys() == theirs["configurations"].keys() == {"2d", "3d_fullres"}
        if planner != "default":
            for name, configuration in theirs["configurations"].items():
                capped = ours["configurations"][name]
                voxels = np.prod(capped["median_image_size_in_voxels"]) * (36 if name == "2d" else 1) * 18
                assert capped["batch_size"] <= configuration["batch_size"]
                assert capped["batch_size"] <= max(2, 1.1 * 0.05 * voxels / np.prod(capped["patch_size"]))
                capped["batch_size"] = configuration["batch_size"]
        assert comparable(ours) == comparable(theirs)


@pytest.mark.parametrize("name", ["hippocampus", pytest.param("glioma3d", marks=pytest.mark.slow)])
def test_the_plan_is_nnunets_own_on_real_sites(
    name: str, federation: Callable[[str], Path], pool: Callable[..., Any]
) -> None:
    folders = [f for f in sorted(federation(name).iterdir()) if not f.name.startswith("test")]
    dataset = open_dataset(folders[0])
    merged, _ = fingerprints_of(*folders)
    pooled = pool(folders)
    pooled.fingerprint(n_samples=100_000)
    about = {"channels": dataset.channels, "labels": dataset.labels}
    for memory in (8, 4):
        theirs = pooled.plans(PLANNERS["default"], gpu_memory_target_in_gb=memory)
        assert comparable(planned(merged, memory_gb=memory, **about)) == comparable(theirs)


def test_a_site_of_three_cases_does_not_plan_for_itself(sites: list[Path]) -> None:
    """The trap: `numTraining` of the small site would give a smaller batch than the federation's."""
    everybody, _ = fingerprints_of(*sites)
    alone, _ = fingerprints_of(*sites[2:])
    assert (everybody.n_cases, alone.n_cases) == (18, 3)
    batches = [planned(f)["configurations"]["2d"]["batch_size"] for f in (everybody, alone)]
    assert batches[0] > 3 * batches[1]


@pytest.mark.parametrize("planner", ["default", pytest.param("resenc_l", marks=pytest.mark.slow)])
def test_low_resolution_is_planned_as_nnunet_does(planner: str, sites: list[Path], pool: Callable[..., Any]) -> None:
    """Large anisotropic volumes; nnU-Net reads the same fingerprint from its own file."""
    merged = made_up(
        [((n, 512, 512), (z, 0.8, 0.8)) for n, z in ((90, 5.0), (200, 2.5), (260, 2.0), (310, 1.5), (80, 5.0))], 700
    )
    pooled = pool(sites)
    settings = pooled.root / "raw" / pooled.name / "dataset.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"numTraining": 5}))
    (pooled.root / "preprocessed" / pooled.name / "dataset_fingerprint.json").write_text(json.dumps(to_nnunet(merged)))
    ours = planned(merged, "3d_lowres", planner=planner)
    with torch.device("meta"):
        theirs = pooled.plans(PLANNERS[planner])
    assert set(ours["configurations"]) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    for name in ("2d", "3d_fullres", "3d_lowres") if planner != "default" else ():
        for plans in (ours, theirs):
            del plans["configurations"][name]["batch_size"]
    assert comparable(ours) == comparable(theirs)
    assert ours["configurations"]["2d"]["use_mask_for_norm"] == [True]


def tried(folder: Path | None) -> Any:
    """Those that another test has read, and pictures; the others with `./test --all`."""
    name = folder.name if folder else "none"
    few = {"hippocampus", "nuclei", "none"}
    return pytest.param(folder, id=name, marks=() if name in few else pytest.mark.exhaustive)


@pytest.mark.parametrize("folder", map(tried, FEDERATIONS or [None]))
def test_binned_geometry_plans_the_same_network(folder: Path | None) -> None:
    if folder is None:
        pytest.skip("needs real data: set CONCILIUM_DATA to a folder of federations")
    folders = [f for f in sorted(folder.iterdir()) if not f.name.startswith("test")]
    dataset = open_dataset(folders[0])
    exact, binned = fingerprints_of(*folders)
    about = {"channels": dataset.channels, "labels": dataset.labels, "file_ending": dataset.file_ending}
    for planner in ("default", "resenc_l"):
        a, b = (planned(f, "2d", planner=planner, **about) for f in (exact, binned))
        assert a["transpose_forward"] == b["transpose_forward"]
        assert a["configurations"].keys() == b["configurations"].keys()
        for name in a["configurations"]:
            if name == "3d_cascade_fullres":
                continue
            x, y = a["configurations"][name], b["configurations"][name]
            for key in ("patch_size", "batch_size", "architecture", "use_mask_for_norm", "batch_dice"):
                assert x[key] == y[key], (planner, name, key)
            assert x["spacing"] == pytest.approx(y["spacing"], rel=2**-11)


# -------------------------------------------------------------------------------------------------------------- options


def test_planning_is_silent_repeatable_and_leaves_no_trace(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("nnUNet_raw", "nnUNet_preprocessed", "get_allowed_n_proc_DA")
    before = [getattr(default_experiment_planner, name) for name in names]
    state, environment, threads = torch.random.get_rng_state(), dict(os.environ), torch.get_num_threads()
    texts = {make_plans(SMALL, configuration="3d_fullres", planner="resenc_m", memory_gb=4, **ABOUT) for _ in range(2)}
    with monkeypatch.context() as patch:
        patch.setattr(default_experiment_planner.ExperimentPlanner, "determine_transpose", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            planned(SMALL)
    assert len(texts) == 1
    assert [getattr(default_experiment_planner, name) for name in names] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (dict(os.environ), torch.get_num_threads()) == (environment, threads)
    assert torch.empty(1).device.type == "cpu"
    assert capfd.readouterr() == ("", "")


def test_base_features_set_the_width() -> None:
    assert network(planned(SMALL), "3d_fullres")["features_per_stage"][:3] == [32, 64, 128]
    for configuration, most in (("3d_fullres", 320), ("2d", 512)):
        features = network(planned(LARGE, base_features=16), configuration)["features_per_stage"]
        assert features == [min(most, 16 * 2**i) for i in range(len(features))]


def test_batch_size_is_replaced_in_its_configuration_only() -> None:
    own, changed = planned(SMALL), planned(SMALL, batch_size=7)
    assert changed["configurations"]["3d_fullres"].pop("batch_size") == 7
    del own["configurations"]["3d_fullres"]["batch_size"]
    assert changed == own


@pytest.mark.parametrize("planner", ["default", "resenc_m"])
def test_patch_size_brings_its_own_topology(planner: str) -> None:
    plans = planned(SMALL, planner=planner, patch_size=(16, 32, 24))
    made = network(plans, "3d_fullres")
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [16, 32, 24]
    # 16 -> 8 -> 4, 32 -> 16 -> 8 -> (one axis of 8 alone is not halved), 24 -> 12 -> 6: by hand
    assert made["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    assert made["kernel_sizes"] == [[3, 3, 3]] * 3
    assert (made["n_stages"], made["features_per_stage"]) == (3, [32, 64, 128])
    blocks = made["n_conv_per_stage"] if planner == "default" else made["n_blocks_per_stage"]
    assert (blocks, made["n_conv_per_stage_decoder"]) == (
        ([2, 2, 2], [2, 2]) if planner == "default" else ([1, 3, 4], [1, 1])
    )
    assert plans["configurations"]["2d"] == planned(SMALL, planner=planner)["configurations"]["2d"]
    plan = open_plan(json.dumps(plans), "3d_fullres")
    settings = plan.configuration
    built = get_network_from_plans(
        settings.network_arch_class_name,
        settings.network_arch_init_kwargs | {"features_per_stage": [2, 4, 8]},
        settings.network_arch_init_kwargs_req_import,
        1,
        3,
        allow_init=False,
        deep_supervision=False,
    )
    assert built(torch.zeros(1, 1, 16, 32, 24)).shape == (1, 3, 16, 32, 24)


def test_the_plans_own_patch_gives_the_plan_back() -> None:
    for fingerprint, configuration in ((SMALL, "3d_fullres"), (LARGE, "3d_lowres"), (FLAT, "2d")):
        own = planned(fingerprint, configuration)
        patch = tuple(own["configurations"][configuration]["patch_size"])
        assert planned(fingerprint, configuration, patch_size=patch) == own


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ((30, 32, 24), r"next size that does is \(32, 32, 24\)"),
        ((33, 33, 33), r"next size that does is \(40, 40, 40\)"),
        ((32, 32), "3 numbers above 0"),
        ((32, 0, 32), "3 numbers above 0"),
        ((7, 7, 7), "nothing to pool"),
    ],
)
def test_patch_sizes_that_cannot_be_are_refused(patch: tuple[int, ...], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        planned(SMALL, patch_size=patch)


def test_the_size_named_is_accepted() -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        patch = tuple(int(n) for n in rng.integers(8, 80, 3))
        try:
            planned(SMALL, patch_size=patch)
        except StudyError as e:
            named = str(e).split("does is (")[1].split(")")[0]
            planned(SMALL, patch_size=tuple(int(n) for n in named.split(",")))


@pytest.mark.parametrize(
    ("fingerprint", "configuration", "options", "words"),
    [
        (LARGE, "3d_cascade_fullres", {}, "not federated yet.*3d_lowres"),
        (SMALL, "3d", {}, "unknown.*2d, 3d_fullres, 3d_lowres"),
        (FLAT, "3d_fullres", {}, r"two-dimensional\. There are: 2d\."),
        (FLAT, "3d_lowres", {}, "two-dimensional"),
        (SMALL, "3d_lowres", {}, r"covers the images well enough\. There are: 2d, 3d_fullres\."),
        (SMALL, "2d", {"planner": "large"}, "default, resenc_m, resenc_l, resenc_xl"),
        (SMALL, "2d", {"memory_gb": 0.0}, "memory_gb is 0"),
        (SMALL, "2d", {"memory_gb": float("nan")}, "memory_gb is nan"),
        (SMALL, "2d", {"base_features": -1}, "base_features is -1"),
        (SMALL, "2d", {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_can(
    fingerprint: Fingerprint, configuration: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(StudyError, match=words):
        planned(fingerprint, configuration, **options)


def test_no_foreground_anywhere_is_refused() -> None:
    image = np.ones((1, 4, 4, 4), np.float32)
    with pytest.raises(DataError, match="foreground"):
        planned(fingerprint_of_case(image, 0 * image, (1, 1, 1), exact_geometry=True))


# -------------------------------------------------------------------------------------------------------------- opening


def test_an_opened_plan_says_what_others_need() -> None:
    plan = open_plan(make_plans(LARGE, configuration="3d_fullres", **ABOUT), "3d_fullres")
    settings = json.loads(make_plans(LARGE, configuration="3d_fullres", **ABOUT))["configurations"]["3d_fullres"]
    assert plan.patch_size == tuple(settings["patch_size"])
    assert (plan.batch_size, plan.batch_dice) == (2, True)
    assert plan.spacing == (1.5, 0.8, 0.8)
    assert plan.transpose_forward == (0, 1, 2)
    assert [list(s) for s in plan.strides] == settings["architecture"]["arch_kwargs"]["strides"]
    assert plan.architecture == settings
    assert plan.manager.image_reader_writer_class.__name__ == "SimpleITKIO"
    assert plan.configuration.preprocessor_class.__name__ == "DefaultPreprocessor"


def test_what_a_configuration_inherits_is_resolved() -> None:
    plans = planned(SMALL)
    plans["configurations"]["3d_small_batch"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    plan = open_plan(json.dumps(plans), "3d_small_batch")
    assert plan.batch_size == plan.architecture["batch_size"] == 3
    assert plan.architecture["architecture"] == plans["configurations"]["3d_fullres"]["architecture"]


def test_nnunets_own_plan_is_opened(sites: list[Path], pool: Callable[..., Any]) -> None:
    pooled = pool(sites)
    pooled.fingerprint(n_samples=1000)
    theirs = pooled.plans(PLANNERS["default"])
    assert open_plan(json.dumps(theirs), "2d").patch_size == tuple(theirs["configurations"]["2d"]["patch_size"])


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans")
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"configurations": 3}', '{"configurations": {"2d": {}}}', '{"configurations": {"2d": []}}'],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ContractError, match=r"Make it again\."):
        open_plan(text, "2d")


def test_a_configuration_that_is_not_there_is_refused() -> None:
    with pytest.raises(StudyError, match="There are: 2d, 3d_fullres"):
        open_plan(json.dumps(planned(SMALL)), "3d_lowres")


@pytest.mark.parametrize("key", ["network_class_name", "conv_op", "nonlin"])
def test_a_plan_that_names_foreign_code_is_refused(key: str) -> None:
    """nnU-Net would import it, whatever it is."""
    plans = planned(SMALL)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    place = architecture if key in architecture else architecture["arch_kwargs"]
    for name in ("os.system", "torch.hub.load", ["torch.nn.Conv3d"], 3):
        place[key] = name
        with pytest.raises(ContractError, match=r"Allowed is what begins with torch\.nn\."):
            open_plan(json.dumps(plans), "3d_fullres")
