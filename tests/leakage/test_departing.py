"""Audits of a receiver that departs from the protocol; and of updates: of one site, summed, and private."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concilium import catalog
from concilium.attacks import Cases, Release
from concilium.attacks.membership_of_updates import _gradients
from concilium.errors import StudyError
from concilium.leakage import Amount, Asked, leakage
from concilium.leakage.audit import Attack
from concilium.leakage.exchange import Sender, split_way
from concilium.leakage.scores import auc_of
from concilium.leakage.steering import steered_scenes
from concilium.leakage.subject import Subject, subject_of
from concilium.leakage.updates import _behind, _candidates, update_scenes
from concilium.messages import PlugIn

FEW = Amount(victims=8, own=8, gallery=8, steering=3)


def test_fronts_get_the_attackers_gradients_and_it_the_maps_that_follow(split_run: Path, tmp_path: Path) -> None:
    of = subject_of(split_run, None, auxiliary=None, work=tmp_path)
    (scene,) = steered_scenes(of, None, FEW)
    came: list[Release] = []

    def answer(release: Release) -> tuple[torch.Tensor, ...]:
        came.append(release)
        return tuple(scale * torch.ones_like(m) for m in release.maps)

    fronts = {}
    for scale in (0.0, 1.0):
        came.clear()
        sent = scene.known.open_steer(answer)
        assert [(r.site, r.step) for r in came] == [(site, step) for step in range(3) for site in of.sites] or len(
            came
        ) == 6
        assert [(r.site, r.step) for r in sent] == [(site, step) for step in (1, 2) for site in of.sites]
        fronts[scale] = sent
    held, moved = fronts[0.0], fronts[1.0]
    way = split_way(of, None, 1)
    front, places, _ = Sender(of, way).known_front()
    with torch.no_grad():
        own = [front.run((x,))[places[0]] for x in scene.truth.images.split(2)]
    assert all(torch.allclose(r.maps[0], m, atol=1e-3) for r, m in zip(held, own, strict=True)), (
        "without a gradient it stays"
    )
    assert not any(torch.allclose(a.maps[0], b.maps[0], atol=1e-3) for a, b in zip(held, moved, strict=True))


def test_it_is_run_where_it_is_asked_for_only(split_run: Path, tmp_path: Path) -> None:
    options = {"feature_hijack": {"steps": 2, "width": 4}}
    told = leakage(split_run, tmp_path, asked=Asked(attacks=("feature_hijack",), options=options, amount=FEW))
    assert {(r["attack"], r["metric"]) for r in told["rows"]} == {
        ("feature_hijack", "ssim"),
        ("feature_hijack", "psnr"),
    }
    with pytest.raises(StudyError, match="Options of feature_hijack were given, which is not run"):
        leakage(split_run, tmp_path / "all", asked=Asked(options=options, amount=FEW))


# ----------------------------------------------------------------------------------------------------------------- updates


def subject_with(folder: Path, work: Path, **tables: Any) -> Subject:
    """The run as one of a study with other tables, trained no further."""
    of = subject_of(folder, None, auxiliary=None, work=work)
    return replace(of, study=replace(of.study, **tables))


def plug_in(kind: str, name: str, **options: Any) -> PlugIn:
    filled, problems = catalog.fill(kind, name, options, "")
    assert not problems
    return PlugIn(name, filled)


def area(of: Subject) -> float:
    """AUC of the question who was in a step."""
    (scene,) = update_scenes(of, Amount(victims=4, own=8, gallery=8), images=False, members=True)
    guess = Attack("membership_of_updates", {"own": 8}, 0)(scene.transcript, scene.known, scene.auxiliary)
    return auc_of(guess.of("members").numpy().astype(float), scene.trained_on.numpy())[0]


def test_who_was_in_a_step_is_told_by_its_update(federated_run: Path, tmp_path: Path) -> None:
    assert area(subject_with(federated_run, tmp_path)) > 0.9


def test_patches_of_others_are_drawn_as_those_in_the_step(federated_run: Path, tmp_path: Path) -> None:
    """Were these plain and those augmented, how a patch looks would tell who was in the step."""
    how = {"augmentation": "nnunet", "foreground": 0.0}
    training = replace(subject_with(federated_run, tmp_path).study.training, **how)
    of = subject_with(federated_run, tmp_path / "augmented", training=training)
    plain = [of.plain_patch(s, e).image for s, j in of.jobs.items() for e in j.entries["training"]]
    truth = Cases(torch.zeros(6, *plain[0].shape[1:]), torch.zeros(6, *plain[0].shape[2:], dtype=torch.long))
    asked, trained_on = _candidates(of, truth, frozenset(), FEW)
    assert trained_on.tolist() == 6 * [True] + 6 * [False]
    first = torch.cat(
        [
            of.batches(of.jobs[s], of.jobs[s].entries["training"]).draw("members", s, i).image
            for i, s in enumerate(sorted(of.jobs))
        ]
    )
    assert all(any(torch.equal(x, y) for x in asked.images[6:]) for y in first), "as the study draws them"
    assert not any(torch.equal(x, p[0]) for x in asked.images[6:] for p in plain)


def test_an_attack_for_which_too_few_are_left_is_named_and_the_others_run(federated_run: Path, tmp_path: Path) -> None:
    asked = Asked(attacks=("membership_of_updates", "membership"), amount=replace(FEW, victims=160))
    told = leakage(federated_run, tmp_path, asked=asked)
    assert {r["attack"] for r in told["rows"]} == {"membership"}
    assert any(n.startswith("membership_of_updates was not run. ") for n in told["notes"])


def test_of_private_updates_the_patients_are_worked_out_as_the_site_drew_them(
    federated_run: Path, tmp_path: Path
) -> None:
    """With next to no noise an update is the sum of the clipped gradients of the truth's patients, and with much it is not."""
    pytest.importorskip("opacus")
    alike = {}
    for noise in (1e-4, 1.0):
        how = plug_in("local_updates", "dp_sgd", rate=0.4, patches=1, noise=noise, clip=0.1)
        of = subject_with(federated_run, tmp_path / str(noise), local_update=how)
        (scene,) = update_scenes(of, FEW, images=True, members=False)
        assert sum(n for r in scene.transcript for n, _ in r.parts) == len(scene.truth.images) > 2
        whole, n = scene.known.open_whole.train(), 0
        rows = _gradients(whole, scene.known.loss or fail, scene.truth)
        for r in scene.transcript:
            mine = rows[n : (n := n + r.parts[0][0])]
            clipped = (mine * (0.1 / mine.norm(dim=1, keepdim=True)).clamp_max(1)).sum(0)
            update = torch.cat([r.update[name].flatten() for name, _ in whole.named_parameters()])
            alike[noise, r.site] = float(torch.cosine_similarity(clipped, update, dim=0))
        found, who = _behind(of, "north", of.number + 1)
        theirs = [e for e in of.jobs["north"].entries["training"] if ("north", e.member, e.patient) in who]
        patches = [x.numpy() for x in found.images]
        assert len(who) == len(patches)  # of a patient with two cases, one of them
        shown = set()
        for e in theirs:
            image = of.prepared(of.jobs["north"], e).image
            if any(np.array_equal(image, x) for x in patches):
                shown.add((e.member, e.patient))
        assert len(shown) > len(who) / 2  # most patches are the whole image here
    assert all(found > 0.99 for (noise, _), found in alike.items() if noise < 1), alike
    assert all(found < 0.3 for (noise, _), found in alike.items() if noise == 1), alike


def fail(*_: Any) -> Any:
    raise AssertionError


def test_of_a_secure_sum_the_mean_of_the_updates_is_attacked(federated_run: Path, tmp_path: Path) -> None:
    collect = plug_in("collect", "secure_sum", threshold=2)
    (summed,) = update_scenes(
        subject_with(federated_run, tmp_path / "sum", collect=collect), FEW, images=True, members=False
    )
    (single,) = update_scenes(subject_with(federated_run, tmp_path / "each"), FEW, images=True, members=False)
    (of_all,), each = summed.transcript, {r.site: r for r in single.transcript}
    assert (of_all.site, [n for n, _ in of_all.parts]) == ("sum", [2, 2])
    assert sum(share for _, share in of_all.parts) == pytest.approx(1)
    assert torch.equal(
        summed.truth.images, torch.cat([single.truth.images[2 * [*each].index(n) :][:2] for n in ("north", "south")])
    )
    for name, value in of_all.update.items():
        mean = sum(
            share * each[site].update[name] for site, (_, share) in zip(("north", "south"), of_all.parts, strict=True)
        )
        assert torch.allclose(value, torch.as_tensor(mean), atol=1e-6)
    guess = Attack("gradient_inversion", {"steps": 2}, 0)(summed.transcript, summed.known, summed.auxiliary)
    assert guess.of("images").shape == summed.truth.images.shape
    adam = plug_in("aggregation", "adam")
    other = subject_with(federated_run, tmp_path / "no", collect=collect, aggregation=adam)
    with pytest.raises(StudyError, match="Sums of updates under"):
        list(update_scenes(other, FEW, images=True, members=False))
