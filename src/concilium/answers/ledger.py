"""A site's own account of what its updates have told of its patients, where it trains with differential privacy.

A line for each update that leaves: model, round, a digest of the weights and settings that it started from, and what it adds. The
file only grows, whatever a server restores or forgets; an update that is computed again from the same weights, under the same
settings, is the same one to the bit, noise included, and counts once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from concilium.answers import Job
from concilium.data.draws import Secret, digest
from concilium.data.patches import Batches
from concilium.errors import DataError
from concilium.freezing import digest_of
from concilium.local_updates import when_alone
from concilium.local_updates._besides import account_of, check_network, draws_patients, sampled
from concilium.messages import PlugIn, Spent, Train, Trained

NAME = "privacy.jsonl"
"""In the site's folder."""


@dataclass(frozen=True)
class Draws:
    """Where the batches of a round come from."""

    batches: Batches
    hidden: tuple[str, ...] = ()
    """More of the key that batches and noise are drawn from: what the server must not know, and that of other weights differs."""
    n_patients: int = 0

    @property
    def start(self) -> str:
        """A digest of the weights that the round started from and all else that draws depend on, where patients are drawn."""
        return f"{digest(*self.hidden):016x}" if self.hidden else ""


def draws_of(job: Job, request: Train, update: PlugIn, network: nn.Module, batches: Batches) -> Draws:
    """Where the batches of this local update come from in this round, which starts from this network.

    No two models, settings, schedules or starting points share what is drawn: the difference of two updates under the same noise
    would have none, and no epsilon.

    Raises:
        StudyError: the update cannot train it.
    """
    check_network(update, network)
    if not draws_patients(update.name):
        return Draws(batches)
    of: dict[tuple[str, int], list[str]] = {}
    for entry in job.entries["training"]:
        of.setdefault((entry.member, entry.patient), []).append(entry.key)
    patients = [sorted(cases) for _, cases in sorted(of.items())]
    when = f"{request.first_step} of {request.total_steps}"
    hidden = (Secret(job.secret), request.model, job.told, when, digest_of(network.state_dict()))
    return Draws(sampled(update, batches, patients), hidden, len(patients))


def note(folder: Path, request: Train, trained: Trained, update: PlugIn, draws: Draws) -> Trained:
    """The reply with the account after it, which is written down before the reply leaves; any other reply as it is."""
    update = when_alone(update) if request.alone else update
    kept = account_of(update)
    if kept is None or not trained.n_steps:
        return trained
    release, account = kept
    line = {
        "model": request.model,
        "round": request.round,
        "start": draws.start,
        "release": list(release(steps=trained.n_steps)),
    }
    path = folder / NAME
    lines = [json.loads(one) for one in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    new = [] if line in lines else [line]
    own = [tuple(one["release"]) for one in lines + new if one["model"] == request.model]
    noise, rate, _ = own[-1]
    spent = Spent(
        account(own),
        float(update.options["delta"]),  # type: ignore[arg-type]
        account([tuple(one["release"]) for one in lines + new]),
        noise,
        rate,
        sum(steps for _, _, steps in own),
    )
    if not math.isfinite(max(spent.epsilon, spent.epsilon_of_run)):
        raise DataError(
            f"The account of {request.model} has no finite epsilon any more after {spent.steps} steps with noise {noise}: "
            "nothing would be promised, and nothing leaves. Allowed: a finite one. Ask for more noise, or fewer rounds.",
            code="no_epsilon",
        )
    if new:
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(one) + "\n" for one in lines + new), encoding="utf-8")
        unfinished.replace(path)
    return replace(trained, spent=spent)
