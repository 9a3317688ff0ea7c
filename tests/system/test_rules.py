"""Studies with each aggregation rule from end to end; whom two leave out where one of four sites has wrong masks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from safetensors.torch import load_file
from sessions import quick
from torch import Tensor

from concilium import catalog
from concilium.collect._spool import Spool
from concilium.data.phantom import PhantomSite, write_phantom
from concilium.line import Event, run
from concilium.messages import Judge, Judged
from concilium.site import Site
from concilium.study import Study
from concilium.wire import part

Make = Callable[..., Study]
COLLECT = {"quality": "judged"}
"""Rules that need another way of collecting."""


def last_round(folder: Path) -> Mapping[str, Tensor]:
    (file,) = (folder / "checkpoints" / "federated").glob("[0-9]*.safetensors")
    return load_file(file)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def brief(small_study: Make) -> Make:
    """Two rounds of two steps of the smallest network, without a test set."""

    def make(rule: str, **changes: Any) -> Study:
        collect = {"collect__name": COLLECT[rule]} if rule in COLLECT else {}
        small = {"protocol__name": "federated", "protocol__cut": None, "protocol__rounds": 2, "test": False}
        return quick(small_study, **small | {"aggregation__name": rule} | collect | changes)

    return make


def test_updates_wait_in_the_run_folder_and_do_not_stay(
    brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed run left goes when it goes on."""
    places: list[Path] = []
    put = Spool.put
    monkeypatch.setattr(
        Spool, "put", lambda self, tensors: (places.append(Path(self._folder.name)), put(self, tensors))[1]
    )
    left = tmp_path / "run" / "spool" / "updates-left"

    def stop(event: Event) -> None:
        if event.kind == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(brief("median"), tmp_path / "run", watch=stop)
    left.mkdir(parents=True)
    assert run(brief("median"), tmp_path / "run", resume=True).exit_code == 0
    assert {place.parent for place in places} == {tmp_path / "run" / "spool"}
    assert not (tmp_path / "run" / "spool").exists()


QUICK = {"mean", "adam", "krum", "quality"}
"""These run with the fast tests: a sum, a state, whole updates and judges."""


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in catalog.names("aggregation")]
)
def test_a_study_with_each_rule_runs_to_its_end(rule: str, brief: Make, tmp_path: Path) -> None:
    outcome = run(brief(rule), tmp_path / "run")
    assert outcome.exit_code == 0
    assert all(len(line["sites"]) == 3 and line["failures"] == {} for line in rounds(tmp_path / "run"))
    tensors = last_round(tmp_path / "run")
    assert all(t.isfinite().all() for t in tensors.values())
    weights = load_file(tmp_path / "run" / "weights" / "federated.safetensors")
    assert weights.keys() == part(tensors, "weights/").keys()


@pytest.mark.parametrize("rule", [pytest.param("adam", marks=pytest.mark.slow), "agreement"])
def test_a_run_that_stopped_goes_on_with_what_the_rule_kept(rule: str, brief: Make, tmp_path: Path) -> None:
    """Bits are those of a run without a stop."""

    class Stopped(BaseException):
        pass

    def stop(event: Any) -> None:
        if event.kind == "round" and event.round == 1:
            raise Stopped

    run(brief(rule), tmp_path / "whole")
    with pytest.raises(Stopped):
        run(brief(rule), tmp_path / "run", watch=stop)
    run(brief(rule), tmp_path / "run", resume=True)
    whole, resumed = last_round(tmp_path / "whole"), last_round(tmp_path / "run")
    assert any(name.startswith("rule/") for name in whole)
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)


# ------------------------------------------------------------------------------------------------------------ judges


def test_every_update_of_every_round_is_judged_and_the_bytes_are_counted(brief: Make, tmp_path: Path) -> None:
    run(brief("mean"), tmp_path / "plain")
    run(brief("quality"), tmp_path / "judged")
    for plain, judged in zip(rounds(tmp_path / "plain"), rounds(tmp_path / "judged"), strict=True):
        for site in plain["sites"]:
            ratio = judged["sites"][site]["bytes_down"] / plain["sites"][site]["bytes_down"]
            assert 2.9 < ratio < 3.1, "the weights, and the updates of two others"


def test_a_judge_that_fails_is_told_and_neither_its_update_nor_its_state_is_lost(
    brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The south fails as a judge in the first round: it is not sent back to where it was before it trained."""
    answer = Site.answer
    asked: list[tuple[str, str, int]] = []

    def fails(self: Site, request: Any, cancelled: Any) -> Any:
        asked.append((self.settings.name, type(request).__name__, getattr(request, "number", 0)))
        if isinstance(request, Judge) and self.settings.name == "south" and request.round == 1:
            raise RuntimeError("/secret/path")
        return answer(self, request, cancelled)

    monkeypatch.setattr(Site, "answer", fails)
    outcome = run(brief("quality"), tmp_path / "run")
    first, second = rounds(tmp_path / "run")
    assert set(first["sites"]) == set(second["sites"]) == {"north", "south", "west"}
    assert (set(first["failures"]), second["failures"]) == ({"south"}, {})
    assert outcome.exit_code == 4
    assert ("south", "Restore", 0) in asked  # as the run begins
    assert asked.count(("south", "Restore", 0)) == asked.count(("north", "Restore", 0))
    assert ("south", "Snapshot", 1) in asked


def test_a_site_judges_by_the_first_cases_and_says_a_number(
    brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Site.answer
    judged: list[Judged] = []

    def watched(self: Site, request: Any, cancelled: Any) -> Any:
        reply = answer(self, request, cancelled)
        if isinstance(request, Judge):
            assert request.cases == 1
            judged.append(reply)
        return reply

    monkeypatch.setattr(Site, "answer", watched)
    run(brief("quality", collect__cases=1), tmp_path / "run")
    assert len(judged) == 2 * 3 * 2
    assert all(0 < j.score < 1 and j.n_cases == 1 for j in judged)


# -------------------------------------------------------------------------------------------- a site with wrong masks

FOUR = (
    PhantomSite("north", 8),
    PhantomSite("south", 8, spacing=(1.2, 1.2, 2.0), gain=400.0, offset=-150.0, gamma=0.5, noise=0.05),
    PhantomSite("west", 6, spacing=(0.9, 0.9, 1.2), gain=2500.0, offset=300.0, gamma=1.8, noise=0.08, shading=0.25),
    PhantomSite("east", 10, gamma=0.8, noise=0.06),
)
"""Sites whose scanners differ, so that those with right masks differ too."""


def shift_half(folder: Path) -> None:
    """Move every second label map by half of the image along x and y."""
    for path in sorted((folder / "labelsTr").glob("*.nii.gz"))[::2]:
        image = sitk.ReadImage(str(path))
        moved = np.roll(array := sitk.GetArrayFromImage(image), [n // 2 for n in array.shape[1:]], axis=(1, 2))
        wrong = sitk.GetImageFromArray(moved)
        wrong.CopyInformation(image)
        sitk.WriteImage(wrong, str(path), useCompression=True)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sites, in `right` all with right masks, in `wrong` one with half of them shifted."""
    folder = tmp_path_factory.mktemp("four")
    write_phantom(folder / "right", sites=FOUR, n_test=1, scale=0.5)
    shutil.copytree(folder / "right", folder / "wrong")
    shift_half(folder / "wrong" / "east")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["agreement", "quality"])
@pytest.mark.parametrize("masks", ["wrong", "right"])
def test_a_site_with_half_of_its_masks_wrong_gets_less_than_a_tenth_of_its_weight(
    masks: str, rule: str, four: Path, small_study: Make, tmp_path: Path
) -> None:
    """And honest sites, though their scanners differ, keep theirs, with it and without it."""
    study = small_study(
        sites=tuple(site.name for site in FOUR),
        data=four / masks,
        test=False,
        protocol__rounds=12 if masks == "wrong" else 6,
        protocol__steps=24,
        network__name="unet",
        network__levels=3,
        network__base_features=8,
        training__learning_rate=3e-3,
        training__augmentation="none",
        training__foreground=0.7,
        aggregation__name=rule,
        engine__pictures=False,
        **({"collect__name": COLLECT[rule]} if rule in COLLECT else {}),
    )
    assert run(study, tmp_path / "run").exit_code == 0
    given = {name: float(t) for name, t in part(last_round(tmp_path / "run"), "rule/part/").items()}
    assert given.keys() == {site.name for site in FOUR}
    assert (given.pop("east") < 0.1) == (masks == "wrong")
    assert min(given.values()) > 0.7
