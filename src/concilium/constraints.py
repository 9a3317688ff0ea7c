"""What a study may not say: values out of range, and values that are each allowed but not together.

Every check adds sentences to a list, so that all errors of a file are told at once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from concilium.catalog import allowed, names
from concilium.data.division_rules import DIVISION_RANGES
from concilium.errors import StudyError
from concilium.local_updates import (
    exchanges,
    has_personal,
    is_more_than_a_step,
    needs_others,
    optimizers_of,
)
from concilium.local_updates._besides import protocols_of
from concilium.protocols._cohort import cohort_problems, left_out
from concilium.protocols._filters import filter_problems
from concilium.protocols._rules import rule_problems
from concilium.protocols._splits import split_problems
from concilium.protocols._turns import turn_problems

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")

RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "[study] seeds": (lambda x: x >= 1, "1 or more"),
    "[study] max_excluded": (lambda x: 0 <= x <= 1, "0 to 1"),
    "[protocol] rounds": (lambda x: x >= 1, "1 or more"),
    "[protocol] steps": (lambda x: x >= 1, "1 or more"),
    "[protocol] epochs": (lambda x: x > 0, "more than 0"),
    "[protocol] min_sites": (lambda x: x >= 1, "1 to the number of sites"),
    "[protocol] round_seconds": (lambda x: x > 0, "more than 0"),
    "[protocol] exchange_seconds": (lambda x: x is None or x > 0, "more than 0"),
    "[protocol] participation": (lambda x: 0 < x <= 1, "more than 0 to 1"),
    "[plan] memory_gb": (lambda x: x > 0, "more than 0"),
    "[network] min_matched": (lambda x: 0 <= x <= 1, "0 to 1"),
    "[training] learning_rate": (lambda x: x > 0, "more than 0"),
    "[training] weight_decay": (lambda x: x >= 0, "0 or more"),
    "[training] momentum": (lambda x: 0 <= x < 1, "0 to below 1"),
    "[training] batch_size": (lambda x: x >= 1, "1 or more"),
    "[training] patch_size": (lambda x: len(x) in (2, 3) and min(x) >= 1, "2 or 3 whole numbers of 1 or more"),
    "[training] foreground": (lambda x: 0 <= x <= 1, "0 to 1"),
    "[training] clip_norm": (lambda x: x > 0, "more than 0"),
    "[training] loader_workers": (lambda x: x >= 0, "0 or more"),
    "[training] views": (lambda x: x >= 0, "0 or more"),
    "[personalize] steps": (lambda x: x >= 1, "1 or more"),
    "[personalize] learning_rate": (lambda x: x > 0, "more than 0"),
    "[validation] folds": (lambda x: x >= 2, "2 or more"),
    "[validation] fold": (lambda x: x == "all" or x >= 0, "0 to folds - 1, or 'all'"),
    "[validation] every": (lambda x: x >= 1, "1 or more"),
    "[validation] tolerance": (lambda x: x > 0, "more than 0"),
    "[engine] workers": (lambda x: x >= 1, "1 or more"),
    "[engine] threads": (lambda x: x >= 0, "0 (share the cores) or more"),
    "[forecast] mbit": (lambda x: x > 0, "more than 0"),
    "[forecast] ms": (lambda x: x >= 0, "0 or more"),
    "[forecast] site_gflops": (lambda x: x > 0, "more than 0"),
    "[forecast] server_gflops": (lambda x: x > 0, "more than 0"),
}
"""Table and key -> test of a value of the right type, and what is allowed; no number may be without end."""

OPTION_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "[aggregation] learning_rate": (lambda x: x > 0, "more than 0"),
    "[aggregation] momentum": (lambda x: 0 <= x < 1, "0 to below 1"),
    "[aggregation] beta1": (lambda x: 0 <= x < 1, "0 to below 1"),
    "[aggregation] beta2": (lambda x: 0 <= x <= 1, "0 to 1"),
    "[aggregation] tau": (lambda x: x > 0, "more than 0"),
    "[aggregation] share": (lambda x: 0 <= x < 0.5, "0 to below 0.5"),
    "[aggregation] faulty": (lambda x: x is None or x >= 0, "0 or more"),
    "[aggregation] keep": (lambda x: x >= 1, "1 or more"),
    "[aggregation] lag": (lambda x: x > 0, "more than 0"),
    "[aggregation] turn": (lambda x: x > 0, "more than 0"),
    "[aggregation] sharpness": (lambda x: x >= 0, "0 or more"),
    "[aggregation] cutoff": (lambda x: 0 <= x < 1, "0 to below 1"),
    "[aggregation] memory": (lambda x: 0 <= x < 1, "0 to below 1"),
    "[collect] cases": (lambda x: x >= 1, "1 or more"),
    "[collect] threshold": (lambda x: x is None or x >= 2, "2 or more"),
    "[collect] range": (lambda x: x > 0, "more than 0"),
    "[local_update] mu": (lambda x: x >= 0, "0 or more"),
    "[local_update] weight": (lambda x: x >= 0, "0 or more"),
    "[local_update] first_weight": (lambda x: x >= 0, "0 or more"),
    "[local_update] temperature": (lambda x: x > 0, "more than 0"),
    "[local_update] clip": (lambda x: x > 0, "more than 0"),
    "[local_update] noise": (lambda x: x > 0, "more than 0"),
    "[local_update] rate": (lambda x: 0 < x <= 1, "more than 0 to 1"),
    "[local_update] patches": (lambda x: x >= 1, "1 or more"),
    "[local_update] delta": (lambda x: 0 < x < 1, "more than 0 to below 1"),
}
"""The same for options of plug-ins that are Concilium's."""

LIST_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "[[defences]] scale": (lambda x: x >= 0, "0 or more"),
    "[[defences]] bound": (lambda x: x > 0, "more than 0"),
    "[[defences]] share": (lambda x: 0 <= x < 1, "0 to below 1"),
    "[[defences]] channels": (lambda x: x >= 1, "1 or more"),
    "[[defences]] bits": (lambda x: x >= 1, "1 or more"),
    "[[defences]] weight": (lambda x: x >= 0, "0 or more"),
    "[[filters]] norm": (lambda x: x > 0, "more than 0"),
    "[[filters]] deviation": (lambda x: x >= 0, "0 or more"),
}
"""The same for those in lists."""


def check_range(where: str, key: str, value: Any) -> None:
    """Raise ValueError, which says what is allowed, where a value is of the right type and still none of those."""
    full = f"{where} {key}"
    known = {
        "[protocol] name": names("protocols"),
        "[engine] name": names("engines"),
        "[plan] configuration": CONFIGURATIONS,
    }.get(full)
    if known is not None and value not in known:
        cascade = (
            "The cascade's second network trains on the predictions of the first, which no federation here makes. "
        )
        raise ValueError((cascade if value == "3d_cascade_fullres" else "") + allowed(value, known))
    anywhere = re.sub(r"^\[(sites\.[^.\]]*|test)(?=[.\]])", "[sites.NAME", full)
    known_ranges = (RANGES.get(full), DIVISION_RANGES.get(anywhere), OPTION_RANGES.get(full), LIST_RANGES.get(full))
    fine, text = next((r for r in known_ranges if r), (lambda _: True, ""))
    if not fine(value) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"Allowed: {text}.")


def check_ranges(where: str, values: Mapping[str, Any], problems: list[str]) -> None:
    """Add to `problems` what is wrong with values of the right type."""
    for key, value in values.items():
        try:
            check_range(where, key, value)
        except ValueError as e:
            problems.append(f"{where} {key} = {value!r} is not allowed. {e}")


def contradictions(found: Mapping[str, Any], *, n_sites: int) -> list[str]:
    """What is wrong between values that are each allowed, in the tables that have no error of their own."""
    p, v, t, e = (found[table] for table in ("protocol", "validation", "training", "engine"))
    problems = []
    s = found["study"]
    if s and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", s.name):
        problems.append(
            f"[study] name = {s.name!r} is not allowed. Allowed: letters, digits, - . and _ (it names a folder)."
        )
    if p and (p.steps is None) == (p.epochs is None):
        problems.append(
            f"[protocol] steps = {p.steps}, epochs = {p.epochs} is not allowed. Allowed: exactly one of the two."
        )
    if p and p.min_sites is not None and p.min_sites > n_sites:
        problems.append(
            f"[protocol] min_sites = {p.min_sites} is not allowed. Allowed: 1 to {n_sites}, the number of sites."
        )
    if p and p.name == "centralized":
        problems.append(
            "[protocol] name = 'centralized' is not allowed: it pools all cases. Allowed: another protocol with "
            "compare = ['centralized'], in a simulation."
        )
    problems += _cannot_take_part(found)
    problems += _cannot_validate(v, p, n_sites)
    if v and v.fold != "all" and v.fold >= v.folds:
        problems.append(f"[validation] fold = {v.fold} is not allowed. Allowed: 0 to {v.folds - 1}.")
    if t and e and t.precision == "float16" and e.device == "cpu":
        problems.append(
            "[training] precision = 'float16' is not allowed on a CPU. Allowed there: 'float32', 'bfloat16'."
        )
    problems += _misresized(found) + split_problems(found) + _cannot_update(found)
    return problems + rule_problems(found, n_sites) + filter_problems(found)


def _misresized(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with images at one size."""
    r, plan, t = found["preprocessing"], found["plan"], found["training"]
    if not r or not plan:
        return []
    if r.name != "resize":
        text = (
            "[preprocessing] {} = {} is not used by name = 'nnunet'. Used there: none. Remove it, or choose 'resize'."
        )
        used = {"size": r.size, "intensity": None if r.intensity == "zscore" else r.intensity}
        return [text.format(key, value) for key, value in used.items() if value is not None]
    problems = []
    n_axes = {"2d": 2, "3d_fullres": 3}.get(plan.configuration)
    if n_axes is None:
        problems.append(
            f"[plan] configuration = {plan.configuration!r} is not allowed with resize. Allowed: '2d', '3d_fullres'."
        )
    elif r.size is None or len(r.size) != n_axes or min(r.size) < 8:
        problems.append(
            f"[preprocessing] size = {r.size and list(r.size)} is not allowed. Allowed with configuration "
            f"{plan.configuration!r}: {n_axes} whole numbers of 8 or more."
        )
    span = r.intensity
    if isinstance(span, tuple) and not (len(span) == 2 and math.isfinite(span[1] - span[0]) and span[0] < span[1]):
        problems.append(
            f"[preprocessing] intensity = {list(span)} is not allowed. Allowed: 'zscore', '0-1' or [low, high]."
        )
    if t and t.patch_size is not None:
        problems.append(
            f"[training] patch_size = {list(t.patch_size)} is not allowed with resize. Allowed: none, the size is the patch."
        )
    return problems


def _cannot_validate(v: Any, p: Any, n_sites: int) -> list[str]:
    """What validation cannot do."""
    problems = []
    if v and p and v.select == "best" and (v.every is None or v.every > p.rounds):
        problems.append(
            f"[validation] select = 'best' is not allowed with every = {v.every}. Allowed: with every = N, so that weights are "
            f"scored after every N of the {p.rounds} rounds. Add it."
        )
    if v and v.leave_one_site_out and (n_sites < 2 or (p and p.name == "local")):
        problems.append(
            f"[validation] leave_one_site_out = true is not allowed with {n_sites} site(s) and protocol "
            f"{p.name if p else '?'!r}. Allowed: with two or more sites that train one model. Remove it."
        )
    return problems


def _cannot_take_part(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with who takes part in a round, and in which order."""
    p, update, sites = found["protocol"], found["local_update"].name, tuple(found["sites"])
    problems = cohort_problems(sites, p.options, p.min_sites) if p else []
    try:
        personal = has_personal(update)
    except StudyError:  # there is no such update, which is told elsewhere
        personal = False
    if p and found["study"] and not problems:
        problems = left_out(found, personal=personal)
    if p and p.name == "cyclic":
        problems += turn_problems(sites, p.options, found, personal=personal)
    return problems


def _cannot_update(found: Mapping[str, Any]) -> list[str]:
    """What local updates cannot do under a protocol, or with another part of their own."""
    p, name, training = found["protocol"], found["local_update"].name, found.get("training")
    try:
        wanted = optimizers_of(name)
        more, exchange, personal, together = (
            is_more_than_a_step(name), exchanges(name), has_personal(name), needs_others(name)
        )  # fmt: skip
    except StudyError:  # no such update, which was said already
        return []
    problems = []
    protocols = protocols_of(name)
    if p and protocols and p.name not in protocols:
        problems.append(
            f"[local_update] name = {name!r} is not allowed with protocol {p.name!r}, of whose messages it does not account. "
            f"Allowed: {', '.join(map(repr, protocols))}."
        )
    if wanted and training and training.optimizer not in wanted:
        problems.append(
            f"[training] optimizer = {training.optimizer!r} is not allowed with [local_update] name = {name!r}. Allowed: "
            f"{', '.join(map(repr, wanted))}. Choose one of these, or another local update."
        )
    if more and (exchange or personal or together):
        problems.append(
            f"[local_update] name = {name!r} is not allowed: beside `bring` it has finish, PERSONAL or TOGETHER, of which "
            "a network that is brought knows nothing. Allowed: one or the other. Make two files of it."
        )
    if p and p.name == "local" and together:
        problems.append(
            f"[local_update] name = {name!r} is not allowed with protocol 'local', which shares no weights for it to refer to. "
            "Allowed: 'plain'. As a baseline, 'local' trains by 'plain' anyway: [protocol] compare = ['local']."
        )
    elif p and p.name not in ("federated", "splitfed") and exchange:
        problems.append(
            f"[local_update] name = {name!r} is not allowed with protocol {p.name!r}, which exchanges weights alone. Allowed: "
            "'federated'."
        )
    return problems


def confusions(sites: Mapping[str, Any], test: Any, folder: Path) -> list[str]:
    """Sites that would be taken for one another, or for the held-out set."""
    problems = [
        f"[sites.{name}] is also written [sites.{other}]. Some disks take both for one folder. Rename one."
        for name, other in itertools.combinations(sites, 2)
        if name.casefold() == other.casefold()
    ]
    for name, site in sites.items():
        if _lies(test, folder) is not None and _lies(site, folder) == _lies(test, folder):
            problems.append(
                f"[test] data = '{test.data}' is that of [sites.{name}] too. Nobody may train on a held-out set. Give another."
            )
    return problems


def _lies(table: Any, folder: Path) -> Path | None:
    """Where a table's data lie; `None` where it does not say."""
    return None if table is None or table.data is None else (folder / table.data).resolve()
