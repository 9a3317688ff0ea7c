"""Masked updates: the sum is right whoever is lost, each alone looks like noise, and a site gives no more than the sum needs."""

from __future__ import annotations

import datetime
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from masked import MaskedSites
from scipy import stats

from concilium import masking
from concilium.aggregation import UNITS, Block, one_block, weight_of
from concilium.collect import Collected
from concilium.collect.secure_sum import collect
from concilium.errors import ContractError, EngineError, PrivacyError, StudyError
from concilium.messages import (
    Agree,
    Deal,
    Dealt,
    Finish,
    Hold,
    Mask,
    Masked,
    Masking,
    Request,
    SiteError,
    SiteLost,
    SiteRefused,
    Train,
    Trained,
    Unmask,
    Unmasked,
)
from concilium.sealing import Identity

SITES = ("east", "north", "south", "west")
START = {
    "w": torch.linspace(-1, 1, 3000).reshape(30, 100),
    "b": torch.arange(5.0),
    "n": torch.tensor(7),
}
TRAIN = Train("m", 4, 15, 5, 50, START, True)


def trained(site: str, *, scale: float = 0.1, n_cases: int | None = None, n_steps: int = 5) -> Trained:
    """An update of a site's own."""
    i = SITES.index(site)
    generator = torch.Generator().manual_seed(i)
    weights = {
        n: t + (scale * torch.randn(t.shape, generator=generator) if t.is_floating_point() else i)
        for n, t in START.items()
    }
    return Trained(weights, n_cases or 3 + 4 * i, n_steps, 0.5, 1.0)


def sites_of(folder: Path, replies: Mapping[str, Any] | None = None, **more: Any) -> MaskedSites:
    return MaskedSites(folder, replies or {site: trained(site) for site in SITES}, **more)


def collected(sites: MaskedSites, *, rule: str = "mean", **options: Any) -> Collected:
    requests = dict.fromkeys(sites.trained, TRAIN)
    told = {"blocks": (one_block(START, requests),), "weigh": weight_of(rule), "asked": dict.fromkeys(requests, 5)}
    return collect(sites.ask, requests, **(told | options))


def plain(replies: Mapping[str, Trained], names: Any, rule: str = "mean") -> dict[str, torch.Tensor]:
    """The weighted mean in float64."""
    weigh = weight_of(rule)
    weights = {s: weigh(replies[s].n_cases, replies[s].n_steps / 5) for s in names}
    return {n: sum(replies[s].weights[n].double() * weights[s] for s in names) / sum(weights.values()) for n in START}  # type: ignore[misc]


def check_mean(got: Collected, replies: Mapping[str, Trained], names: Any, *, rule: str = "mean", **how: Any) -> None:
    """The mean over these sites is right to the bound that is told for it, and to the rounding of float32."""
    masked = Masking(2, how.get("bits", 32), how.get("range", 16.0), "cases")
    weigh = weight_of(rule)
    counts = {s: weigh(t.n_cases, t.n_steps / 5) for s, t in replies.items() if t.n_steps}
    answered = sum(counts[s] for s in names) / sum(counts.values())
    expected, (total,) = plain(replies, names, rule), got.totals
    assert (total.count, total.weight) == (len(names), sum(counts[s] for s in names))
    for name, mean in total.mean().items():
        allowed = masking.bound(masked, len(names), answered=answered, whole=name == "n")
        if name == "n":
            assert abs(float(mean) - float(expected[name])) <= allowed + 0.5
        else:
            assert mean.dtype == torch.float32
            error = (mean.double() - expected[name]).abs() - expected[name].abs() * 2**-24
            assert float(error.max()) <= allowed


# ------------------------------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize(("bits", "range_"), [(32, 16.0), (32, 3.7), (64, 1000.0), (16, 1.0)])
@pytest.mark.parametrize("rule", ["mean", "unweighted"])
def test_the_sum_is_that_of_the_updates_to_the_bound(bits: int, range_: float, rule: str, tmp_path: Path) -> None:
    sites = sites_of(tmp_path)
    got = collected(sites, rule=rule, bits=bits, range=range_)
    assert got.failures == {}
    check_mean(got, sites.trained, SITES, rule=rule, bits=bits, range=range_)


def test_the_bound_is_reached_within_a_factor(tmp_path: Path) -> None:
    """A bound that is never nearly reached bounds nothing: over 3000 values the largest error is near it."""
    sites = sites_of(tmp_path)
    error = (collected(sites, bits=16, range=1.0).totals[0].mean()["w"] - plain(sites.trained, SITES)["w"]).abs().max()
    bound = masking.bound(Masking(2, 16, 1.0, "cases"), len(SITES))
    assert 0.5 * bound < float(error) <= bound


def test_as_many_bytes_as_without_masks(tmp_path: Path) -> None:
    sites = sites_of(tmp_path)
    collected(sites)
    for site, reply in sites.told:
        if isinstance(reply, Masked):
            n_bytes = reply.values.numel() * reply.values.element_size()
            assert n_bytes <= 4 * sum(t.numel() for t in START.values()), site


def test_what_comes_beside_the_weights_is_masked_too(tmp_path: Path) -> None:
    beside = {site: {"w": torch.full((30, 100), float(i))} for i, site in enumerate(SITES)}
    sites = sites_of(tmp_path, {site: replace(trained(site), control=beside[site]) for site in SITES})
    got = collected(sites)
    cases = [sites.trained[site].n_cases for site in SITES]
    expected = sum(i * n for i, n in enumerate(cases)) / sum(cases)
    assert (got.control.weight, got.control.count) == (sum(cases), 4)
    assert torch.allclose(got.control.mean()["w"], torch.tensor(expected), atol=1e-6)
    assert all(r.trained.control == {} for _, r in sites.told if hasattr(r, "trained"))


def test_a_site_that_took_no_step_is_in_no_sum(tmp_path: Path) -> None:
    replies = {site: trained(site) for site in SITES}
    replies["south"] = replace(replies["south"], n_steps=0, loss=0.0)
    got = collected(sites := sites_of(tmp_path, replies))
    assert set(got.answers) == set(SITES)
    assert got.failures == {}
    check_mean(got, sites.trained, [s for s in SITES if s != "south"])


def test_nothing_but_requests_for_masks_is_asked(tmp_path: Path) -> None:
    sites = sites_of(tmp_path)
    collected(sites)
    assert [type(r).__name__ for s, r in sites.asked if s == "east"] == ["Hold", "Deal", "Mask", "Agree", "Unmask"]
    held = [r for _, r in sites.asked if isinstance(r, Hold)]
    assert not any(r.train.send_weights for r in held)


def test_an_update_out_of_range_is_refused_and_not_clipped(tmp_path: Path) -> None:
    replies = {site: trained(site) for site in SITES}
    far = replace(replies["north"], weights={**replies["north"].weights, "b": START["b"] + 2.5})
    sites = sites_of(tmp_path, {**replies, "north": far})
    got = collected(sites, range=2.0)
    assert got.failures == {"north": SiteError("OverflowError", "out_of_range", "north-0")}
    check_mean(got, {s: t for s, t in replies.items() if s != "north"}, set(SITES) - {"north"}, range=2.0)
    with pytest.raises(OverflowError, match=r"b changed by 2\.5 in this round\. Masked updates can say 2 at most"):
        masking.flat(far.weights, START, Masking(2, 32, 2.0, "cases"))


# ------------------------------------------------------------------------------------------------------- sites are lost


@pytest.mark.parametrize("after", [False, True], ids=["before it does", "its answer only"])
@pytest.mark.parametrize("stage", [Hold, Deal, Mask, Agree, Unmask], ids=lambda t: t.__name__)
def test_a_lost_site_leaves_the_sum_of_the_others(stage: type, after: bool, tmp_path: Path) -> None:
    """One that is lost once its masked update has come is in the sum, and its loss is told."""
    sites = sites_of(tmp_path, lost={"north": stage}, after=after)
    got = collected(sites)
    assert got.failures == {"north": SiteLost()}
    inside = [s for s in SITES if s != "north" or stage in (Agree, Unmask)]
    assert sorted(got.answers) == inside
    replies = {s: t for s, t in sites.trained.items() if s != "north" or stage is not Hold}
    if stage is Deal:  # it was among those whose parts were told
        check_mean(got, sites.trained, inside)
    else:
        check_mean(got, replies, inside)


def test_two_lost_at_different_stages(tmp_path: Path) -> None:
    got = collected(sites_of(tmp_path, lost={"east": Deal, "west": Mask}), threshold=3)
    assert got.answers == {}  # below the threshold: see the next test
    sites = MaskedSites(
        tmp_path / "six", {s: trained(SITES[i % 4]) for i, s in enumerate("abcdef")}, lost={"b": Deal, "e": Mask}
    )
    got = collected(sites)
    assert set(got.failures) == {"b", "e"}
    check_mean(got, sites.trained, ["a", "c", "d", "f"])


@pytest.mark.parametrize("stage", [Hold, Deal, Mask, Agree, Unmask], ids=lambda t: t.__name__)
def test_below_the_threshold_the_round_fails_and_nothing_is_unmasked(stage: type, tmp_path: Path) -> None:
    sites = sites_of(tmp_path, lost={"north": stage, "south": stage})
    got = collected(sites)
    assert (got.totals[0].count, got.totals[0].weight, got.answers) == (0, 0, {})
    assert {s: f for s, f in got.failures.items() if s in ("north", "south")} == {
        "north": SiteLost(),
        "south": SiteLost(),
    }
    codes = {f.code for s, f in got.failures.items() if isinstance(f, SiteError)}
    assert codes == {"below_threshold"}
    told = [reply for _, reply in sites.told if isinstance(reply, Unmasked)]
    assert len(told) == (2 if stage is Unmask else 0), "two shares of three tell nothing"


def test_any_so_many_shares_give_the_secret_and_fewer_another_number() -> None:
    secret = bytes(range(32))
    holders = list("abcde")
    shares = masking.divide(secret, holders, 3)
    places = {h: masking.place_of(h, holders) for h in holders}
    for three in itertools.combinations(holders, 3):
        assert masking.join({places[h]: shares[h] for h in three}) == secret
    assert masking.join({places[h]: shares[h] for h in "ad"}) != secret
    assert len({masking.divide(secret, holders, 3)["a"] for _ in range(8)}) == 8, "drawn anew each time"


def test_secrets_are_divided_in_a_field() -> None:
    """Miller-Rabin: otherwise shares would not always have inverses."""
    d, r = masking.FIELD - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for a in random.Random(0).sample(range(2, 10**9), 30):
        x = pow(a, d, masking.FIELD)
        assert x == 1 or masking.FIELD - 1 in [pow(x, 2**i, masking.FIELD) for i in range(r)]


# ------------------------------------------------------------------------------------------ what a masked update tells


def structured(value: float) -> Trained:
    """All changes alike: without masks, one number 3000 times."""
    return Trained({n: t + (value if t.is_floating_point() else 1) for n, t in START.items()}, 5, 5, 0.5, 1.0)


def masked_values(folder: Path, updates: Mapping[str, Trained], **options: Any) -> dict[str, np.ndarray]:
    sites = sites_of(folder, updates)
    collected(sites, **options)
    return {
        s: r.values.numpy().view(np.uint32).astype(np.float64) / 2**32 for s, r in sites.told if isinstance(r, Masked)
    }


def looks_random(values: np.ndarray) -> bool:
    """Values of 0 to 1 against the uniform distribution: over all, in 64 bins, and in their low bytes. p > 1e-4 in each."""
    low = (values * 2**32).astype(np.int64) % 256
    ps = (
        stats.kstest(values, "uniform").pvalue,
        stats.chisquare(np.histogram(values, 64, (0, 1))[0]).pvalue,
        stats.chisquare(np.bincount(low, minlength=256)).pvalue,
        1 - abs(stats.spearmanr(values[:-1], values[1:]).statistic) * math.sqrt(len(values)) / 6,  # 6 sigma
    )
    return min(ps) > 1e-4


def test_a_masked_update_cannot_be_told_from_noise(tmp_path: Path) -> None:
    values = masked_values(tmp_path, {site: structured(0.25) for site in SITES})
    assert all(looks_random(v) for v in values.values())
    assert abs(np.corrcoef(values["east"], values["west"])[0, 1]) < 6 / math.sqrt(3000), "equal updates look unlike"


def test_two_unlike_updates_look_alike(tmp_path: Path) -> None:
    quiet, loud = (
        masked_values(tmp_path / str(v), {site: structured(v) for site in SITES})["north"] for v in (0.0, 15.5)
    )
    assert stats.ks_2samp(quiet, loud).pvalue > 1e-4
    assert abs(quiet.mean() - loud.mean()) < 6 / math.sqrt(12 * 3000) * math.sqrt(2)


def test_without_masks_these_tests_would_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "mask", lambda key, size, bits: np.zeros(size, masking.UNSIGNED[bits]))
    values = masked_values(tmp_path, {site: structured(0.25) for site in SITES})
    assert not any(looks_random(v) for v in values.values())


def test_no_mask_is_used_twice(tmp_path: Path) -> None:
    """Two rounds of the same updates, at the same sites: their difference would be zero under the same masks."""
    updates = {site: trained(site) for site in SITES}
    sites = sites_of(tmp_path, updates)
    collected(sites)
    first = {s: r.values for s, r in sites.told if isinstance(r, Masked)}
    sites.told.clear()
    collected(sites)  # the same round again, as after a failure
    second = {s: r.values for s, r in sites.told if isinstance(r, Masked)}
    for site in SITES:
        difference = (first[site] - second[site]).numpy().view(np.uint32) / 2**32
        assert looks_random(difference)


# ------------------------------------------------------------------------------------------------- what a site refuses


@pytest.fixture
def at(tmp_path: Path) -> Callable[[type], tuple[MaskedSites, dict[str, Any]]]:
    """`at(stage)`: sites that have answered all requests before this one, and what would come next."""

    def reached(stage: type) -> tuple[MaskedSites, dict[str, Any]]:
        sites = sites_of(tmp_path, lost=dict.fromkeys(SITES, stage))
        collected(sites)
        return sites, {site: request for site, request in sites.asked if isinstance(request, stage)}

    return reached


def test_no_site_gives_both_shares_of_one_site(tmp_path: Path) -> None:
    """Of each site that dealt it gives one, and then nothing any more."""
    sites = sites_of(tmp_path, lost={"north": Mask}, after=True)
    collected(sites)
    given = [reply for _, reply in sites.told if isinstance(reply, Unmasked)]
    assert len(given) == 3
    for reply in given:
        assert set(reply.own) == set(SITES) - {"north"}
        assert set(reply.lost) == {"north"}
    last = {site: request for site, request in sites.asked if isinstance(request, Unmask)}
    for site, request in last.items():
        with pytest.raises(ContractError, match="is in no such round"):
            sites.answer(site, request)


def test_a_second_list_of_survivors_is_refused(at: Any) -> None:
    sites, _ = at(Agree)
    sites.answer("east", Agree("m", 4, SITES))
    for again in (("east", "south", "west"), SITES):
        with pytest.raises(PrivacyError, match="asked to say who is in the sum twice") as refused:
            sites.answer("east", Agree("m", 4, again))
        assert refused.value.rule == "unmask"


@pytest.mark.parametrize("survivors", [("east", "west"), ("east",), (), ("east", "east", "west")])
def test_a_sum_of_too_few_is_refused(survivors: tuple[str, ...], at: Any) -> None:
    sites, _ = at(Agree)
    with pytest.raises(PrivacyError, match=r"A sum over \d sites was to be unmasked"):
        sites.answer("east", Agree("m", 4, survivors))


def test_a_sum_that_too_few_have_signed_is_not_unmasked(at: Any) -> None:
    sites, _ = at(Agree)
    cards = {site: sites.answer(site, Agree("m", 4, SITES)).card for site in SITES}
    few = (cards["east"], cards["west"], cards["west"])
    with pytest.raises(PrivacyError, match="2 of the sites in the sum have signed"):
        sites.answer("east", Unmask("m", 4, few))
    stranger = replace(cards["north"], key=cards["west"].key)
    with pytest.raises(PrivacyError, match="2 of the sites in the sum have signed"):
        sites.answer("east", Unmask("m", 4, (cards["east"], cards["west"], stranger)))
    assert set(sites.answer("east", Unmask("m", 4, tuple(cards.values()))).own) == set(SITES)


def test_an_update_is_masked_once(at: Any) -> None:
    sites, asked = at(Mask)
    sites.answer("east", asked["east"])
    fewer = replace(asked["east"], shares=dict(list(asked["east"].shares.items())[:2]))
    for request in (asked["east"], fewer):
        with pytest.raises(PrivacyError, match="asked to mask its update twice"):
            sites.answer("east", request)
    assert not (sites.folder / "east" / "held.safetensors").exists()


def test_shares_are_dealt_once(at: Any) -> None:
    sites, asked = at(Deal)
    sites.answer("east", asked["east"])
    with pytest.raises(PrivacyError, match="asked to deal shares twice"):
        sites.answer("east", asked["east"])


def test_an_update_is_not_masked_towards_few(at: Any) -> None:
    sites, asked = at(Mask)
    one = dict(list(asked["east"].shares.items())[:1])
    with pytest.raises(PrivacyError, match="Shares of 2 sites are here"):
        sites.answer("east", replace(asked["east"], shares=one))


def test_shares_for_another_cannot_be_opened(at: Any) -> None:
    sites, asked = at(Mask)
    with pytest.raises(ContractError, match="cannot be opened"):
        sites.answer("east", Mask("m", 4, {**asked["east"].shares, "west": asked["north"].shares["west"]}))


def other_key(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys, in which the server has put one of its own in place of the last one's."""
    card = keys[0].mask
    return (*keys[:-1], replace(keys[-1], mask=replace(keys[-1].mask, key=card.key.clone())))


CHANGES: dict[str, tuple[Callable[[Deal], Deal], type[Exception], str]] = {
    "a site twice": (lambda d: replace(d, keys=(*d.keys, d.keys[-1])), ContractError, "each site once"),
    "without it": (lambda d: replace(d, keys=d.keys[1:]), ContractError, "are not among those"),
    "another key of its own": (lambda d: replace(d, keys=tuple(other_key(d.keys[::-1])[::-1])), ContractError, "are not among"),
    "too few": (lambda d: replace(d, keys=d.keys[:2]), PrivacyError, "Of 2 sites, 3 would be enough"),
    "less than it counts itself": (lambda d: replace(d, weight=1), ContractError, "This one alone counts"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_keys_that_do_not_fit_are_refused(change: str, at: Any) -> None:
    sites, asked = at(Deal)
    do, error, says = CHANGES[change]
    with pytest.raises(error, match=says):
        sites.answer("east", do(asked["east"]))


def test_half_of_the_sites_cannot_unmask(tmp_path: Path) -> None:
    """With a threshold of half of them the server could tell two halves different things, and have both secrets of a site."""
    sites = sites_of(tmp_path)
    with pytest.raises(StudyError, match="threshold = 2 is not possible in a round of 4 sites"):
        collected(sites, threshold=2)
    low = Masking(2, 32, 16.0, "cases")
    held = {site: sites.answer(site, Hold(TRAIN, low)) for site in SITES}
    keys = tuple(held[site].keys for site in SITES)
    with pytest.raises(PrivacyError, match="Of 4 sites, 2 would be enough"):
        sites.answer("east", Deal("m", 4, keys, 10**6, 1000))


def test_a_restarted_site_knows_nothing_of_the_round_and_makes_new_keys(at: Any) -> None:
    sites, asked = at(Mask)
    old = next(r for s, r in sites.told if s == "east" and hasattr(r, "keys")).keys
    sites.sites["east"] = sites.started("east")
    with pytest.raises(ContractError, match="is in no such round"):
        sites.answer("east", asked["east"])
    new = sites.answer("east", Hold(TRAIN, Masking(3, 32, 16.0, "cases"))).keys
    assert not torch.equal(old.mask.key, new.mask.key)
    assert not torch.equal(old.share.key, new.share.key)


def test_a_round_that_is_taken_again_is_unmasked_for_the_same_sites_only(tmp_path: Path) -> None:
    """In a new life too: the two sums would differ by one update, since training gives the same bits again."""
    first = sites_of(tmp_path, lost={"west": Mask})
    assert collected(first).totals[0].count == 3
    again = sites_of(tmp_path)
    got = collected(again)
    assert (got.totals[0].count, got.answers) == (0, {})
    assert {got.failures[s] for s in SITES[:3]} == {SiteRefused("unmask")}
    assert not [reply for site, reply in again.told if isinstance(reply, Unmasked) and site != "west"]
    same = sites_of(tmp_path, lost={"west": Deal})
    assert collected(same).totals[0].count == 3


@pytest.mark.parametrize("request_", [Deal("m", 5, (), 1, 1), Mask("other", 4, {}), Agree("m", 3, SITES)])
def test_another_round_is_refused(request_: Request, at: Any) -> None:
    sites, _ = at(Mask)
    with pytest.raises(ContractError, match=r"is in round 4 of m"):
        sites.answer("east", request_)


# ------------------------------------------------------------------------------------------------ what the server checks


def spoilt(kind: type, change: Callable[[Any], Any]) -> Callable[[MaskedSites], None]:
    """The north answers something else to one kind of request."""

    def spoil(sites: MaskedSites) -> None:
        answer = sites.answer

        def wrong(site: str, request: Request) -> Any:
            reply = answer(site, request)
            return change(reply) if site == "north" and isinstance(reply, kind) else reply

        sites.answer = wrong  # type: ignore[method-assign]

    return spoil


LOST = {
    "a shorter update": spoilt(Masked, lambda r: Masked(r.values[:-1].clone())),
    "an update of floats": spoilt(Masked, lambda r: Masked(r.values.double())),
    "a share too few": spoilt(Dealt, lambda r: replace(r, shares=dict(list(r.shares.items())[:-1]))),
    "a short commitment": spoilt(Dealt, lambda r: replace(r, commitment=r.commitment[:5].clone())),
}


@pytest.mark.parametrize("what", LOST)
def test_a_site_that_answers_what_does_not_fit_is_lost(what: str, tmp_path: Path) -> None:
    sites = sites_of(tmp_path)
    LOST[what](sites)
    got = collected(sites)
    assert got.failures == {"north": SiteError("ContractError", "wrong_tensors", "")}
    assert got.totals[0].count == 3


NO_SUM = {
    "an update that was never masked": spoilt(Masked, lambda r: Masked(torch.zeros_like(r.values))),
    "another commitment": spoilt(Dealt, lambda r: replace(r, commitment=r.commitment ^ 1)),
    "other shares": spoilt(Unmasked, lambda r: replace(r, own={s: t ^ 1 for s, t in r.own.items()})),
}


@pytest.mark.parametrize("what", NO_SUM)
def test_what_is_no_sum_is_not_passed_on(what: str, tmp_path: Path) -> None:
    sites = sites_of(tmp_path)
    NO_SUM[what](sites)
    with pytest.raises(EngineError, match="could not be taken away"):
        collected(sites)


def weigh_otherwise(n_cases: int, share: float) -> int:
    return round(UNITS * n_cases**0.5)


def test_what_cannot_be_summed_is_refused_with_the_reason(tmp_path: Path) -> None:
    sites = sites_of(tmp_path)
    with pytest.raises(StudyError, match="the rule must see each update"):
        collected(sites, see_updates=True)
    with pytest.raises(StudyError, match="count otherwise than by cases"):
        collected(sites, weigh=weigh_otherwise)
    with pytest.raises(EngineError, match="A round of 4 sites cannot be summed: 5 must be"):
        collected(sites, threshold=5)
    two = (Block({"w": START["w"]}, {s: {"w": "w"} for s in SITES}), Block({"b": START["b"]}, {"east": {"b": "b"}}))
    with pytest.raises(StudyError, match="tensors of their own"):
        collected(sites, blocks=two)
    finish = dict.fromkeys(SITES, Finish("m", 4, ()))
    with pytest.raises(StudyError, match="in splitfed"):
        collect(sites.ask, finish, blocks=(one_block(START, SITES),), weigh=weight_of("mean"), asked={})
    assert sites.asked == []


# ------------------------------------------------------------------------------------------- with certificates, signed


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """Of four sites of one federation."""
    folder = tmp_path_factory.mktemp("certificates")
    now = datetime.datetime.now(datetime.UTC)
    authority = ec.generate_private_key(ec.SECP256R1())

    def certified(name: str, key: ec.EllipticCurvePrivateKey) -> Path:
        named = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, "authority")]
        made = x509.CertificateBuilder().subject_name(named[0]).issuer_name(named[1]).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        signed = made.not_valid_after(now + datetime.timedelta(days=1)).sign(authority, hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pem, pkcs = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (folder / f"{name}.key").write_bytes(key.private_bytes(pem, pkcs, serialization.NoEncryption()))
        return folder / f"{name}.crt"

    root = certified("authority", authority)
    keys = {site: ec.generate_private_key(ec.SECP256R1()) for site in SITES}
    return {
        site: Identity(root, certified(site, key), folder / f"{site}.key", tuple(SITES)) for site, key in keys.items()
    }


def test_signed_keys_give_the_same_sum(identities: dict[str, Identity], tmp_path: Path) -> None:
    sites = sites_of(tmp_path, identities=identities, lost={"west": Mask})
    check_mean(collected(sites), sites.trained, SITES[:3])


def test_a_key_of_the_servers_own_is_refused(identities: dict[str, Identity], tmp_path: Path) -> None:
    def swap(site: str, request: Request) -> Request:
        return replace(request, keys=other_key(request.keys)) if isinstance(request, Deal) else request

    sites = sites_of(tmp_path, identities=identities, change=swap)
    got = collected(sites)
    assert got.answers == {}
    with pytest.raises(PrivacyError, match="The card of west is not signed by a site of this federation"):
        sites.answer("east", next(r for s, r in sites.asked if s == "east" and isinstance(r, Deal)))


def test_two_stories_do_not_add_up_to_both_secrets(identities: dict[str, Identity], tmp_path: Path) -> None:
    """The east was told that all are in the sum, the others that it is not. What one list's signers give is of that list only."""
    sites = sites_of(tmp_path, identities=identities, lost=dict.fromkeys(SITES, Agree))
    collected(sites)
    told = {"east": SITES} | dict.fromkeys(SITES[1:], SITES[1:])
    cards = tuple(sites.answer(site, Agree("m", 4, told[site])).card for site in SITES)
    for site in SITES:
        with pytest.raises(PrivacyError, match="is not signed by a site of this federation"):
            sites.answer(site, Unmask("m", 4, cards))
    with pytest.raises(PrivacyError, match="1 of the sites in the sum have signed"):
        sites.answer("east", Unmask("m", 4, cards[:1]))
    for site in SITES[1:]:
        given = sites.answer(site, Unmask("m", 4, cards[1:]))
        assert (set(given.own), set(given.lost)) == (set(SITES[1:]), {"east"})
