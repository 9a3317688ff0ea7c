"""New patients of a party (`imagesTs`): which of them all parties have, whom a finished vertical model then segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from concilium.answers import Entry, Settings
from concilium.answers._noted import note, noted
from concilium.answers.statistics import Exclusions
from concilium.data.dataset import restricted
from concilium.data.new_patients import open_new
from concilium.errors import ContractError
from concilium.messages import Holding

NEW = "new"
"""The subset that they are."""
FILE = "aligned_new.json"


def find_new(settings: Settings, channels: Sequence[str]) -> tuple[tuple[Entry, ...], Exclusions]:
    """The site's new cases with these of its channels, numbered; and those of which a file is missing.

    Raises:
        DataError: the data set cannot be used, or lacks a channel.
    """
    ((member, folder),) = settings.data.items()
    dataset = restricted(open_new(folder, settings.names.get(member)), channels)
    excluded = {
        f"{member}/{case}": (reason, f"{folder} lacks a file of case {case}.") for case, reason in dataset.missing
    }
    return tuple(Entry(member, dataset, case, i, i) for i, case in enumerate(dataset.cases)), excluded


def note_new(settings: Settings, holding: Holding, names: Sequence[str], left_out: Mapping[str, str]) -> None:
    """Write down which new cases are segmented together, in that order, and why others are not: for the site's own eyes."""
    told = {"channels": list(holding.channels), "cases": list(names), "left_out": dict(left_out)}
    note(settings.folder, FILE, told)


def note_without(settings: Settings, model: str, case: str, absent: Sequence[str]) -> None:
    """Write down which parties had no such case, without whom this model segmented it: for who reads the label map."""
    told = noted(settings.folder, FILE)
    without = told.get("without", {})
    note(settings.folder, FILE, told | {"without": without | {model: without.get(model, {}) | {case: list(absent)}}})


def new_entries(settings: Settings) -> tuple[Entry, ...]:
    """The new cases that are segmented together, in the order in which they are asked for.

    Raises:
        ContractError: they were never aligned, or one is gone.
    """
    told = noted(settings.folder, FILE)
    found = {e.case.name: e for e in find_new(settings, told["channels"])[0]} if told else {}
    if not told or any(name not in found for name in told["cases"]):
        raise ContractError(
            f"{settings.name} was asked for new cases that were not aligned, or are gone. Expected Align first, and the files "
            "where they were. Start again with --resume."
        )
    return tuple(found[name] for name in told["cases"])
