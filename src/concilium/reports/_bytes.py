"""How many bytes a study sends: forecast from the shapes of its network, and as its run counted them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from concilium import catalog
from concilium.advice import examined
from concilium.costs import FORECAST, federated_cost, own_cost
from concilium.disclosure import without_paths
from concilium.errors import ConciliumError
from concilium.forecast import Cost
from concilium.local_updates import exchanges
from concilium.preparation import Event, Ledger, plan_for
from concilium.reports._found import Row
from concilium.reports._talk import Trained, first_settings, n_messages, trained_in
from concilium.schedule import Setting
from concilium.study import ForecastTable, StartTable, Study

Watch: TypeAlias = Callable[[Event], None]
TOLD = ForecastTable(site_gflops=1.0, server_gflops=1.0)
"""Bytes do not depend on it; where it is told, no machine is timed."""


@dataclass(frozen=True)
class Bytes:
    """Of one site in one round of training, without headers of messages; and outside of rounds in the whole run."""

    up: int
    """That it sends."""
    down: int
    """That it receives."""
    steps: int
    besides_up: int = 0
    besides_down: int = 0


Forecast: TypeAlias = "Mapping[str, Bytes] | str"
"""Site -> bytes; or why there are none."""


def forecasts(study: Study, watch: Watch = lambda event: None) -> dict[str, Forecast]:
    """What a round of each model will cost each site, or why that cannot be told; reads the cases of all sites,
    trains nothing."""
    models = {m.name: m for m in trained_in(study)}
    found: dict[str, Forecast] = {name: why_not(model) for name, model in models.items()}
    wanted = [name for name, why in found.items() if not why]
    if not wanted:
        return found
    try:
        told = _of_titles(study, watch)
    except (ConciliumError, OSError) as e:
        why = f"The cases of the sites could not be read here: {without_paths(str(e))}"
        return found | dict.fromkeys(wanted, why)
    return found | {name: _as_sent(models[name], told.get(name, "It was not planned.")) for name in wanted}


def why_not(model: Trained) -> str:
    """Why the bytes of a model cannot be forecast, whatever its data; empty where they can."""
    study, protocol = model.study, model.protocol
    if model.beside:
        return "Its training sends nothing more."
    if protocol == "local":
        return "No weights are sent; some hundred bytes a round."
    if protocol == "centralized":
        return "All cases lie in one place, and nothing is sent."
    if study.engine.name == "flare":
        return "The network is planned from what the sites tell of their cases first; until then its size is not known."
    if protocol not in (*FORECAST, "cyclic"):
        return f"No forecast exists for the protocol {protocol}. Run it in a simulation, which counts every byte."
    if study.plan.fingerprint == "site":
        return (
            "No forecast exists where sites have plans of their own. Run it in a simulation, which counts every byte."
        )
    if exchanges(study.local_update.name):
        name = study.local_update.name
        return f"No forecast exists for the local update {name}, which sends tensors beside the weights. Run it in a simulation."
    return ""


def _of_titles(study: Study, watch: Watch) -> dict[str, Forecast]:
    """Setting -> what its own model costs."""
    bare = _bare(study)
    found: dict[str, Forecast] = {}
    with examined(bare, watch) as (there, told, record, _):
        share = 1 - 1 / there.validation.folds
        cases = {site: max(1, round(share * f.n_cases)) for site, f in told.fingerprints.items()}
        for title, setting in first_settings(there).items():
            watch(Event("stage", f"Forecasting {title}"))
            try:
                plans = plan_for(setting, told, record, Ledger())
                taking = {site: n for site, n in cases.items() if site in setting.sites}
                sites = _cost(setting, plans, taking).sites
                found[title] = {
                    site: Bytes(s.up, s.down, s.steps, s.besides_up, s.besides_down) for site, s in sites.items()
                }
            except Exception as e:  # a network from outside need not run on shapes alone
                found[title] = f"It could not be forecast ({type(e).__name__}: {without_paths(str(e))})."
    return found


def _bare(study: Study) -> Study:
    """The study without what its networks start from, which does not change their size."""
    variants = {name: replace(v, start=StartTable(), forecast=TOLD) for name, v in study.variants.items()}
    return replace(study, variants=variants, start=StartTable(), forecast=TOLD)


def _cost(setting: Setting, plans: Any, cases: Mapping[str, int]) -> Cost:
    if setting.study.protocol.name in FORECAST:
        return own_cost(setting, plans, cases)
    return federated_cost(setting, plans, cases)


def _as_sent(model: Trained, told: Forecast) -> Forecast:
    """With what the way to collect updates adds."""
    if isinstance(told, str):
        return told
    if model.sums_secretly:
        options = {k: p.default for k, p in catalog.options("collect", "secure_sum").items()}
        bits = (options | dict(model.study.collect.options))["bits"]
        return {site: replace(b, up=b.up * bits // 32) for site, b in told.items()}
    if model.collects == "judged":
        return {
            site: replace(b, down=b.down + sum(o.up for s, o in told.items() if s != site)) for site, b in told.items()
        }
    return told


# -------------------------------------------------------------------------------------------------------------- measured


@dataclass(frozen=True)
class Measured:
    """What one site did for one model, by the run's own record: of several seeds and folds, all together."""

    up: int
    down: int
    steps: int
    rounds: int
    messages: int
    """Answers in training, counted from the rounds and steps in the record."""
    cases: int
    """Most that it trained on."""
    besides_up: int | None = None
    besides_down: int | None = None
    """Outside of rounds; nothing in runs of earlier versions."""


def measured(study: Study, rounds: Iterable[Row], accounts: Iterable[Row] = ()) -> dict[str, dict[str, Measured]]:
    """Model -> site -> what the lines of rounds.jsonl say; of models made beside others and in one place nothing.

    Args:
        accounts: the models of results.json, which say what went outside of rounds.
    """
    models = {m.name: m for m in trained_in(study) if not m.beside and m.protocol != "centralized"}
    lines: dict[str, dict[str, list[Row]]] = {}
    for row in rounds:
        name = row["model"].partition(".")[0]  # without seed and fold
        for site, took in row["sites"].items() if name in models else ():
            lines.setdefault(name, {}).setdefault(site, []).append(took)
    found = {name: {site: _sum(models[name], site, of) for site, of in sites.items()} for name, sites in lines.items()}
    besides: dict[tuple[str, str], list[Row]] = {}
    for account in accounts:
        for site, took in account.get("sites", {}).items():
            besides.setdefault((account["name"], site), []).append(took)
    return {
        name: {site: _with_besides(m, besides.get((name, site), ())) for site, m in sites.items()}
        for name, sites in found.items()
    }


def _with_besides(m: Measured, took: Sequence[Row]) -> Measured:
    if not took or not all("besides_up" in row for row in took):
        return m
    up, down = (sum(row[key] for row in took) for key in ("besides_up", "besides_down"))
    return replace(m, besides_up=up, besides_down=down)


def _sum(model: Trained, site: str, lines: Sequence[Row]) -> Measured:
    up, down, steps = (sum(line[key] for line in lines) for key in ("bytes_up", "bytes_down", "n_steps"))
    messages = n_messages(model, site, len(lines), steps)
    return Measured(up, down, steps, len(lines), messages, max(line["n_cases"] for line in lines))
