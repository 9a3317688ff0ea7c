"""The dossier lists every message that sites send, in real runs of every protocol, and what a site must allow for them."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pytest
from pages import Page

import concilium as cc
from concilium import catalog, messages
from concilium.answers import Policy
from concilium.answers.permission import check_policy
from concilium.attacks import AUDITED
from concilium.data.phantom import PhantomSite, write_phantom
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.deployment.kits import SiteSettings
from concilium.errors import PrivacyError, StudyError
from concilium.line import run
from concilium.reports import _risks
from concilium.reports._bytes import forecasts, measured
from concilium.reports._found import find
from concilium.reports._permissions import WHY, needed
from concilium.reports._sheet import to_markdown
from concilium.reports._talk import COLLECTED, TALK, exchanges, how_often, trained_in
from concilium.reports._words import WORDS, fields_of
from concilium.site import Site
from concilium.study import Study, parse_study, read_study

ROOT = Path(__file__).parents[2]
STUDIES = sorted(ROOT.glob("studies/*.toml"))
FORBIDDEN = "anonym"
SITES = ("north", "south", "west")
STRICT = Policy(
    plug_ins=(), split=False, labels=False, open_weights=False, least_summed=99, reveal=False, case_scores=False,
    shown=False, kept=False, new_patients=False,
)  # fmt: skip
Sent = dict[str, list[tuple[Any, type]]]


def federation(data: Path) -> Study:
    """Every protocol but `vertical`, and every way to collect, in one run."""
    split = {"name": "splitfed", "cut": "shallow", "rounds": 1, "steps": 2}
    raw = {
        "study": {"name": "small", "seed": 3},
        "sites": {name: {"data": str(data / name)} for name in SITES},
        "protocol": {"name": "federated", "rounds": 2, "steps": 2, "compare": ["local"]},
        "network": {"name": "unet", "base_features": 12, "levels": 2},
        "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [8, 8, 8], "mirror": False, "augmentation": "none"},
        "validation": {"folds": 2},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
        "variants": {
            "secret": {"collect": {"name": "secure_sum"}},
            "judges": {"collect": {"name": "judged"}, "aggregation": {"name": "quality"}},
            "split": {"protocol": split},
            "chain": {"protocol": {"name": "cyclic", "rounds": 2, "steps": 2}},
            "keeps": {"sharing": {"keep": ["heads"], "unseen": "mean"}, "personalize": {"steps": 1}},
        },
    }  # fmt: skip
    return parse_study(raw, folder=data)


def parties(data: Path) -> Study:
    raw = {
        "study": {"name": "parties", "seed": 3},
        "sites": {name: {"data": str(data / name), "holds": [name]} for name in SEQUENCES},
        "protocol": {
            "name": "vertical",
            "labels": "first",
            "cut": "shallow",
            "rounds": 1,
            "steps": 2,
            "patches": "labels",
        },
        "variants": {"stays": {"protocol": {"fronts": "stay"}}},
        "network": {"name": "unet", "base_features": 4, "levels": 2},
        "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [8, 16, 16], "mirror": False},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }
    return parse_study(raw, folder=data)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Study, Path, Sent]]:
    """Real runs, with what each site was asked for each model and of what type its answer was."""
    folder = tmp_path_factory.mktemp("dossier")
    scanners = [PhantomSite(name, 2) for name in SITES]
    write_phantom(folder / "phantom", sites=scanners, n_test=0, scale=0.4)
    write_sequences(folder / "sequences", n_cases=4, n_test=1, size=16)
    found = []
    for make, data in ((federation, folder / "phantom"), (parties, folder / "sequences")):
        sent: Sent = defaultdict(list)
        answer = Site.answer

        def watched(self: Site, request: Any, cancelled: Any, sent: Sent = sent, answer: Any = answer) -> Any:
            reply = answer(self, request, cancelled)
            sent[getattr(request, "model", "")].append((request, type(reply)))
            return reply

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Site, "answer", watched)
            outcome = run(make(data), folder / make.__name__)
        assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
        found.append((make(data), outcome.folder, sent))
    return found


@pytest.mark.slow
def test_every_message_that_is_sent_is_listed(ran: list[tuple[Study, Path, Sent]]) -> None:
    seen = set()
    for study, _, sent in ran:
        models = trained_in(study)
        assert {name for name in sent if name} == {m.name for m in models}
        for model in models:
            were = {(type(request), reply) for name in ("", model.name) for request, reply in sent[name]}
            listed = {(x.request, x.reply): x for x in exchanges(model)}
            of_study = {(x.request, x.reply) for m in models for x in exchanges(m)}
            own = {(type(request), reply) for request, reply in sent[model.name]}
            beside = {(x.request, x.reply) for m in models if m.beside and m.study == model.study for x in exchanges(m)}
            assert own <= listed.keys() | beside, (model.name, own - listed.keys())
            assert were - own <= of_study, were - own - of_study
            missing = {pair for pair, x in listed.items() if x.sure} - were
            assert not missing or (model.beside and missing <= of_study), (model.name, missing)
            seen |= {reply for _, reply in were}
    assert seen == set(messages.REPLIES) - {messages.Described}, "each but that of own plans was sent"


def test_nothing_is_unknown_to_it() -> None:
    assert WORDS.keys() == set(messages.REPLIES)
    assert TALK.keys() == set(catalog.names("protocols"))
    assert COLLECTED.keys() == set(catalog.names("collect"))
    assert _risks.AUDITED == AUDITED
    assert {f.name for f in fields(Policy)} - {"case_scores"} == WHY.keys()
    assert WHY.keys() <= {f.name for f in fields(SiteSettings)}


def test_what_a_site_must_allow_is_just_what_the_requests_need(ran: list[tuple[Study, Path, Sent]]) -> None:
    for study, _, sent in ran:
        requests = [request for of in sent.values() for request, _ in of]
        said = needed(study)
        allowed = replace(STRICT, **said)
        for request in requests:
            check_policy(request, allowed)
        for key in said:
            without = replace(allowed, **{key: getattr(STRICT, key)})
            assert any(_refuses(request, without) for request in requests), key
    assert needed(ran[0][0]).keys() == {"split", "open_weights", "least_summed", "shown", "kept"}


def _refuses(request: Any, policy: Policy) -> bool:
    try:
        check_policy(request, policy)
    except PrivacyError:
        return True
    return False


def test_what_is_forecast_is_what_is_sent(ran: list[tuple[Study, Path, Sent]]) -> None:
    """Headers apart, which weigh much in so small a network."""
    study, folder, _ = ran[0]
    told = forecasts(study)
    found = measured(study, find(folder).rounds)
    for name in ("federated", "secret", "judges", "split", "chain", "keeps"):
        for site, m in found[name].items():
            forecast = told[name]
            assert not isinstance(forecast, str), forecast
            for is_, said in ((m.up, forecast[site].up * m.rounds), (m.down, forecast[site].down * m.rounds)):
                # the last site of a chain sends nothing on; headers, keys and shares weigh something
                least = said * (m.rounds - (name == "chain")) / m.rounds
                assert least <= is_ < 1.05 * said + 12_000 * m.rounds, (name, site, is_, said)
    assert isinstance(told["local"], str)
    assert forecasts(ran[1][0])["vertical"].keys() == set(SEQUENCES)


def test_messages_are_counted_as_they_were_sent(ran: list[tuple[Study, Path, Sent]]) -> None:
    """From rounds and steps in the record, against what the sites were seen to answer."""
    for study, folder, sent in ran:
        for model in trained_in(study):
            often = {
                x.reply
                for x in exchanges(model)
                if x.often in ("round", "others", "step") and x.reply is not messages.Done
            }
            seen = [
                r for request, r in sent[model.name] if r in often and not isinstance(request, messages.Personalize)
            ]
            seen += [r for request, r in sent[model.name] if isinstance(request, messages.Snapshot)]
            sites = measured(study, find(folder).rounds).get(model.name, {})
            at_the_end = len(sites) if model.protocol == "cyclic" else 0  # each shows its key once more
            said = sum(m.messages for m in sites.values())
            assert said == (0 if model.beside else len(seen) - at_the_end), model.name


@pytest.mark.slow
def test_the_dossier_of_a_run_stands_beside_what_was_said(ran: list[tuple[Study, Path, Sent]], tmp_path: Path) -> None:
    study, folder, _ = ran[0]
    before, after = cc.dossier(study, tmp_path / "before"), cc.dossier(folder, tmp_path / "after")
    assert "Forecast of training" in before.text
    assert "Measured in training" in after.text
    assert hashlib.sha256((folder / "study.toml").read_bytes()).hexdigest() in before.text
    digest = hashlib.sha256((folder / "study.toml").read_bytes()).hexdigest()
    assert digest in after.text
    assert before.html.read_text().count("<table") == len([b for b in before.text.split("\n\n") if b.startswith("| ")])
    rows = [line for line in after.text.splitlines() if line.startswith("| secret | north")]
    assert " 2 of 2 " in rows[0]
    assert str(folder) not in after.text + before.text


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_it_can_be_made_of_every_preset(path: Path, tmp_path: Path) -> None:
    made = cc.dossier(path, tmp_path, forecast=False)
    page = made.html.read_text(encoding="utf-8")
    assert Page(page).handlers == []
    for text in (page, made.text):
        assert FORBIDDEN not in text.lower()
        assert "No attack was run on this study" in text
        assert "What is not protected" in text
    assert all(address.startswith("#") for address in Page(page).addresses)


def test_it_never_says_the_word_whatever_a_study_is_called(tmp_path: Path) -> None:
    study = read_study(ROOT / "studies/hippocampus.toml", check_data=False)
    names = dict(zip(("anonymous", "Anonymised-site", "deanonymized"), study.sites.values(), strict=True))
    named = replace(study, sites=names, study=replace(study.study, name="AnOnYmOuS"))
    made = cc.dossier(named, tmp_path, forecast=False)
    assert FORBIDDEN not in (made.text + made.html.read_text(encoding="utf-8")).lower()
    assert "[word left out]" in made.text
    for module in ("dossier", "_leaving", "_seeing", "_risks", "_kept", "_words", "_talk", "_permissions"):
        source = inspect.getsource(sys.modules[f"concilium.reports.{module}"])
        assert FORBIDDEN not in source.lower(), "not to be taken out only, but never to be said"


AUDIT = {
    "version": 1, "study": "hippocampus", "model": "federated", "victims": ["north"], "n_own_cases": 7, "notes": ["A note."],
    "attacks": [{"name": "inversion", "sees": "maps", "guesses": "images", "who": "the server", "options": {}}],
    "rows": [
        {"round": 3, "cut": "down0", "map": m, "attack": "inversion", "channel": "all", "metric": "ssim", "value": v,
         "naive": 0.3, "most": 0.99, "n": 48}
        for m, v in (("down0", 0.94), ("down1", 0.5))
    ],
}  # fmt: skip


def test_attacks_stand_with_what_they_found(tmp_path: Path) -> None:
    path = tmp_path / "leakage.json"
    path.write_text(json.dumps(AUDIT))
    text = cc.dossier(ROOT / "studies/hippocampus.toml", tmp_path, forecast=False, leakage=path).text
    assert "| inversion | SSIM | after round 3, cut down0, map down0 | 0.94 | 0.30 |" in text
    assert "No attack was run" not in text
    other = cc.dossier(ROOT / "studies/secure-sum.toml", tmp_path, forecast=False, leakage=path).text
    assert "These figures are of the study hippocampus, not of this one." in other
    path.write_text("{}")
    with pytest.raises(StudyError, match=r"is no leakage\.json"):
        cc.dossier(ROOT / "studies/hippocampus.toml", tmp_path, forecast=False, leakage=path)


def test_every_audit_of_a_run_stands_in_its_dossier_and_every_partys_figure(
    ran: list[tuple[Study, Path, Sent]], tmp_path: Path
) -> None:
    """A sweep over defences writes one in a folder for each model; of a vertical one a hospital looks for its own figure."""
    shutil.copytree(ran[0][1], tmp_path / "run", ignore=shutil.ignore_patterns("cache", "sites", "weights"))
    (row, *_) = cast(list[dict[str, Any]], AUDIT["rows"])
    of_sites = [{**row, "site": site, "value": v} for site, v in (("north", 0.9), ("south", 0.7))]
    for model in ("federated", "noisy"):
        (tmp_path / "run/leakage" / model).mkdir(parents=True)
        told = {**AUDIT, "model": model, "rows": of_sites}
        (tmp_path / "run/leakage" / model / "leakage.json").write_text(json.dumps(told))
    made = cc.dossier(tmp_path / "run", tmp_path / "out", forecast=False).text
    assert "On the model federated, against" in made
    assert "On the model noisy, against" in made
    assert made.count("| inversion | SSIM | site south, after round 3, cut down0, map down0 | 0.70 | 0.30 |") == 2
    assert "No attack was run" not in made


def test_of_patches_that_follow_labels_no_other_thing_is_said(of: Callable[..., str]) -> None:
    raw = tomllib.loads((ROOT / "studies/two-sequences.toml").read_text())
    raw["protocol"]["patches"] = "labels"
    text = to_markdown(
        "s", "over", [_risks.unprotected(parse_study(raw, folder=ROOT / "studies", check_data=False), [])]
    )
    assert "Patches follow the labels" in text
    assert "reveal_labels" not in text
    assert "can have the guess blinded as a party's" in text


def test_of_fronts_that_stay_neither_too_little_nor_too_much_is_said(tmp_path: Path) -> None:
    raw = tomllib.loads((ROOT / "studies/two-sequences.toml").read_text())
    said = {}
    for fronts in ("sent", "stay"):
        raw["protocol"]["fronts"] = fronts
        given = {key: table for key, table in raw.items() if key not in ("test", "variants")}
        study = parse_study(given, folder=ROOT / "studies", check_data=False)
        said[fronts] = cc.dossier(study, tmp_path / fronts, forecast=False).text
    labels = raw["protocol"]["labels"]
    only = {
        "stay": (
            "Fronts stay at their sites.",
            f"| weights after training at the site | its own | no front; of {labels} the tail, after each round | no | no |",
            "| vertical | its own part | all but the fronts | their own parts |",
            "| kept at the site | each site's front | Its weights are drawn at the site and never leave. Its maps do",
            "That is no defence by itself: who has images with the maps that such a front made",
            "| inversion | images, from maps |",
        ),
        "sent": (
            "each site's part, after each round",
            "The server knows the layers that made them",
            "| inversion_white | images, from maps |",
            "| membership | members, from model |",
            "| inversion | images, from maps |",
        ),
    }
    for fronts, other in (("stay", "sent"), ("sent", "stay")):
        for text in only[fronts]:
            assert text in said[fronts], text
            assert text not in said[other] or text in only[other], text


def test_what_protects_is_named(tmp_path: Path, of: Callable[..., str]) -> None:
    plain, secret = of("hippocampus"), of("secure-sum")
    assert "The server reads every site's update by itself" in plain
    assert "- federated: The server reads the sum of the sites' updates" in secret
    assert "- plain: The server reads every site's update by itself" in secret, "a variant without masks is said too"
    assert "secure_sum (threshold = 2" in secret or "| masked sums | secure_sum" in secret
    assert "| split | true | false | REFUSED unless allowed |" in of("splitfed-hippocampus")
    assert "| least_summed | 2 or less | 3 | REFUSED unless allowed |" in secret
    assert "sealed, unreadable" in of("cyclic")
    assert "| differential privacy | dp_sgd" in of("dp-sgd")
    assert "| defences | nopeek" in of("defences")
    assert "| frozen | all but norms, heads | What does not train does not leave" in of("frozen-encoder")
    adapted = tmp_path / "adapted.toml"
    raw = (ROOT / "studies/fedsam-polyps.toml").read_text(encoding="utf-8").partition("[variants.msa]")[0]
    adapted.write_text(raw.replace('name = "sam"', 'name = "sam"\nadapt = "adapters"'), encoding="utf-8")
    said = cc.dossier(adapted, tmp_path / "said", forecast=False).text
    assert "| frozen | all but adapters, decoder.[!p]*, heads | What does not train" in said, (
        "as the network itself says"
    )


@pytest.fixture
def of(tmp_path: Path) -> Callable[..., str]:
    return lambda name: cc.dossier(ROOT / f"studies/{name}.toml", tmp_path, forecast=False).text


def test_how_often_is_a_number() -> None:
    (model, *_) = trained_in(read_study(ROOT / "studies/splitfed-hippocampus.toml", check_data=False))
    assert how_often("step", model) == "in every step: 30 rounds of 50 steps, 1,500 times"
    assert how_often("round", model) == "once a round: 30 times"
    assert dict(fields_of(messages.Average))["n"] == "Patients with a value"
