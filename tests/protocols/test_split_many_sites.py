"""Split training of many sites: averaged, with one body, in sequence, and what each clips."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from splitting import (
    EQUAL,
    SEED,
    STEPS,
    Engine,
    difference,
    first_weights,
    job_of,
    running,
    said,
    trained_apart,
    trained_whole,
)
from torch import nn

from concilium import catalog
from concilium.aggregation import must_see_updates, weight_of
from concilium.answers import Job
from concilium.answers.objective import make_objective
from concilium.answers.train import Cut
from concilium.collect.plain import collect as plain
from concilium.errors import StudyError
from concilium.messages import (
    Front,
    Tail,
    Tensors,
    Trained,
)
from concilium.networks import Stages, cut_apart
from concilium.protocols import WEIGHTS
from concilium.protocols.federated import federated
from concilium.protocols.splitfed import splitfed
from concilium.sharing import Sharing
from concilium.wire import part

# ------------------------------------------------------------------------------------------------------------------ clipping


def test_site_and_server_each_clip_their_own_gradient(tmp_path: Path) -> None:
    clip, rate = 0.1, 0.5
    job = job_of(clip_norm=clip, learning_rate=rate, momentum=0.0, weight_decay=0.0)
    weights, _ = trained_apart(job, ("deep",), tmp_path, steps={"a": 1})
    net = job.network()
    start = first_weights(job)
    net.load_state_dict(start)
    drawn = job.batches.draw(SEED, "a", 1, 0)
    make_objective(job)(net(drawn.image), drawn).backward()
    body = set(cut_apart(net, ("deep",), reveal_labels=True).body.state_dict())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}

    def norm(names: Iterable[str]) -> float:
        return float(torch.cat([gradients[n].flatten() for n in names]).norm())

    norms = {"body": norm(body), "site": norm(gradients.keys() - body)}
    assert min(norms.values()) > clip, "both are clipped"
    factor = {n: clip / (norms["body" if n in body else "site"] + 1e-6) for n in gradients}
    assert difference(weights, {n: start[n] - rate * factor[n] * gradients[n] for n in start}) <= EQUAL
    together = clip / (norm(gradients) + 1e-6)
    assert difference(weights, {n: start[n] - rate * together * gradients[n] for n in start}) > 1e-6


# ---------------------------------------------------------------------------------------------------------------- many sites

CASES = {"a": 1, "b": 2, "c": 5}
UNEQUAL = {"a": 4, "b": 2, "c": 4}


def three(name: str = "nnunet") -> dict[str, Job]:
    return {site: job_of(name, n_cases=n) for site, n in CASES.items()}


def one_body_by_hand(jobs: Mapping[str, Job], orders: Sequence[Sequence[str]], cut: tuple[str, ...]) -> Tensors:
    """Each site has a whole network, whose body is one and the same; fronts and tails are averaged after each round."""
    start = first_weights(jobs["a"])
    shared = jobs["a"].network()
    shared.load_state_dict(start)
    body = cut_apart(shared, cut, reveal_labels=True).body
    nets: dict[str, Stages] = {}
    for site in jobs:
        own = copy.deepcopy(shared)
        nets[site] = Stages({n: body[n] if n in body.names else own[n] for n in own.names})
    mine = {site: cut_apart(net, cut, reveal_labels=True).at_site for site, net in nets.items()}

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)

    steppers = {site: [sgd(mine[site])] for site in jobs}
    of_body = sgd(body)
    for number, order in enumerate(orders, start=1):
        for step in range(max(UNEQUAL.values())):
            for site in order:
                n = UNEQUAL[site]
                if step >= n:
                    continue
                both = [*steppers[site], of_body]
                for optimizer in both:
                    optimizer.param_groups[0]["lr"] = 0.01 * (1 - ((number - 1) * n + step) / (len(orders) * n)) ** 0.9
                    optimizer.zero_grad()
                drawn = jobs[site].batches.draw(SEED, site, number, step)
                make_objective(jobs[site])(nets[site](drawn.image), drawn).backward()
                for optimizer in both:
                    optimizer.step()
        states = {site: module.state_dict() for site, module in mine.items()}
        average = {n: sum(CASES[s] * states[s][n] for s in jobs) / sum(CASES.values()) for n in states["a"]}
        for module in mine.values():
            module.load_state_dict(average)
    return nets["a"].state_dict()


@pytest.mark.parametrize("cut", [("shallow",), ("deep",)], ids=" ".join)
def test_one_body_serves_the_sites_batch_by_batch_in_the_drawn_order(cut: tuple[str, ...], tmp_path: Path) -> None:
    jobs = three()
    engine = Engine(jobs, tmp_path)
    *_, last = running(splitfed, engine, jobs, variant="v2", cut=cut, rounds=3, steps=UNEQUAL)
    orders = []
    for number in (1, 2, 3):
        served = [site for site, r in engine.down if isinstance(r, Tail) and r.round == number]
        orders.append(tuple(served[:3]))
        assert sorted(orders[-1]) == sorted(jobs)
        assert served == [s for step in range(4) for s in orders[-1] if step < UNEQUAL[s]]
    assert len(set(orders)) > 1, "drawn for each round"
    assert difference(part(last.tensors, WEIGHTS), one_body_by_hand(jobs, orders, cut)) <= EQUAL
    assert difference(part(last.tensors, WEIGHTS), one_body_by_hand(jobs, [sorted(jobs)] * 3, cut)) > 1e-6


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_the_order_of_arrival_changes_no_bit(variant: str, tmp_path: Path) -> None:
    jobs = three()
    ends = []
    for seed in (0, 1):
        engine = Engine(jobs, tmp_path / str(seed), seed)
        *_, last = running(splitfed, engine, jobs, variant=variant, rounds=2, steps=UNEQUAL)
        ends.append((last.tensors, [site for site, _ in engine.up]))
    assert ends[0][1] != ends[1][1]
    assert all(torch.equal(t, ends[1][0][n]) for n, t in ends[0][0].items())


@pytest.mark.parametrize("name", ["nnunet", "unet batch", "segnet batch", "cgnet batch"])
def test_a_body_for_each_site_is_federated_averaging(name: str, tmp_path: Path) -> None:
    jobs = three(name)
    ends: dict[str, Tensors] = {}
    for protocol in (federated, splitfed):
        engine = Engine(jobs, tmp_path / protocol.__name__)
        *_, last = running(protocol, engine, jobs, rounds=2, steps=UNEQUAL)
        ends[protocol.__name__] = part(last.tensors, WEIGHTS)
    assert difference(ends["splitfed"], ends["federated"]) <= EQUAL


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("median", {}),
        ("trimmed_mean", {"share": 0.2}),
        ("krum", {}),
        ("fednova", {}),
        ("agreement", {}),
        ("momentum", {}),
    ],
)
def test_rules_that_see_updates_see_those_of_whole_networks(rule: str, options: dict[str, Any], tmp_path: Path) -> None:
    """As in federated training, whatever the rule makes of them: front, tail and the site's own body are one update."""
    jobs = three("unet batch")
    sees = must_see_updates(rule)
    how = {"rule": partial(catalog.load("aggregation", rule), **options)}
    how["collect"] = partial(plain, weigh=weight_of(rule), see_updates=sees, spool=tmp_path)
    ends: dict[str, Tensors] = {}
    for protocol in (federated, splitfed):
        engine = Engine(jobs, tmp_path / protocol.__name__)
        *_, last = running(protocol, engine, jobs, rounds=2, steps=UNEQUAL, **how)
        ends[protocol.__name__] = part(last.tensors, WEIGHTS)
    assert difference(ends["splitfed"], ends["federated"]) <= EQUAL
    engine = Engine(jobs, tmp_path / "v2")
    *_, last = running(splitfed, engine, jobs, variant="v2", rounds=1, steps=UNEQUAL, **how)
    assert all(t.isfinite().all() for t in part(last.tensors, WEIGHTS).values())


def test_one_body_is_not_federated_averaging(tmp_path: Path) -> None:
    jobs = three()
    ends: list[Tensors] = []
    for variant in ("v1", "v2"):
        *_, last = running(splitfed, Engine(jobs, tmp_path / variant), jobs, variant=variant, rounds=2, steps=UNEQUAL)
        ends.append(part(last.tensors, WEIGHTS))
    assert difference(*ends) > 1e-6


def one_after_the_other_by_hand(jobs: Mapping[str, Job], orders: Sequence[Sequence[str]]) -> Tensors:
    """One whole network that goes from site to site; what an optimiser keeps of front and tail stays at the site."""
    cut = ("deep",)
    net = jobs["a"].network()
    net.load_state_dict(first_weights(jobs["a"]))
    parts = cut_apart(net, cut, reveal_labels=True)

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)

    of_body, at_site = sgd(parts.body), {site: sgd(parts.at_site) for site in jobs}
    for number, order in enumerate(orders, start=1):
        for site in order:
            for step in range(n := UNEQUAL[site]):
                for optimizer in (both := [at_site[site], of_body]):
                    optimizer.param_groups[0]["lr"] = 0.01 * (1 - ((number - 1) * n + step) / (len(orders) * n)) ** 0.9
                    optimizer.zero_grad()
                drawn = jobs[site].batches.draw(SEED, site, number, step)
                make_objective(jobs[site])(net(drawn.image), drawn).backward()
                for optimizer in both:
                    optimizer.step()
    return net.state_dict()


def test_in_sequence_one_network_goes_from_site_to_site(tmp_path: Path) -> None:
    """With unequal numbers of steps; each site begins where the one before ended."""
    jobs = three()
    engine = Engine(jobs, tmp_path)
    rounds = list(running(splitfed, engine, jobs, variant="sequential", rounds=3, steps=UNEQUAL))
    orders = []
    for done in rounds:
        served = [site for site, r in engine.down if isinstance(r, Tail) and r.round == done.number]
        orders.append(list(dict.fromkeys(served)))
        assert served == [site for site in orders[-1] for _ in range(UNEQUAL[site])], "a turn is not interrupted"
        assert set(done.answers) == set(jobs)
        assert done.n_tensors > 0
    assert len(set(map(tuple, orders))) > 1, "drawn for each round"
    assert difference(part(rounds[-1].tensors, WEIGHTS), one_after_the_other_by_hand(jobs, orders)) <= EQUAL
    assert difference(part(rounds[-1].tensors, WEIGHTS), one_after_the_other_by_hand(jobs, [sorted(jobs)] * 3)) > 1e-6


@pytest.mark.parametrize("steps", [{"a": 1, "b": 7, "c": 3}, {"a": 5, "b": 1, "c": 1}], ids=str)
@pytest.mark.parametrize("variant", ["v1", "v2", "sequential"])
def test_sites_with_unequal_numbers_of_batches_do_not_wait_for_each_other(
    variant: str, steps: dict[str, int], tmp_path: Path
) -> None:
    jobs = three()
    engine = Engine(jobs, tmp_path)
    *_, last = running(splitfed, engine, jobs, variant=variant, rounds=2, steps=steps)
    assert last.failures == {}
    assert {site: answer.n_steps for site, answer in last.answers.items()} == steps


def test_for_one_site_a_sequence_is_the_whole_network(tmp_path: Path) -> None:
    weights, _ = trained_apart(job_of(), ("deep",), tmp_path, variant="sequential", rounds=2, steps={"a": STEPS // 2})
    assert difference(weights, trained_whole(job_of(), rounds=2, steps=STEPS // 2)) <= EQUAL


def keeping(jobs: Mapping[str, Job], cut: tuple[str, ...]) -> tuple[dict[str, Job], Sharing]:
    """The same sites, which keep front and tail."""
    net = jobs["a"].network()
    held = frozenset(cut_apart(net, cut, reveal_labels=True).at_site.state_dict())
    size = sum(t.numel() for t in net.state_dict().values())
    keep = frozenset(net.state_dict())
    return {s: replace(j, kept=keep) for s, j in jobs.items()}, Sharing(kept=held, sizes=dict.fromkeys(jobs, size))


@pytest.mark.parametrize("variant", ["v3", "v2", "sequential"])
def test_front_and_tail_that_stay_are_in_no_message_and_the_body_is_trained_by_all(
    variant: str, tmp_path: Path
) -> None:
    jobs, sharing = keeping(three(), ("deep",))
    engine = Engine(jobs, tmp_path)
    start = first_weights(jobs["a"])
    rounds = list(running(splitfed, engine, jobs, variant=variant, rounds=2, steps=UNEQUAL, sharing=sharing))
    assert all(r.failures == {} and set(r.answers) == set(jobs) for r in rounds)
    assert all(not request.weights for request in said(engine.down, Front))
    assert all(not reply.weights for reply in said(engine.up, Trained))
    body = {n: t for n, t in part(rounds[-1].tensors, WEIGHTS).items() if n not in sharing.kept}
    assert max(float((t - start[n]).abs().max()) for n, t in body.items()) > 1e-4
    cut = Cut(("deep",), True)
    own = {site: engine.members[site]._models.learner(jobs[site], "m", cut).weights() for site in jobs}
    assert own["a"].keys() == sharing.kept
    assert all(difference(own["a"], own[site]) > 1e-4 for site in ("b", "c")), "each has its own"


def test_v3_with_a_front_that_is_shared_is_refused(tmp_path: Path) -> None:
    jobs = three()
    with pytest.raises(StudyError, match=r"variant = 'v3' is not possible .* keep = \['ends'\]"):
        next(running(splitfed, Engine(jobs, tmp_path), jobs, variant="v3"))
