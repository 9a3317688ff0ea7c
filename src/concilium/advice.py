"""Before training: the plan of all sites together, beside the plan that each site's own data would give.

The sites are examined as a run examines them, and the plans are made as a run makes them, in a folder that is gone afterwards.
Every site's fingerprint is seen alone here: this is for one workstation that has the folders, not for the server of a federation.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from concilium import catalog
from concilium.costs import FORECAST, every_way, hardware_of, own_cost, untold
from concilium.data.draws import drawn_from
from concilium.data.fingerprint import merge, to_json
from concilium.data.plan import open_plan
from concilium.data.typical import AXES, medians, ranges
from concilium.engines import Engine
from concilium.errors import ContractError, DataError, StudyError
from concilium.forecast import Cost
from concilium.messages import Fingerprint
from concilium.planning import Plans, Told, network_of, share_own_plans
from concilium.preparation import Event, Ledger, ask_sites, on_folders, plan_for
from concilium.record import Record
from concilium.schedule import Setting, settings
from concilium.sharing import Table, described, kept_of, shared_now, table_of
from concilium.study import ForecastTable, StartTable, Study, divide, is_vertical, names_of, places
from concilium.suitability import Advice, Outline, View, advise, view_of

OF_PARTIES = Advice(
    "one", (), "One plan for all parties: they have the same patients, whose geometry whoever has the labels tells.", (), (), ()
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """The joint plan, each site beside it, and what the rule says."""

    study: str
    configuration: str
    n_cases: int
    channels: tuple[str, ...]
    joint: Outline
    sites: Mapping[str, View]
    advice: Advice
    warnings: tuple[str, ...]
    problems: tuple[str, ...]
    """Sites that did not answer."""
    excluded: tuple[Mapping[str, Any], ...]
    """Cases that were set aside."""
    hardware: ForecastTable = ForecastTable()
    """What `costs` holds for."""
    costs: tuple[Cost, ...] = ()
    """Of every way to train."""


def plan(
    study: Study,
    out: Path | None,
    *,
    forecast: bool = True,
    watch: Callable[[Event], None] = lambda event: None,
) -> Planned:
    """Examine the sites, make the joint plan and each site's own; what models start from does not count.

    Args:
        out: a folder to keep the plans and fingerprints in: of all (`plans.json`, `fingerprint.json`) and of each site.
        forecast: tell what every way to train, and every variant, would cost, with the study's `[forecast]`.

    Raises:
        StudyError: the study says of a site not where its data lie, or `out` is not empty.
        DataError, EngineError: the sites' data cannot be used together.
    """
    _check(study, out)
    variants = study.variants
    study = replace(study, variants={}, start=StartTable(), plan=replace(study.plan, fingerprint="pooled"))
    with examined(study, watch) as (study, told, record, ledger):
        watch(Event("stage", "Planning for all sites together"))
        joint = plan_for(settings(study)[0][0], told, record, ledger)
        planned = _plans(study, told, joint, record, ledger, watch)
        if out is not None:  # the study's own plans; those of its variants are for the forecast only
            _keep(record.folder, out)
        if forecast:
            planned = _with_costs(planned, study, variants, joint, (told, record), watch)
    return planned


@contextmanager
def examined(
    study: Study, watch: Callable[[Event], None] = lambda event: None
) -> Iterator[tuple[Study, Told, Record, Ledger]]:
    """Have the sites of a study read their cases, as a run does: the study on folders, what they told, and a record that plans
    can be made in. All of it is gone afterwards.

    Raises:
        StudyError, DataError, EngineError: the sites' data are not here, or cannot be used together.
    """
    with tempfile.TemporaryDirectory(prefix="concilium-plan-") as name:
        folder = Path(name) / "plan"
        layout = divide(study, folder)
        record = Record(folder, study, resume=False)
        try:
            ledger = Ledger(warnings=list(layout.notes))
            if layout.parts:
                watch(Event("stage", f"Writing {layout.summary}"))
                study = on_folders(study, layout, folder)
            engine = _connect(study, record)
            try:
                watch(Event("stage", "Reading every case"))
                told = ask_sites(study, engine, record, ledger)
            finally:
                engine.close()
            yield study, told, record, ledger
        finally:
            record.close()


def _check(study: Study, out: Path | None) -> None:
    if study.engine.name == "flare":
        raise StudyError(
            f"Study {study.study.name} is for the engine flare: its sites' fingerprints are not for one workstation to see. "
            "concilium plan needs the folders of all sites. Give a study for the engine simulation."
        )
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"--out {out} is not empty. Expected a folder that is not there yet. Give another.")


def _connect(study: Study, record: Record) -> Engine:
    e = study.engine
    engine: Engine = catalog.load("engines", e.name)(
        sites={name: site.data for name, site in study.sites.items()},
        test=None,  # the test set has no part in the plan
        folder=record.folder,
        run=record.run_id,
        workers=e.workers,
        threads=e.threads,
        device=e.device,
        **({"names": names} if (names := names_of(study)) else {}),
    )
    return engine


def _keep(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("fingerprint.json", "plans.json"):
        shutil.copy(folder / name, out / name)
    for name in ("fingerprints", "plans"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, out / name)


# ------------------------------------------------------------------------------------------------------------------ plans


def _plans(
    study: Study, told: Told, joint_plans: Plans, record: Record, ledger: Ledger, watch: Callable[[Event], None]
) -> Planned:
    base = settings(study)[0][0]
    joint = _outline(study, joint_plans, merge(told.fingerprints.values()))
    own: dict[str, Plans] = {}
    why_not: dict[str, str] = {}
    for site, fingerprint in told.fingerprints.items():
        if is_vertical(study):
            why_not[site] = "its channels are of the same patients as the others'"
            continue
        watch(Event("stage", f"Planning for {site} alone"))
        record.write_text(f"fingerprints/{site}.json", to_json(fingerprint))
        try:
            own[site] = plan_for(_alone(base, site), replace(told, fingerprints={site: fingerprint}), record, Ledger())
        except (ContractError, DataError, StudyError) as e:
            why_not[site] = str(e)
    networks = {site: _table(study, plans) for site, plans in own.items()}
    of_all = _table(study, joint_plans)
    shared = _shared(study, joint_plans, own, networks)
    views, held = {}, places(study) if is_vertical(study) else {}
    for site in (s for s in study.sites if s in told.fingerprints):
        fingerprint = told.fingerprints[site]
        shape, spacing = medians(fingerprint, joint.axes)
        outline = _outline(study, own[site], fingerprint) if site in own else None
        views[site] = view_of(
            joint, n_cases=fingerprint.n_cases, shape=shape, spacing=spacing,
            ranges=ranges(fingerprint, held.get(site)), own=outline, why_not=why_not.get(site, ""),
            differs=networks.get(site, of_all) != of_all, shared=shared.get(site),
        )  # fmt: skip
    n_cases = len(told.patients) if is_vertical(study) else sum(v.n_cases for v in views.values())
    advice = OF_PARTIES if is_vertical(study) else advise(joint, views)
    return Planned(
        study.study.name, study.plan.configuration, n_cases, told.channels, joint, views, advice,
        tuple(ledger.warnings), tuple(ledger.problems), tuple(record.excluded(study.sites)),
    )  # fmt: skip


def _with_costs(
    planned: Planned, study: Study, variants: Mapping[str, Study], joint: Plans, known: tuple[Told, Record],
    watch: Callable[[Event], None],
) -> Planned:  # fmt: skip
    """The same with what training would cost by the joint plan, at each site with the cases that it has; variants by theirs."""
    base = settings(study)[0][0]
    share = 1 - 1 / study.validation.folds
    cases = {site: max(1, round(share * planned.sites[site].n_cases)) for site in planned.sites}
    notes: list[str] = []
    found: list[Cost] = []

    def add(what: str, made: Callable[[], Iterable[Cost]]) -> None:
        try:
            found.extend(made())
        except Exception as e:  # a network from outside need not run on shapes alone: it can be planned all the same
            notes.append(f"What {what} would cost could not be forecast ({type(e).__name__}: {e}).")

    if why := untold(study):
        notes.append(f"The forecast is of plain steps, and training costs more: {why}. What it costs, a run tells.")
    add("training", lambda: every_way(base, joint, cases, lambda text: watch(Event("stage", text))))
    for name, variant in variants.items():
        if why := _why_untold(variant):
            notes.append(f"Variant {name} is not in the forecast: {why}. Plan it as a study of its own.")
            continue
        watch(Event("stage", f"Forecasting variant {name}"))
        variant = replace(variant, start=StartTable(), sites=study.sites, forecast=study.forecast)
        setting = replace(settings(variant)[0][0], name=name, is_base=False)
        add(f"variant {name}", partial(_cost_of, setting, known, cases))
    return replace(planned, warnings=(*planned.warnings, *notes), hardware=hardware_of(study), costs=tuple(found))


def _cost_of(setting: Setting, known: tuple[Told, Record], cases: Mapping[str, int]) -> tuple[Cost]:
    return (replace(own_cost(setting, plan_for(setting, *known, Ledger()), cases), name=setting.name),)


def _why_untold(variant: Study) -> str:
    """Why a variant's cost cannot be told; nothing where it can."""
    if variant.plan.fingerprint == "site":
        return "its sites have plans of their own"
    if variant.protocol.name not in FORECAST:
        return f"of protocol {variant.protocol.name} no costs can be told"
    return untold(variant)


def _alone(base: Setting, site: str) -> Setting:
    """The setting of one site: its plan goes beside the joint one, under its name."""
    study = replace(base.study, sites={site: base.study.sites[site]})
    return replace(base, name=site, study=study, is_base=False)


def _outline(study: Study, plans: Plans, fingerprint: Fingerprint) -> Outline:
    plan = open_plan(plans.text, study.plan.configuration)
    arguments = plan.architecture["architecture"]["arch_kwargs"]
    n = len(plan.spacing)
    return Outline(
        axes=tuple(AXES[i] for i in plan.transpose_forward[-n:]),
        patch_size=plan.patch_size,
        batch_size=plan.batch_size,
        spacing=plan.spacing,
        size=tuple(float(v) for v in plan.architecture["median_image_size_in_voxels"]),
        kernels=tuple(tuple(int(k) for k in kernel) for kernel in arguments["kernel_sizes"]),
        strides=plan.strides,
        clips=tuple(name == "CTNormalization" for name in plan.architecture["normalization_schemes"]),
        ranges=ranges(fingerprint),
        resizes=study.preprocessing.name == "resize",
    )


def _table(study: Study, plans: Plans) -> tuple[Table, int]:
    """The tensors that a run by this plan could share, and how many values its network has in all."""
    with drawn_from("look"):  # the weights are thrown away, and nothing else is to draw from here
        network = network_of(study, plans)()
    kept = kept_of(network, study.sharing.keep) if study.sharing.keep else frozenset()
    return table_of(described(network, kept)), sum(t.numel() for t in network.state_dict().values())


def _shared(
    study: Study, joint: Plans, own: Mapping[str, Plans], networks: Mapping[str, tuple[Table, int]]
) -> dict[str, float]:
    """Site -> the share of its values that a run by own plans would average, by the study's `[sharing] match`."""
    if len(own) < 2:
        return {}
    by_site = replace(joint, by_site={site: plans.text for site, plans in own.items()})
    try:
        sharing = share_own_plans(study, by_site, {site: table for site, (table, _) in networks.items()})
    except StudyError:  # nothing in common
        return dict.fromkeys(own, 0.0)
    sizes = {site: n for site, (_, n) in networks.items()}
    return {site: share for site, (share, _) in shared_now(sharing.blocks, own, sizes).items()}
