"""Studies in which tensors stay at the sites, and in which sites' networks differ, from file to results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sessions import quick
from torch import Tensor

from concilium.answers.train import Learner
from concilium.data.phantom import PhantomSite, write_phantom
from concilium.errors import StudyError
from concilium.exports import export_run
from concilium.finished import finished_models, open_finished
from concilium.line import Event, run
from concilium.messages import Fetch, Front, Keep, Personalize, Train, Trained
from concilium.predict import predict
from concilium.site import Site
from concilium.study import Study

pytestmark = pytest.mark.slow

Make = Callable[..., Study]
SITES = ("north", "south", "west")
KEEP = {
    "norms": ["norms"],
    "heads": ["heads"],
    "stem and a pattern": ["stem", "up0.*"],
    "decoder": ["decoder"],
}


@pytest.fixture(scope="session")
def brief(small_study: Make) -> Make:
    """Three rounds of two steps of a small U-Net at three sites, without a test set, with batch norms."""

    def make(**changes: Any) -> Study:
        small = {"protocol__name": "federated", "protocol__cut": None, "test": False, "network__norm": "batch"}
        if changes.get("protocol__name") == "splitfed":
            small["protocol__cut"] = "shallow"
        if "network__name" in changes:
            small |= {"network__levels": None, "network__norm": None, "network__base_features": 4}
        return quick(small_study, **small | changes)

    return make


def at_site(folder: Path, site: str, model: str = "federated") -> dict[str, Tensor]:
    return load_file(folder / "sites" / site / "models" / f"{model}.safetensors")


def rounds(folder: Path, model: str = "federated") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [line for line in lines if line["model"] == model]


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def seen_at_sites(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    """What passes every site's door: its name, the request, the reply."""
    passed: list[tuple[str, Any, Any]] = []
    answer = Site.answer

    def watched(self: Site, request: Any, cancelled: Any) -> Any:
        reply = answer(self, request, cancelled)
        passed.append((self.settings.name, request, reply))
        return reply

    monkeypatch.setattr(Site, "answer", watched)
    return passed


# ------------------------------------------------------------------------------------------------------ what stays home


@pytest.mark.parametrize(
    ("protocol", "keep"),
    [
        *(("federated", KEEP[what]) for what in KEEP),
        *(("splitfed", KEEP[what]) for what in ("norms", "stem and a pattern")),
        *(pytest.param("splitfed", KEEP[what], marks=pytest.mark.exhaustive) for what in ("heads", "decoder")),
    ],
)
def test_what_is_kept_crosses_in_neither_direction_and_differs_between_sites(
    keep: list[str], protocol: str, brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = seen_at_sites(monkeypatch)
    at_sites = (
        keep if protocol == "federated" else [name.replace("up0", "head0") for name in keep]
    )  # up0 is the server's
    outcome = run(brief(protocol__name=protocol, sharing__keep=at_sites), tmp_path / "run")
    assert outcome.exit_code == 0
    models = {site: at_site(tmp_path / "run", site, protocol) for site in SITES}
    north = models["north"]
    kept = {n for n in north if any(not torch.equal(north[n], m[n]) for m in models.values())}
    down = {n for _, r, _ in passed if isinstance(r, Train | Front | Keep) for n in r.weights}
    up = {n for _, _, reply in passed if isinstance(reply, Trained) for n in reply.weights}
    assert kept
    assert kept.isdisjoint(down | up)
    assert down | kept >= {n for n in north if not n.endswith("num_batches_tracked")}  # these are the same everywhere
    if protocol == "federated":
        norms = {n for n in north if ".norm." in n}
        heads = {n for n in north if n.startswith("head")}
        first = {n for n in north if n.startswith("down0.")}
        last = {n for n in north if n.startswith("up0.")}
        ups = {n for n in north if n.startswith(("up", "decode", "head"))}
        counters = {n for n in north if n.endswith("num_batches_tracked")}
        expected = dict(zip(KEEP, (norms, heads, first | last, ups), strict=True))
        assert expected[next(k for k, v in KEEP.items() if v == keep)] - counters == kept - counters


@pytest.mark.parametrize("protocol", ["federated", "splitfed"])
def test_each_sites_model_is_its_own_part_and_the_shared_one(protocol: str, brief: Make, tmp_path: Path) -> None:
    """After the last round it is: shared tensors of the server, and its own as it trained them."""
    outcome = run(brief(protocol__name=protocol, sharing__keep=["norms"]), tmp_path / "run")
    (state,) = (tmp_path / "run" / "checkpoints" / protocol).glob("[0-9]*.safetensors")
    shared = {n.removeprefix("weights/"): t for n, t in load_file(state).items() if n.startswith("weights/")}
    for site in SITES:
        own = at_site(tmp_path / "run", site, protocol)
        assert equal({n: own[n] for n in shared}, shared)
        assert set(own) - set(shared)
    names = [f"{protocol}:{site}" for site in SITES]
    assert list(finished_models(tmp_path / "run")) == names
    assert sorted({row["model"] for row in outcome.results["cases"]}) == sorted(names)
    for line in rounds(tmp_path / "run", protocol):
        for site, told in line["sites"].items():
            assert 0.5 < told["shared"] < 1
            assert told["with"] == [s for s in SITES if s != site]


@pytest.mark.parametrize("variant", ["v3", "sequential"])
def test_front_and_tail_of_their_own_end_as_a_model_of_each_site(variant: str, brief: Make, tmp_path: Path) -> None:
    """`v3` says it in short; with a body that sites train in turn it is said in full."""
    keep = {} if variant == "v3" else {"sharing__keep": ["ends"]}
    study = brief(protocol__name="splitfed", protocol__variant=variant, **keep)
    assert study.sharing.keep == ("ends",)
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    names = [f"splitfed:{site}" for site in SITES]
    assert list(finished_models(tmp_path / "run")) == names
    assert sorted({row["model"] for row in outcome.results["cases"]}) == sorted(names)
    models = {site: at_site(tmp_path / "run", site, "splitfed") for site in SITES}
    north, south = models["north"], models["south"]
    (state,) = (tmp_path / "run" / "checkpoints" / "splitfed").glob("[0-9]*.safetensors")
    body = {n.removeprefix("weights/") for n in load_file(state) if n.startswith("weights/")}
    assert all(torch.equal(north[n], south[n]) for n in body), "the body is one"
    own = [n for n in north.keys() - body if n.endswith(("weight", "bias"))]
    assert own
    assert any(not torch.equal(north[n], south[n]) for n in own), "front and tail are their site's"


@pytest.mark.parametrize("protocol", ["federated", "local"])
def test_ends_are_of_split_training(protocol: str, brief: Make) -> None:
    with pytest.raises(StudyError, match=r"keep = \['ends'\] is not allowed with protocol"):
        brief(protocol__name=protocol, sharing__keep=["ends"])


def test_one_site_that_keeps_something_trains_as_alone(brief: Make, tmp_path: Path) -> None:
    run(brief(sites=("north",), sharing__keep=["norms"]), tmp_path / "kept")
    run(brief(sites=("north",)), tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "weights" / "federated.safetensors")
    assert equal(at_site(tmp_path / "kept", "north"), plain)


def test_what_stays_is_averaged_where_nothing_is_kept(brief: Make, tmp_path: Path) -> None:
    """The test above would pass with norms that never differ."""
    run(brief(), tmp_path / "run")
    assert equal(at_site(tmp_path / "run", "north"), at_site(tmp_path / "run", "south"))


@pytest.mark.parametrize("protocol", ["federated", "splitfed"])
def test_stopped_and_resumed_is_uninterrupted(protocol: str, brief: Make, tmp_path: Path) -> None:
    study = brief(protocol__name=protocol, sharing__keep=["norms", "heads"], sharing__unseen="mean")

    class Stopped(BaseException):
        pass

    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == 2:
            raise Stopped

    run(study, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(study, tmp_path / "run", watch=stop)
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    for site in SITES:
        for model in (protocol, f"{protocol}-elsewhere"):
            assert equal(at_site(tmp_path / "run", site, model), at_site(tmp_path / "whole", site, model))


def test_a_site_that_lost_what_it_keeps_says_so(brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not begin anew in silence."""
    answer = Site.answer

    def forgets(self: Site, request: Any, cancelled: Any) -> Any:
        if isinstance(request, Train) and request.round == 2 and self.settings.name == "south":
            self._models.forget(request.model, finished=True)
        return answer(self, request, cancelled)

    monkeypatch.setattr(Site, "answer", forgets)
    outcome = run(brief(sharing__keep=["norms"], engine__workers=1), tmp_path / "run")
    assert outcome.exit_code == 4
    assert "south" in rounds(tmp_path / "run")[1]["failures"]


# -------------------------------------------------------------------------------------------------------- sites elsewhere


def test_a_site_that_did_not_train_gets_the_mean_of_what_is_kept(
    brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = seen_at_sites(monkeypatch)
    study = brief(sharing__keep=["norms"], sharing__unseen="mean", test=True)
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    assert sum(isinstance(r, Fetch) for _, r, _ in passed) == 3
    whole = load_file(tmp_path / "run" / "weights" / "federated-elsewhere.safetensors")
    cases = {site: told["n_cases"] for site, told in rounds(tmp_path / "run")[-1]["sites"].items()}
    own = {site: at_site(tmp_path / "run", site) for site in SITES}
    for name, tensor in whole.items():
        if tensor.is_floating_point():
            expected = sum(cases[s] * own[s][name].double() for s in SITES) / sum(cases.values())
            if name.endswith("running_var"):  # that of all data: within sites, and between their means
                of = name.replace("running_var", "running_mean")
                expected += sum(cases[s] * (own[s][of] - whole[of]).double() ** 2 for s in SITES) / sum(cases.values())
            assert torch.allclose(tensor.double(), expected, atol=1e-6), name
    tested = {row["model"] for row in outcome.results["cases"] if row["subset"] == "test"}
    assert tested == {"federated-elsewhere", *(f"federated:{site}" for site in SITES)}
    assert open_finished(tmp_path / "run", "federated-elsewhere").networks()
    card = card_of(tmp_path, "federated-elsewhere")
    assert "it holds the mean, for sites that did not train" in card


def card_of(folder: Path, model: str) -> str:
    out, _ = export_run(folder / "run", folder / "out", format="safetensors", model=model)
    return (out / "MODEL_CARD.md").read_text()


def test_leave_one_site_out_needs_a_rule_for_it_and_has_one(brief: Make, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="unseen = 'none'"):
        brief(sharing__keep=["norms"], validation__leave_one_site_out=True)
    study = brief(sharing__keep=["norms"], sharing__unseen="mean", validation__leave_one_site_out=True)
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    unseen = {(row["model"], row["site"]) for row in outcome.results["cases"] if row["subset"] == "unseen"}
    assert unseen == {(f"federated-without-{site}-elsewhere", site) for site in SITES}


def test_running_statistics_are_estimated_on_a_sites_own_images(brief: Make, tmp_path: Path) -> None:
    """The site elsewhere gets other statistics than the mean, and the same of all else; label maps do not matter."""
    study = brief(sharing__keep=["statistics"], sharing__unseen="reestimate", test=True)
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    mean = load_file(tmp_path / "run" / "weights" / "federated-elsewhere.safetensors")
    there = at_site(tmp_path / "run", "test", "federated-elsewhere")
    assert mean.keys() == there.keys()
    others = {n for n in mean if not torch.equal(mean[n], there[n])}
    assert others == {n for n in mean if n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    first = "down0.norm.running_mean"
    north = at_site(tmp_path / "run", "north", "federated-elsewhere")
    assert not torch.equal(there[first], north[first])


def test_without_running_statistics_there_is_nothing_to_estimate(brief: Make, tmp_path: Path) -> None:
    study = brief(network__norm="instance", sharing__keep=["norms"], sharing__unseen="reestimate")
    with pytest.raises(StudyError, match="no running statistics"):
        run(study, tmp_path / "run")


# -------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("keep", [[], ["norms"]])
def test_every_site_fine_tunes_what_it_is_told_to_and_both_are_scored(
    keep: list[str], brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = seen_at_sites(monkeypatch)
    study = brief(personalize__steps=3, personalize__tensors=["heads"], sharing__keep=keep)
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    tuned = [reply for _, r, reply in passed if isinstance(r, Personalize)]
    assert len(tuned) == 3
    assert all(reply.n_steps == 3 and not reply.weights for reply in tuned)
    for site in SITES:
        before, after = at_site(tmp_path / "run", site), at_site(tmp_path / "run", site, "federated-finetuned")
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert changed == {n for n in before if n.startswith("head")}
    scored = {row["model"] for row in outcome.results["cases"]}
    shared = {f"federated:{site}" for site in SITES} if keep else {"federated"}
    assert scored == shared | {f"federated-finetuned:{site}" for site in SITES}
    assert "federated-finetuned:west" in finished_models(tmp_path / "run")
    assert open_finished(tmp_path / "run", "federated-finetuned:west").networks()
    card = card_of(tmp_path, "federated-finetuned:west")
    assert "then west trained `heads` on for 3 steps" in card
    assert all(f"| {site} | " in card for site in SITES), "shared tensors saw the cases of all"
    assert ("`norms` never left west" in card) == bool(keep)


def test_by_default_fine_tuning_changes_everything_and_leaves_the_shared_model_as_it_was(
    brief: Make, tmp_path: Path
) -> None:
    study = brief(sites=("north",), personalize__steps=2, personalize__learning_rate=0.01)
    run(study, tmp_path / "run")
    plain = run(brief(sites=("north",)), tmp_path / "plain")
    assert plain.exit_code == 0
    before, after = at_site(tmp_path / "run", "north"), at_site(tmp_path / "run", "north", "federated-finetuned")
    assert equal(before, at_site(tmp_path / "plain", "north"))
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("weight"))


@pytest.mark.parametrize("name", ["scaffold", "ditto", pytest.param("proximal", marks=pytest.mark.exhaustive)])
def test_local_updates_go_together_with_tensors_that_stay(name: str, brief: Make, tmp_path: Path) -> None:
    outcome = run(brief(local_update__name=name, sharing__keep=["norms", "heads"]), tmp_path / "run")
    assert outcome.exit_code == 0
    assert all(len(line["sites"]) == 3 for line in rounds(tmp_path / "run"))


@pytest.mark.parametrize(
    "rule", ["adam", "agreement", *(pytest.param(r, marks=pytest.mark.exhaustive) for r in ("median", "fednova"))]
)
def test_rules_go_together_with_tensors_that_stay_and_plans_by_site(
    rule: str, brief: Make, small_study: Make, unequal: Path, tmp_path: Path
) -> None:
    assert run(brief(aggregation__name=rule, sharing__keep=["norms"]), tmp_path / "kept").exit_code == 0
    study = small_study(
        data=unequal,
        test=False,
        training__patch_size=None,
        plan__fingerprint="site",
        aggregation__name=rule,
    )
    assert run(study, tmp_path / "own").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sharing__keep": ["nothing.*"]}, "is no tensor of this network"),
        ({"sharing__keep": ["*"]}, "keeps all"),
        ({"personalize__steps": 1, "personalize__tensors": ["nothing"]}, "is no tensor of this network"),
        ({"personalize__steps": 1, "personalize__tensors": ["statistics"]}, "none of these 18 tensors trains"),
        ({"protocol__name": "splitfed", "sharing__keep": ["down1.*"]}, "names tensors of the server's part only"),
        (
            {"protocol__name": "splitfed", "sharing__keep": ["stem", "down1.*"]},
            "names tensors of the server's part only",
        ),
    ],
)
def test_tensors_that_are_not_there_are_told_before_anything_trains(
    changes: dict[str, Any], words: str, brief: Make, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=words):
        run(brief(**changes), tmp_path / "run")
    assert not rounds(tmp_path / "run") if (tmp_path / "run" / "rounds.jsonl").exists() else True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sharing__unseen": "mean"}, "nothing stays at a site"),
        (
            {
                "sharing__keep": ["norms"],
                "sharing__unseen": "mean",
                "validation__select": "best",
                "validation__every": 1,
            },
            "would be of the last",
        ),
        ({"sharing__match": "published"}, "not used with one plan"),
        ({"sharing__keep": ["norms"], "protocol__name": "local"}, "shares no tensors"),
        ({"sharing__keep": ["norms"], "collect__name": "judged", "aggregation__name": "quality"}, "judged elsewhere"),
        ({"plan__fingerprint": "site", "protocol__name": "splitfed"}, "its body is one network"),
        ({"plan__fingerprint": "site", "sharing__unseen": "mean"}, "has no network"),
        ({"plan__fingerprint": "site", "local_update__name": "scaffold"}, "exchanges more than weights"),
        ({"personalize__tensors": ["heads"]}, "not used without steps"),
        ({"personalize__steps": 2, "protocol__name": "local"}, "own already"),
        ({"personalize__steps": 0}, "1 or more"),
    ],
)
def test_what_does_not_go_together_is_told(changes: dict[str, Any], words: str, small_study: Make) -> None:
    with pytest.raises(StudyError, match=words):
        small_study(**changes)


# ------------------------------------------------------------------------------------------------------- plans by site

UNEQUAL = (
    PhantomSite("north", 3),
    PhantomSite("south", 3, spacing=(1.0, 1.0, 4.0)),
    PhantomSite("west", 3, spacing=(0.5, 0.5, 0.5)),
)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unequal")
    write_phantom(folder, sites=UNEQUAL, n_test=1, scale=0.5)
    return folder


@pytest.mark.parametrize("mode", ["resolution", "intersection", "published"])
def test_sites_with_plans_of_their_own_share_what_fits(
    mode: str, unequal: Path, small_study: Make, tmp_path: Path
) -> None:
    study = small_study(
        data=unequal,
        training__patch_size=None,
        protocol__compare=["local"],
        plan__fingerprint="site",
        sharing__match=mode,
    )
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    folder = tmp_path / "run"
    assert {p.stem for p in (folder / "plans" / "federated").glob("*.json")} == set(SITES)
    models = {site: at_site(folder, site) for site in SITES}
    for line in rounds(folder):
        for site, told in line["sites"].items():
            assert 0 < told["shared"] <= 1
            assert site not in told["with"]
    names = {f"{m}:{site}" for site in SITES for m in ("federated", "local")}
    assert set(finished_models(folder)) == names
    for name in names:
        assert open_finished(folder, name).networks()
    if mode == "intersection":
        common = [
            n
            for n in models["north"]
            if all(n in m and m[n].shape == models["north"][n].shape for m in models.values())
        ]
        shared = [n for n in common if all(torch.equal(models["north"][n], m[n]) for m in models.values())]
        assert set(shared) == set(common)


def test_each_shared_tensor_is_the_mean_of_the_sites_that_have_it_and_the_others_are_as_they_were_trained(
    unequal: Path, small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle: the mean by hand, of what the sites sent in the last round, tensor by tensor."""
    passed = seen_at_sites(monkeypatch)
    trained: dict[str, dict[str, Tensor]] = {}
    finish = Learner.finish

    def finishes(self: Learner, *args: Any, **named: Any) -> Trained:
        trained[self.job.entries["training"][0].member] = self.weights()
        return finish(self, *args, **named)

    monkeypatch.setattr(Learner, "finish", finishes)
    study = small_study(data=unequal, test=False, plan__fingerprint="site", training__patch_size=None)
    run(study, tmp_path / "run")
    sent = {site: r for site, q, r in passed if isinstance(q, Train) and q.round == 2}
    assert len({len(r.weights) for r in sent.values()}) > 1
    for site in SITES:
        own = at_site(tmp_path / "run", site)
        for name, tensor in own.items():
            having = [r for r in sent.values() if name in r.weights and r.weights[name].shape == tensor.shape]
            if name in sent[site].weights:
                n = sum(r.n_cases for r in having)
                mean = sum(r.n_cases * r.weights[name].double() for r in having) / n
                assert len(having) >= 2
                assert torch.allclose(tensor.double(), mean, atol=1e-6), (site, name)
            else:
                assert torch.equal(tensor, trained[site][name]), (site, name)


def test_own_plans_stopped_and_resumed_and_predicted(unequal: Path, small_study: Make, tmp_path: Path) -> None:
    study = small_study(data=unequal, test=False, plan__fingerprint="site", training__patch_size=None)

    class Stopped(BaseException):
        pass

    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == 1:
            raise Stopped

    run(study, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(study, tmp_path / "run", watch=stop)
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    for site in SITES:
        assert equal(at_site(tmp_path / "run", site), at_site(tmp_path / "whole", site))
    failed = predict(
        tmp_path / "run", unequal / "south" / "imagesTr", tmp_path / "out", model="federated:south", device="cpu"
    )
    assert not failed
    assert len([*(tmp_path / "out").glob("south_*.nii.gz")]) == 3
