"""What a study will cost before it runs: bytes, seconds and memory of each site and of the server, of every way to train it.

Bytes and memory follow from shapes alone (`forecast.py`, `loads.py`). Seconds are operations over the speed of the machine, which
the study tells (`[forecast]`), or which is timed on this one; then what the link takes is added:

    federated            the slowest site: its steps + a reply + the weights both ways
    splitfed v1, v3      the slowest site: its steps, each with the server's share, two replies and the maps both ways, and at the
                         end a reply and the weights of front and tail; but no less than the server needs for the steps of all
    v2                   the same one site after the other, but for the fronts, which sites compute while they wait
    sequential           one site after the other
    vertical             its steps, each the slowest front with its maps and their gradients, the server's share, and the tail
                         with what it takes and gives back; four replies a step; at the end a reply and the weights

Every site has a link of its own, of the same speed both ways; the server's is taken to be wide enough for all. Reading and
augmenting patches and headers of messages are not in it. What validation, the finished model and scoring send is told apart
(`besides.py`), and is not in the seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import ceil

from torch import Tensor

from concilium.beginning import drawn_weights
from concilium.besides import besides, besides_of_parties, validation_windows
from concilium.errors import StudyError
from concilium.forecast import Cost, SiteCost, crossing_of, party_bytes, step_bytes
from concilium.loads import Load, party_loads, split_loads, whole_load
from concilium.local_updates import exchanges, part_of
from concilium.networks._fusion import FRONTS, tail_of
from concilium.planning import Plans, batch_size_of, image_of, network_of
from concilium.protocols._cohort import size
from concilium.protocols.splitfed import ONE_BODY
from concilium.record import Record
from concilium.schedule import Setting, models
from concilium.sharing import EVERYTHING, Sharing
from concilium.speed import speed_of, time_parties, time_split, time_whole
from concilium.study import ForecastTable, Study, fronts_stay, is_vertical, least_sites, training_of, undefended
from concilium.transport import KINDS

FORECAST = ("federated", "splitfed", "vertical")
"""Protocols whose costs can be told."""
SUM = 28
"""Bytes that the server holds of each value while it averages: the weights before and after, the pair of the sum, an update."""


# -------------------------------------------------------------------------------------------------------------- every way


def every_way(
    setting: Setting, plans: Plans, cases: Mapping[str, int], watch: Callable[[str], None] = lambda text: None
) -> list[Cost]:
    """`federated`, and `splitfed` at every cut with a name, and at the study's, as each `transport`.

    Args:
        cases: training cases of each site.
        watch: is told what is forecast.
    """
    study = setting.study
    p = study.protocol
    if is_vertical(study):
        watch("Forecasting vertical")
        return vertical_costs(setting, plans, cases, kinds=KINDS)
    splits = p.name == "splitfed"
    network = network_of(undefended(study), replace(plans, by_site={}))
    named = network(deep_supervision=False)
    cuts: list[tuple[str, ...]] = [(name,) for name in named.cuts if named.split_points]
    own = _cut(study) if splits else ()
    cuts += [own] if own and own not in cuts else []
    watch("Forecasting federated")
    found = [federated_cost(setting, plans, cases)]
    for cut in cuts:
        watch(f"Forecasting splitfed, cut {' '.join(cut)}")
        try:
            found += splitfed_costs(setting, plans, cases, cut=cut, kinds=KINDS)
        except StudyError:  # a cut with a name that this network does not have
            continue
    return found


def untold(study: Study) -> str:
    """Why local training costs more than is told here, which is what plain steps cost; nothing where it does not."""
    name = study.local_update.name
    if exchanges(name):
        return f"its local update {name} sends more than weights"
    return f"its local update {name} computes more than a step" if part_of(name, "COMPUTES_MORE") else ""


def note_cost(setting: Setting, plans: Plans, cases: Mapping[str, int], record: Record) -> list[str]:
    """Write down for the report what the setting's own model will cost, if `[forecast]` asks and it can be; why it cannot."""
    study = setting.study
    p = study.protocol
    if study.forecast is None or untold(study) or p.name not in FORECAST:
        return []
    try:
        cost = own_cost(setting, plans, cases)
    except Exception as e:  # a network from outside need not run on shapes alone, and training goes on all the same
        return [f"{setting.title}: what training costs could not be forecast ({type(e).__name__}: {e})."]
    record.write_json(f"forecast/{setting.title}{setting.suffix}.json", asdict(cost))
    return []


def own_cost(setting: Setting, plans: Plans, cases: Mapping[str, int]) -> Cost:
    """Of the setting's own protocol, one of `FORECAST`."""
    p = setting.study.protocol
    if p.name == "federated":
        return federated_cost(setting, plans, cases)
    kinds = (p.options["transport"],)
    if is_vertical(setting.study):
        (cost,) = vertical_costs(setting, plans, cases, kinds=kinds)
    else:
        (cost,) = splitfed_costs(setting, plans, cases, cut=_cut(setting.study), kinds=kinds)
    return cost


def federated_cost(setting: Setting, plans: Plans, cases: Mapping[str, int]) -> Cost:
    """Of federated training, which sends what is shared of the whole network both ways."""
    study = undefended(setting.study)
    training = training_of(study)
    weights, frozen = drawn_weights(study, replace(plans, by_site={}))
    sharing = plans.sharing if study.protocol.name == "federated" else EVERYTHING
    known: dict[tuple[str, int], tuple[int, float]] = {}
    sites = {}
    for site, steps in _steps(setting, plans, cases).items():
        told = study.sites[site].micro_batch
        at_once = told if isinstance(told, int) else 0
        key = (plans.of(site), at_once)
        if key not in known:
            network, batch = network_of(study, plans, site), image_of(study, plans, site)
            load = whole_load(network, batch, training, at_once=at_once)
            clock = partial(time_whole, network, training)
            timed = whole_load(network, batch, replace(training, views=0), at_once=at_once) if training.views else load
            speed = speed_of(hardware_of(study), study.engine.device, clock, batch, timed, timed)
            known[key] = load.memory, speed.of_site(load)
        memory, a_step = known[key]
        size = _shared(sharing, weights, site)
        more = besides(study, {site: size})[site]
        sites[site] = SiteCost(size, size, memory, steps * a_step, steps, more.up, more.down)
    link = _link(study)
    seconds = max(s.seconds + link(s.up + s.down, 1) for s in sites.values())
    at_server = sum(SUM * t.numel() for t in weights.values()) + sum(t.nbytes for t in frozen.values())
    return Cost("federated", "", (), "float32", sites, at_server, 0.0, seconds, study.protocol.rounds)


def splitfed_costs(
    setting: Setting, plans: Plans, cases: Mapping[str, int], *, cut: tuple[str, ...], kinds: Sequence[str]
) -> list[Cost]:
    """Of split training at a cut, as each of these kinds of transport.

    Raises:
        StudyError: the network cannot be cut so.
    """
    study, training = setting.study, training_of(setting.study)
    splits = study.protocol.name == "splitfed"
    options = study.protocol.options if splits else {}
    variant, reveal = options.get("variant", "v1"), bool(options.get("reveal_labels", False))
    plans = replace(plans, by_site={}, sharing=plans.sharing if splits else EVERYTHING)
    network, batch = network_of(study, plans, cut=cut), image_of(study, plans)
    site_load, server_load = split_loads(network, cut, batch, training, reveal_labels=reveal)
    clock = partial(time_split, network, training, cut=cut, reveal_labels=reveal)
    speed = speed_of(hardware_of(study), study.engine.device, clock, batch, site_load, server_load)
    at_site, at_server = speed.of_site(site_load), speed.of_server(server_load)
    crossing = crossing_of(network, cut, batch=batch, precision=training.precision, reveal_labels=reveal)
    held = _shared(plans.sharing, crossing.at_site, "")
    steps = _steps(setting, plans, cases)
    given = _shared(plans.sharing, drawn_weights(study, plans)[0], "")
    more = besides(study, dict.fromkeys(steps, given))
    found = []
    for kind in kinds:
        step_up, step_down = step_bytes(crossing.sent, crossing.left, kind)
        sites = {
            s: SiteCost(
                n * step_up + held, n * step_down + held, site_load.memory, n * at_site, n, more[s].up, more[s].down
            )
            for s, n in steps.items()
        }
        present = _present(study)
        memory = server_load.memory * (1 if variant in ONE_BODY else ceil(present * len(sites)))
        of_server = present * at_server * sum(steps.values())
        seconds = _split_seconds(study, variant, sites, at_server, present)
        found.append(Cost("splitfed", variant, cut, kind, sites, memory, of_server, seconds, study.protocol.rounds))
    return found


def vertical_costs(setting: Setting, plans: Plans, cases: Mapping[str, int], *, kinds: Sequence[str]) -> list[Cost]:
    """Of vertical training as each of these kinds of transport; of a party that is left out of steps, those that it takes.

    Raises:
        StudyError: the network cannot be cut so.
    """
    study, training = setting.study, training_of(setting.study)
    options, steps = study.protocol.options, _steps(setting, plans, cases)
    network, batch = network_of(study, plans), image_of(study, plans)
    labels = str(options["labels"])
    after = FRONTS if options["body"] == "labels" else tail_of(network(deep_supervision=False))
    loads, at_server, tail = party_loads(network, batch, training, after=after, labels=labels)
    of_all = Load(sum(load.flops for load in loads.values()), 0)
    clock = partial(time_parties, network, training, after=after, labels=labels)
    speed = speed_of(hardware_of(study), study.engine.device, clock, batch, of_all, at_server)
    at_tail, server_s, link = speed.site * tail, speed.of_server(at_server), _link(study)
    windows = validation_windows(study, plans, cases[labels])
    found = []
    for kind in kinds:
        told = party_bytes(
            network, batch=batch, precision=training.precision, after=after, labels=labels, transport=kind,
            stay=fronts_stay(study),
        )  # fmt: skip
        sites = {}
        held = {site: b.weights for site, b in told.items()}
        more = besides_of_parties(study, plans, held, after=after, labels=labels, transport=kind, windows=windows)
        for site, n in steps.items():
            taken = n if site == labels else round(n * (1 - options["drop"]))
            up, down = told[site].round(taken)
            seconds = taken * speed.of_site(loads[site])
            sites[site] = SiteCost(up, down, loads[site].memory, seconds, taken, more[site].up, more[site].down)
        (n_steps,) = set(steps.values())
        fronts = [
            speed.of_site(loads[site]) - at_tail * (site == labels) + link(b.step_up + b.step_down, 2)
            for site, b in told.items()
        ]
        weights = max(link(2 * b.weights, 1) for b in told.values())
        seconds = n_steps * (max(fronts) + server_s + at_tail + link(0, 2)) + weights
        whole = at_server.memory, n_steps * server_s, seconds, study.protocol.rounds
        found.append(Cost("vertical", "", _cut(study), kind, sites, *whole))
    return found


def _present(study: Study) -> float:
    """The share of the sites that take part in a round, in the mean over rounds."""
    options, n = study.protocol.options, len(study.sites)
    if cohorts := options.get("cohorts"):
        return sum(len(set(names)) for names in cohorts) / len(cohorts) / n
    return size(n, options.get("participation", 1.0), least_sites(study)) / n


def _split_seconds(study: Study, variant: str, sites: Mapping[str, SiteCost], step: float, present: float) -> float:
    """Of a round; `step`: of one at the server; `present`: the share of the sites that take part."""
    link = _link(study)
    each = [s.seconds + s.steps * step + link(s.up + s.down, 2 * s.steps + 1) for s in sites.values()]
    if variant == "sequential":
        return present * sum(each)
    if variant == "v2":  # while one site has the body, the others compute their fronts: about half of a site's share
        fronts = [s.seconds / 2 for s in sites.values()]
        return present * (sum(each) - sum(fronts)) + max(fronts)
    return max(*each, present * sum(s.steps for s in sites.values()) * step)


def _cut(study: Study) -> tuple[str, ...]:
    cut = study.protocol.options["cut"]
    return (cut,) if isinstance(cut, str) else tuple(cut)


def hardware_of(study: Study) -> ForecastTable:
    """Links and machines that the study tells, or the usual ones."""
    return study.forecast or ForecastTable()


def _link(study: Study) -> Callable[[int, int], float]:
    """Seconds that so many bytes take, in so many requests and replies."""
    told = hardware_of(study)
    return lambda n_bytes, replies: 8e-6 * n_bytes / told.mbit + 1e-3 * told.ms * replies


def _steps(setting: Setting, plans: Plans, cases: Mapping[str, int]) -> Mapping[str, int]:
    return next(models(setting, cases, partial(batch_size_of, setting.study, plans))).steps


def _shared(sharing: Sharing, weights: Mapping[str, Tensor], site: str) -> int:
    """Bytes of what a site shares."""
    if sharing.blocks:
        return sum(t.numel() * t.element_size() for b in sharing.blocks if site in b.names for t in b.like.values())
    return sum(t.numel() * t.element_size() for t in sharing.of(weights).values())
