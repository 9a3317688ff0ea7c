"""Before training: what the sites tell of their data, and the plan of every setting.

Where sites hold channels of the same patients, every case is prepared before anything trains, so that one that a party cannot
prepare is left out by all, and the plans are of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from concilium.engines import Engine, ask
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
        EngineError: too few sites answered.
        StudyError: a network or protocol cannot be had with the plan.
    """
    while True:
        tried = Ledger(list(ledger.warnings), list(ledger.problems), list(ledger.excluded))
        told = ask_sites(study, engine, record, ledger)
        made = [(members, plan_for(members[0], told, record, ledger)) for members in settings(study)]
        if not is_vertical(study) or record.begun or all_can_prepare(engine, made):
            return made
        ledger.warnings, ledger.problems, ledger.excluded = tried.warnings, tried.problems, tried.excluded


def all_can_prepare(engine: Engine, made: Planned) -> bool:
    """Whether every party can prepare every case that all have, by every plan. One that cannot shows so when asked again.

    What else is wrong there shows when the setting is prepared to be trained.
    """
    replies: dict[str, Reply | Failure] = {}
    for (setting, *_), plans in {plans.text: (members, plans) for members, plans in reversed(made)}.values():
        asked = dict.fromkeys(sites_of(setting.study), plans.request(setting.study))
        replies |= dict(ask(engine, held_requests(setting, plans, asked)))
        if any(isinstance(reply, SiteError) and reply.code == "case_failed" for reply in replies.values()):
            return False
    return True
