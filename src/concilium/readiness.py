"""Before training: what the sites tell of their data, and the plan of every setting.

Where sites hold channels of the same patients, every case is prepared before anything trains, so that one that a party cannot
prepare is left out by all, and the plans are of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from concilium.engines import Engine, ask
from concilium.errors import EngineError
from concilium.messages import Failure, Reply, SiteError
from concilium.planning import Plans
from concilium.preparation import Ledger, ask_sites, plan_for
from concilium.record import Record
from concilium.schedule import Setting, settings
from concilium.study import Study, is_vertical, sites_of
from concilium.together import held_requests

Planned = Sequence[tuple[Sequence[Setting], Plans]]
"""Settings that differ by fold only, with their plan."""


def planned(study: Study, engine: Engine, record: Record, ledger: Ledger) -> Planned:
    """All settings of a study with their plans: a variant that cannot be planned must not cost a night first.

    Raises:
        DataError: the data of a site cannot be used, sites disagree, or the run began with other data.
        EngineError: too few sites answered, or a party cannot prepare what it does not leave out.
        StudyError: a network or protocol cannot be had with the plan.
    """
    before: int | None = None
    while True:
        tried = Ledger(list(ledger.warnings), list(ledger.problems), list(ledger.excluded))
        told = ask_sites(study, engine, record, ledger)
        made = [(members, plan_for(members[0], told, record, ledger)) for members in settings(study)]
        if not is_vertical(study) or record.begun or all_can_prepare(engine, made):
            return made
        if before is not None and len(told.patients) >= before:
            raise EngineError(
                f"A party cannot prepare some of {len(told.patients)} cases, and when asked again it leaves none of them out. "
                "Expected fewer each time. Look into the logs of the sites, mend the files, and start again."
            )
        before = len(told.patients)
        ledger.warnings, ledger.problems, ledger.excluded = tried.warnings, tried.problems, tried.excluded


def all_can_prepare(engine: Engine, made: Planned) -> bool:
    """Whether every party can prepare every case that all have, by every plan. One that cannot shows so when asked again.

    What else is wrong there shows when the setting is prepared to be trained.
    """
    seen: set[tuple[str, str]] = set()
    for (setting, *_), plans in made:
        sites = [name for name in sites_of(setting.study) if (plans.text, name) not in seen]
        seen |= {(plans.text, name) for name in sites}
        requests = held_requests(setting, plans, dict.fromkeys(sites, plans.request(setting.study)))
        replies: list[tuple[str, Reply | Failure]] = list(ask(engine, requests))
        if any(isinstance(reply, SiteError) and reply.code == "case_failed" for _, reply in replies):
            return False
    return True
