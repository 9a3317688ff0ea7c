"""What a local update may have besides its step where it draws patients, and accounts for what it tells of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from concilium.data.patches import Batches
from concilium.local_updates import part_of
from concilium.messages import PlugIn


def protocols_of(name: str) -> tuple[str, ...]:
    """The protocols that a local update needs one of; none: any will do."""
    return part_of(name, "PROTOCOLS") or ()


def check_network(local_update: PlugIn, network: nn.Module) -> None:
    """Let the local update say whether it can train this network.

    Raises:
        StudyError: it cannot.
    """
    check = part_of(local_update.name, "check_network")
    if check is not None:
        check(network, **local_update.options)


def draws_patients(name: str) -> bool:
    """Whether a local update draws patients, not patches."""
    return part_of(name, "sample") is not None


def sampled(local_update: PlugIn, batches: Batches, patients: Sequence[Sequence[str]]) -> Batches:
    """What draws the batches of a local update: patients, by their cases, where it says how, else as they are."""
    sample = part_of(local_update.name, "sample")
    return batches if sample is None else cast(Batches, sample(batches, patients, **local_update.options))


def account_of(local_update: PlugIn) -> tuple[Callable[..., Any], Callable[..., float]] | None:
    """How a local update accounts for what leaves: what a round adds, and the epsilon of a history. `None`: it does not."""
    release, account = (part_of(local_update.name, part) for part in ("release", "account"))
    if release is None or account is None:
        return None
    return partial(release, **local_update.options), partial(account, **local_update.options)
