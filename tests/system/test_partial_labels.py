"""Runs of sites that annotate some labels only: one network of all labels, and nobody taught that unknown is background."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file
from torch import equal

from concilium.data.dataset import folds
from concilium.data.labels import n_heads, silenced
from concilium.data.phantom import DEFAULT_SITES, write_phantom
from concilium.errors import DataError, StudyError
from concilium.exports import export_run
from concilium.finished import open_finished
from concilium.line import Event, Outcome, run
from concilium.messages import PlugIn
from concilium.predict import predict
from concilium.rehearsal import try_loss, try_rule
from concilium.study import Study

pytestmark = pytest.mark.slow

Make = Callable[..., Study]


@pytest.fixture
def partly(small_study: Make, phantom: Path) -> Make:
    """A study in which north looked for organs and south for lesions; west for both."""

    def make(**changes: Any) -> Study:
        sites = {
            "sites__north": {"data": str(phantom / "north"), "annotated": ["organ"]},
            "sites__south": {"data": str(phantom / "south"), "annotated": ["lesion"]},
        }
        return small_study(**{"loss__name": "marginal"} | sites | changes)

    return make


def statuses(outcome: Outcome, model: str, site: str) -> dict[str, set[str]]:
    """Label -> whether it is scored at a site's validation cases."""
    found: dict[str, set[str]] = {}
    for row in outcome.results["cases"]:
        if (row["model"].partition(":")[0], row["site"]) == (model, site):
            found.setdefault(row["label"], set()).add("not annotated" if row["status"] == "not_annotated" else "scored")
    return found


def test_every_protocol_learns_and_is_scored_on_what_is_annotated(partly: Make, tmp_path: Path) -> None:
    outcome = run(partly(protocol__compare=["local", "centralized"], protocol__rounds=1), tmp_path / "run")
    assert outcome.exit_code == 0
    for model in ("federated", "local", "centralized"):
        assert statuses(outcome, model, "north") == {"organ": {"scored"}, "lesion": {"not annotated"}}
        assert statuses(outcome, model, "south") == {"organ": {"not annotated"}, "lesion": {"scored"}}
        assert statuses(outcome, model, "west") == {"organ": {"scored"}, "lesion": {"scored"}}
    assert statuses(outcome, "federated", "test") == {"organ": {"scored"}, "lesion": {"scored"}}
    told = [row for row in outcome.results["summary"] if (row["model"], row["site"]) == ("federated", "north")]
    assert {(r["mean"], r["n"], r["n_undefined"]) for r in told if r["label"] == "lesion"} == {(None, 0, 0)}
    assert all(r["n"] > 0 for r in told if r["label"] == "organ" and r["metric"] == "dice")
    assert any("north annotates organ only" in text for text in outcome.results["warnings"])


def test_what_a_label_map_says_of_unknown_labels_changes_nothing(partly: Make, phantom: Path, tmp_path: Path) -> None:
    """A site's label maps may hold what it says it did not look for; and its dataset.json may know only its own labels."""
    own = tmp_path / "own"
    shutil.copytree(phantom / "north", own)
    about = json.loads((own / "dataset.json").read_text())
    about["labels"] = {"background": 0, "organ": 1}
    (own / "dataset.json").write_text(json.dumps(about | {"annotated": ["organ"]}))
    for path in (own / "labelsTr").iterdir():
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(image * sitk.Cast(image == 1, image.GetPixelID()), str(path))
    one = run(partly(protocol__rounds=1, test=False), tmp_path / "one")
    other = run(
        partly(protocol__rounds=1, test=False, sites__north={"data": str(own)}),
        tmp_path / "other",
    )
    a, b = (load_file(o.folder / "weights" / "federated.safetensors") for o in (one, other))
    assert all(equal(a[name], b[name]) for name in a)


def test_split_training_learns_partial_labels(partly: Make, tmp_path: Path) -> None:
    network = {"network__name": "unet", "network__levels": 2, "protocol__name": "splitfed", "protocol__cut": "shallow"}
    outcome = run(partly(protocol__rounds=1, test=False, **network), tmp_path / "run")
    assert outcome.exit_code == 0
    assert statuses(outcome, "splitfed", "south") == {"organ": {"not annotated"}, "lesion": {"scored"}}


def test_a_loss_that_needs_all_labels_is_refused_before_anything_trains(partly: Make, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"\[loss\] name = 'dice_ce' is not allowed where sites annotate some labels"):
        run(partly(loss__name="dice_ce"), tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


@pytest.fixture
def by_case(small_study: Make, tmp_path: Path) -> Make:
    """A study in which north looked in every second case for organs, in the others for lesions; south for both."""
    write_phantom(tmp_path / "by_case", sites=[DEFAULT_SITES[0]], n_test=0, scale=0.5)
    own = tmp_path / "by_case" / "north"
    about = json.loads((own / "dataset.json").read_text())
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (own / "labelsTr").iterdir())
    about["annotated"] = {case: [["organ"], ["lesion"]][i % 2] for i, case in enumerate(cases)}
    (own / "dataset.json").write_text(json.dumps(about))

    def make(**changes: Any) -> Study:
        few = {"sites": ("north", "south"), "sites__north": {"data": str(own)}, "test": False, "protocol__rounds": 1}
        return small_study(**few | changes)

    return make


def test_what_is_annotated_case_by_case_is_seen_before_anything_trains(by_case: Make, tmp_path: Path) -> None:
    """The site as a whole looked for everything; no case of it was looked through for all."""
    with pytest.raises(
        StudyError, match=r"\[loss\] name = 'dice_ce' is not allowed where sites annotate some labels only"
    ):
        run(by_case(), tmp_path / "refused")
    assert not (tmp_path / "refused" / "rounds.jsonl").exists()
    outcome = run(by_case(loss__name="marginal"), tmp_path / "run")
    assert outcome.exit_code == 0
    assert statuses(outcome, "federated", "north") == {key: {"scored", "not annotated"} for key in ("organ", "lesion")}
    assert any("north annotates some labels only in some cases" in text for text in outcome.results["warnings"])
    assert not any("south annotates" in text for text in outcome.results["warnings"])


def test_a_trainer_of_nnunet_is_told_another_local_update_not_another_loss(by_case: Make) -> None:
    study = by_case()
    with pytest.raises(
        StudyError, match=r"'nnunet_trainer' is not allowed .*Allowed: .*plain.*Choose another local update"
    ):
        try_loss(replace(study, local_update=PlugIn("nnunet_trainer")), {"background": 0, "organ": 1, "lesion": 2})


def test_a_site_in_which_nothing_is_annotated_is_refused(small_study: Make, phantom: Path, tmp_path: Path) -> None:
    """Its cases would count in the mean, and no step of it would do anything. Single cases may have nothing."""
    own = tmp_path / "own"
    shutil.copytree(phantom / "north", own)
    about = json.loads((own / "dataset.json").read_text())
    cases = [path.name.removesuffix(".nii.gz") for path in (own / "labelsTr").iterdir()]
    (own / "dataset.json").write_text(json.dumps(about | {"annotated": []}))
    changes = {"sites": ("north", "south"), "sites__north": {"data": str(own)}, "loss__name": "marginal", "test": False}
    with pytest.raises(DataError, match=r"of no case any label is annotated \(\d+ cases.*take the site out"):
        run(small_study(**changes), tmp_path / "refused")
    (own / "dataset.json").write_text(
        json.dumps(about | {"annotated": {key: ["organ"] for key in cases[1:]} | {cases[0]: []}})
    )
    assert run(small_study(**changes, protocol__rounds=1), tmp_path / "run").exit_code == 0


@pytest.mark.parametrize("patch", [[16, 16, 8], [16, 16]], ids=["3D", "2D"])
def test_the_shared_network_teaches_what_a_site_does_not_annotate(
    patch: list[int], partly: Make, tmp_path: Path
) -> None:
    """With deep supervision; the baseline that shares nothing has no teacher."""
    flat = {"plan__configuration": "2d"} if len(patch) == 2 else {}
    changes = {
        "test": False, "training__patch_size": patch, "training__optimizer": "sgd", "protocol__compare": ["local"], **flat,
    }  # fmt: skip
    plain = run(partly(**changes), tmp_path / "plain")
    update = {"local_update__name": "condistfl", "local_update__weight": 20.0, "local_update__first_weight": 1.0}
    taught = run(partly(**changes, **update), tmp_path / "taught")
    assert (plain.exit_code, taught.exit_code) == (0, 0)
    paths = ["weights/federated", *(f"sites/{site}/models/local" for site in ("north", "south", "west"))]
    a, b = ([load_file(o.folder / f"{path}.safetensors") for path in paths] for o in (plain, taught))
    assert [all(equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True)] == [False, True, True, True]


def test_where_everything_is_annotated_there_is_nothing_to_teach(small_study: Make, tmp_path: Path) -> None:
    """To the bit."""
    found = []
    for name in ("plain", "condistfl"):
        changes = {"local_update__name": name, "loss__name": "marginal", "sites": ("north", "south"), "test": False}
        outcome = run(small_study(**changes), tmp_path / name)
        found.append(load_file(outcome.folder / "weights" / "federated.safetensors"))
    assert all(equal(found[0][n], found[1][n]) for n in found[0])


def test_labels_to_teach_that_there_are_not_are_refused_before_anything_trains(partly: Make, tmp_path: Path) -> None:
    study = partly(local_update__name="condistfl", local_update__groups=[["organ", "leison"]])
    with pytest.raises(StudyError, match=r"names 'leison'\. Did you mean 'lesion'"):
        run(study, tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def held_out_only(cases: list[str]) -> dict[str, list[str]]:
    """What is annotated where no case that trains is, and the site may take part: all in those that fold 0 holds out."""
    held_out = folds(cases, 5, 0)
    return {case: ["organ", "lesion"] if case in held_out else [] for case in cases}


def annotating(source: Path, folder: Path, what: Callable[[list[str]], Any]) -> Path:
    """A copy of a data set whose dataset.json says what is annotated, of the names of its cases."""
    shutil.copytree(source, folder)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").iterdir())
    about = json.loads((source / "dataset.json").read_text()) | {"annotated": what(cases)}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("protocol", ["federated", "splitfed v1", "splitfed v2"])
def test_a_round_in_which_nothing_is_annotated_changes_nothing(
    protocol: str, small_study: Make, phantom: Path, tmp_path: Path
) -> None:
    """Neither weights nor running statistics, nor the optimiser at the server: the south's turn comes second."""
    name, _, variant = protocol.partition(" ")
    south = annotating(phantom / "south", tmp_path / "south", held_out_only)
    kept: list[dict[str, Any]] = []

    def watch(event: Event) -> None:
        if event.kind == "round":
            (state,) = (tmp_path / "run" / "checkpoints" / name).glob(f"*{event.round}.safetensors")
            kept.append(load_file(state))

    changes = {"protocol__variant": variant} if variant else {}
    study = small_study(
        sites=("north", "south"), sites__south={"data": str(south)}, test=False,
        loss__name="marginal", network__name="unet", network__norm="batch", network__levels=3, protocol__rounds=2,
        protocol__name=name, protocol__min_sites=1, protocol__cohorts=[["north"], ["south"]], **changes,
    )  # fmt: skip
    outcome = run(study, tmp_path / "run", watch=watch)
    assert outcome.exit_code == 0
    assert kept[0].keys() == kept[1].keys()
    assert [n for n in kept[0] if not equal(kept[0][n], kept[1][n])] == []
    lines = [json.loads(line)["sites"] for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert (lines[1]["south"]["n_steps"], lines[1]["south"]["loss"]) == (0, 0.0)


def test_batches_in_which_nothing_is_annotated_are_no_steps(small_study: Make, phantom: Path, tmp_path: Path) -> None:
    """The loss is the mean over the others, which is about 2 in the first round; a site that took none changes no mean."""
    folder = annotating(phantom / "north", tmp_path / "n", lambda cases: {case: [] for case in cases[::2]})
    south = annotating(phantom / "south", tmp_path / "s", held_out_only)
    changes = {
        "loss__name": "marginal",
        "test": False,
        "protocol__rounds": 1,
        "protocol__steps": 8,
        "training__batch_size": 1,
    }
    found = {}
    for sites in (("north",), ("north", "south")):
        study = small_study(
            sites=sites, **{"sites__north": {"data": str(folder)}}, protocol__min_sites=1,
            **({"sites__south": {"data": str(south)}} if "south" in sites else {}), **changes,
        )  # fmt: skip
        out = tmp_path / "-".join(sites)
        assert run(study, out).exit_code == 0
        found[sites] = json.loads((out / "rounds.jsonl").read_text())["sites"]["north"]
        assert 0 < found[sites]["n_steps"] < found[sites]["n_asked"] == 8
        assert found[sites]["loss"] > 1.7


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "agreement", "quality"])
def test_rules_that_compare_sites_are_refused_where_these_annotate_different_labels(
    rule: str, partly: Make, tmp_path: Path
) -> None:
    """They would throw out the only site that annotates a label."""
    collect = {"collect__name": "judged"} if rule == "quality" else {}
    with pytest.raises(
        StudyError, match=r"\(north: organ; south: lesion; west: lesion, organ\).* Allowed: 'adam', 'fednova', 'mean'"
    ):
        run(partly(aggregation__name=rule, test=False, **collect), tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_where_all_look_for_the_same_rules_may_compare_sites() -> None:
    same = dict.fromkeys(("north", "south", "west"), frozenset({"organ"}))
    try_rule("krum", same)
    try_rule("mean", same | {"west": frozenset({"lesion"})})
    with pytest.raises(StudyError, match="west: nothing"):
        try_rule("krum", same | {"west": frozenset()})


def test_own_heads_draw_and_are_scored_on_what_their_site_looked_for(
    partly: Make, phantom: Path, tmp_path: Path
) -> None:
    """SegViz: heads stay at their sites. What north's never learnt, it neither draws nor is blamed for; its body is shared."""
    study = partly(loss__name="own_labels", sharing__keep=["heads"], protocol__rounds=1, protocol__compare=["local"])
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    found: dict[str, dict[str, set[str]]] = {}
    for row in outcome.results["cases"]:
        if row["subset"] == "test":
            told = "not annotated" if row["status"] == "not_annotated" else "scored"
            found.setdefault(row["model"], {}).setdefault(row["label"], set()).add(told)
    for name in ("federated", "local"):
        assert found[f"{name}:north"] == {"organ": {"scored"}, "lesion": {"not annotated"}}
        assert found[f"{name}:south"] == {"organ": {"not annotated"}, "lesion": {"scored"}}
        assert found[f"{name}:west"] == {"organ": {"scored"}, "lesion": {"scored"}}
    assert open_finished(tmp_path / "run", "federated:north").unknown == ("lesion",)
    assert not predict(
        tmp_path / "run", phantom / "north" / "imagesTr", tmp_path / "n", model="federated:south", device="cpu"
    )
    for path in (tmp_path / "n").glob("*.nii.gz"):
        assert 1 not in sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    with pytest.raises(StudyError, match="never learnt lesion"):
        export_run(tmp_path / "run", tmp_path / "out", format="safetensors", model="federated:north")


def test_without_the_one_site_that_looked_for_a_label_it_is_unknown(
    small_study: Make, phantom: Path, tmp_path: Path
) -> None:
    """The model of the others never learnt it: it is neither drawn nor scored with it."""
    sites = {
        "sites__north": {"data": str(phantom / "north"), "annotated": ["organ"]},
        "sites__south": {"data": str(phantom / "south"), "annotated": ["organ", "lesion"]},
    }
    changes = {"sites": ("north", "south"), "loss__name": "marginal", "validation__leave_one_site_out": True}
    outcome = run(small_study(**changes, **sites, protocol__rounds=1, validation__every=1), tmp_path / "run")
    assert outcome.exit_code == 0
    without = "federated-without-south"
    for site in ("south", "test"):
        assert statuses(outcome, without, site) == {"organ": {"scored"}, "lesion": {"not annotated"}}
        assert statuses(outcome, "federated", site) == {"organ": {"scored"}, "lesion": {"scored"}}
    assert statuses(outcome, "federated-without-north", "south") == {"organ": {"scored"}, "lesion": {"scored"}}
    told = [text for text in outcome.results["warnings"] if "no site that trains annotates" in text]
    assert told == [f"{without}: no site that trains annotates lesion: not drawn and not scored (not_annotated)."]
    unknown = [
        open_finished(tmp_path / "run", name).unknown for name in (without, "federated", "federated-without-north")
    ]
    assert unknown == [("lesion",), (), ()]
    with pytest.raises(StudyError, match="never learnt lesion"):
        export_run(tmp_path / "run", tmp_path / "out", format="safetensors", model=without)


@pytest.mark.parametrize("keep", [["head*"], ["head*.bias"]], ids=["all", "biases alone"])
def test_own_heads_are_known_by_their_tensors(keep: list[str], partly: Make, tmp_path: Path) -> None:
    """Not by the word `heads`, and not where some of them are shared."""
    changes = {
        "sharing__keep": keep,
        "protocol__rounds": 1,
        "test": False,
        "network__name": "unet",
        "network__levels": 3,
    }
    outcome = run(partly(loss__name="own_labels", **changes), tmp_path / "run")
    own = keep == ["head*"]
    lesion = {"not annotated"}
    assert statuses(outcome, "federated", "north") == {"organ": {"scored"}, "lesion": lesion}, "in its own cases"
    assert open_finished(tmp_path / "run", "federated:north").unknown == (("lesion",) if own else ())


def test_own_plans_keep_own_heads_by_pattern(partly: Make, phantom: Path, tmp_path: Path) -> None:
    changes = {"plan__fingerprint": "site", "sharing__keep": ["head*"], "protocol__rounds": 1}
    outcome = run(partly(loss__name="own_labels", **changes), tmp_path / "run")
    found = {row["label"]: row["status"] for row in outcome.results["cases"]
             if (row["model"], row["subset"]) == ("federated:north", "test")}  # fmt: skip
    assert found["lesion"] == "not_annotated"
    assert found["organ"] != "not_annotated"
    assert open_finished(tmp_path / "run", "federated:south").unknown == ("organ",)


@pytest.mark.parametrize("regions", [False, True])
def test_a_label_that_is_silenced_never_wins(regions: bool) -> None:
    labels = {"background": 0, "a": (1, 2), "b": 2} if regions else {"background": 0, "a": 1, "b": 2}
    logits = torch.randn(n_heads(labels), 6, 6, 6).half()
    quiet = silenced(logits, labels, ["b"])
    assert bool((quiet[-1] < -9e3).all())
    assert torch.equal(quiet[:-1], logits[:-1])
    assert silenced(logits, labels, []) is logits
    assert bool(logits[-1].isfinite().all())
