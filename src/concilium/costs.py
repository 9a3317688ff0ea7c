"""What a study will cost before it runs: bytes, seconds and memory of each site and of the server, of every way to train it.

Bytes and memory follow from shapes alone (`forecast.py`, `loads.py`). Seconds are operations over the speed of the machine, which
the study tells (`[forecast]`), or which is timed on this one; then what the link takes is added:

    federated            the slowest site: its steps + a reply + the weights both ways
    splitfed v1, v3      the slowest site: its steps, each with the server's share, two replies and the maps both ways, and at the
                         end a reply and the weights of front and tail; but no less than the server needs for the steps of all
    v2                   the same one site after the other, but for the fronts, which sites compute while they wait
    sequential           one site after the other

Every site has a link of its own, of the same speed both ways; the server's is taken to be wide enough for all. Reading and
augmenting patches, headers of messages, and validation are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from torch import Tensor

from concilium.data.plan import open_plan
from concilium.errors import StudyError
from concilium.forecast import split_bytes
from concilium.loads import split_loads, whole_load
from concilium.local_updates import exchanges
from concilium.networks import cut_apart
from concilium.planning import Plans, batch_size_of, initial_weights, network_of
from concilium.record import Record
from concilium.schedule import Setting, models
from concilium.sharing import EVERYTHING, Sharing
from concilium.speed import speed_of, time_split, time_whole
from concilium.study import ForecastTable, Study, training_of
from concilium.transport import KINDS

SUM = 28
"""Bytes that the server holds of each value while it averages: the weights before and after, the pair of the sum, an update."""
ONE_BODY = ("v2", "sequential")


@dataclass(frozen=True)
class SiteCost:
    """Of one site, in a round."""

    up: int
    """Bytes that it sends."""
    down: int
    """Bytes that it receives."""
    memory: int
    """Most bytes of tensors at a time."""
    seconds: float | None
    """Of computing; `None`: not timed."""
    steps: int


@dataclass(frozen=True)
class Cost:
    """Of one way to train, in a round."""

    protocol: str
    variant: str
    """Of `splitfed`."""
    cut: tuple[str, ...]
    transport: str
    sites: Mapping[str, SiteCost]
    server_memory: int
    server_seconds: float | None
    """Of computing, for all sites."""
    seconds: float | None
    """Of the round."""
    rounds: int


# -------------------------------------------------------------------------------------------------------------- every way


def every_way(
    setting: Setting, plans: Plans, cases: Mapping[str, int], watch: Callable[[str], None] = lambda text: None
) -> list[Cost]:
    """`federated`, and `splitfed` at every cut with a name, and at the study's, as each `transport`; with seconds.

    Args:
        cases: training cases of each site.
        watch: is told what is forecast.
    """
    study = setting.study
    p = study.protocol
    splits = p.name == "splitfed"
    network = network_of(study, replace(plans, by_site={}))
    named = network(deep_supervision=False)
    cuts = [(name,) for name in named.cuts if named.split_points]
    own = p.options["cut"] if splits else ()
    own = (own,) if isinstance(own, str) else tuple(own)
    cuts += [own] if own and own not in cuts else []
    watch("Forecasting federated")
    found = [federated_cost(setting, plans, cases, timed=True)]
    for cut in cuts:
        watch(f"Forecasting splitfed, cut {' '.join(cut)}")
        try:
            found += splitfed_costs(setting, plans, cases, cut=cut, kinds=KINDS, timed=True)
        except StudyError:  # a cut with a name that this network does not have
            continue
    return found


def note_cost(setting: Setting, plans: Plans, cases: Mapping[str, int], record: Record) -> list[str]:
    """Write down for the report what the setting's own model will cost, if the study has `[forecast]`; why that cannot be told.

    It is told of `federated` and `splitfed`, with local updates that exchange nothing but weights.
    """
    study = setting.study
    p = study.protocol
    if study.forecast is None or exchanges(study.local_update.name) or p.name not in ("federated", "splitfed"):
        return []
    try:
        if p.name == "federated":
            cost = federated_cost(setting, plans, cases, timed=True)
        else:
            cut, kind = p.options["cut"], p.options["transport"]
            after = (cut,) if isinstance(cut, str) else tuple(cut)
            (cost,) = splitfed_costs(setting, plans, cases, cut=after, kinds=(kind,), timed=True)
    except Exception as e:  # a network from outside need not run on shapes alone, and training goes on all the same
        return [f"{setting.title}: what training costs could not be forecast ({type(e).__name__}: {e})."]
    record.write_json(f"forecast/{setting.title}{setting.suffix}.json", asdict(cost))
    return []


def federated_cost(setting: Setting, plans: Plans, cases: Mapping[str, int], *, timed: bool = False) -> Cost:
    """Of federated training, which sends what is shared of the whole network both ways."""
    study, training = setting.study, training_of(setting.study)
    weights = initial_weights(study, replace(plans, by_site={}))
    speed, loads = None, {}
    sites = {}
    for site, steps in _steps(setting, plans, cases).items():
        table = study.sites[site]
        network, batch = network_of(study, plans, site), _batch(study, plans, site)
        key = (plans.of(site), table.micro_batch)
        if key not in loads:
            loads[key] = whole_load(network, batch, training, at_once=table.micro_batch or 0)
        if timed and speed is None:
            speed = speed_of(
                study.forecast or ForecastTable(),
                study.engine.device,
                partial(time_whole, network, training),
                batch,
                loads[key],
                loads[key],
            )
        size = _shared(plans.sharing if study.protocol.name == "federated" else EVERYTHING, weights, site)
        took = None if speed is None else steps * speed.of_site(loads[key])
        sites[site] = SiteCost(size, size, loads[key].memory, took, steps)
    n_values = sum(t.numel() for t in weights.values())
    link = _link(study)
    seconds = None if speed is None else max((s.seconds or 0.0) + link(s.up + s.down, 1) for s in sites.values())
    return Cost(
        "federated",
        "",
        (),
        "float32",
        sites,
        SUM * n_values,
        None if speed is None else 0.0,
        seconds,
        study.protocol.rounds,
    )


def splitfed_costs(
    setting: Setting,
    plans: Plans,
    cases: Mapping[str, int],
    *,
    cut: tuple[str, ...],
    kinds: Sequence[str],
    timed: bool = False,
) -> list[Cost]:
    """Of split training at a cut, as each of these kinds of transport.

    Raises:
        StudyError: the network cannot be cut so.
    """
    study, training = setting.study, training_of(setting.study)
    splits = study.protocol.name == "splitfed"
    options = study.protocol.options if splits else {}
    variant, reveal = options.get("variant", "v1"), bool(options.get("reveal_labels", False))
    one_plan = replace(plans, by_site={})
    network, batch = network_of(study, one_plan), _batch(study, one_plan, "")
    site_load, server_load = split_loads(network, cut, batch, training, reveal_labels=reveal)
    speed = None
    if timed:
        clock = partial(time_split, network, training, cut=cut, reveal_labels=reveal)
        speed = speed_of(study.forecast or ForecastTable(), study.engine.device, clock, batch, site_load, server_load)
    parts = cut_apart(network(deep_supervision=training.deep_supervision and reveal), cut, reveal_labels=reveal)
    kept = plans.sharing.kept if splits else frozenset()
    held = sum(t.numel() * t.element_size() for n, t in parts.at_site.state_dict().items() if n not in kept)
    found = []
    for kind in kinds:
        step = split_bytes(
            network, cut, batch=tuple(batch), precision=training.precision, reveal_labels=reveal, transport=kind
        )
        sites = {}
        for site, steps in _steps(setting, one_plan, cases).items():
            took = None if speed is None else steps * speed.of_site(site_load)
            up, down = steps * step.step_up + held, steps * step.step_down + held
            sites[site] = SiteCost(up, down, site_load.memory, took, steps)
        owners = 1 if variant in ONE_BODY else len(sites)
        n_steps = sum(s.steps for s in sites.values())
        server = None if speed is None else n_steps * speed.of_server(server_load)
        seconds = None if speed is None else _split_seconds(study, variant, sites, speed.of_server(server_load))
        found.append(
            Cost(
                "splitfed",
                variant,
                cut,
                kind,
                sites,
                owners * server_load.memory,
                server,
                seconds,
                study.protocol.rounds,
            )
        )
    return found


def _split_seconds(study: Study, variant: str, sites: Mapping[str, SiteCost], at_server: float) -> float:
    """Of a round; `at_server`: of one step."""
    link = _link(study)
    each = [(s.seconds or 0.0) + s.steps * at_server + link(s.up + s.down, 2 * s.steps + 1) for s in sites.values()]
    if variant == "sequential":
        return sum(each)
    if variant == "v2":  # while one site has the body, the others compute their fronts: about half of a site's share
        return (
            sum(each)
            - sum((s.seconds or 0.0) / 2 for s in sites.values())
            + max((s.seconds or 0.0) / 2 for s in sites.values())
        )
    return max(*each, sum(s.steps for s in sites.values()) * at_server)


def _link(study: Study) -> Callable[[int, int], float]:
    """Seconds that so many bytes take, in so many requests and replies."""
    told = study.forecast or ForecastTable()
    return lambda n_bytes, replies: 8e-6 * n_bytes / told.mbit + 1e-3 * told.ms * replies


def _steps(setting: Setting, plans: Plans, cases: Mapping[str, int]) -> Mapping[str, int]:
    return next(models(setting, cases, partial(batch_size_of, setting.study, plans))).steps


def _batch(study: Study, plans: Plans, site: str) -> tuple[int, ...]:
    plan = open_plan(plans.of(site), study.plan.configuration)
    return (batch_size_of(study, plans, site), len(plans.channels), *plan.patch_size)


def _shared(sharing: Sharing, weights: Mapping[str, Tensor], site: str) -> int:
    """Bytes of what a site shares."""
    if sharing.blocks:
        return sum(t.numel() * t.element_size() for b in sharing.blocks if site in b.names for t in b.like.values())
    return sum(t.numel() * t.element_size() for t in sharing.of(weights).values())
