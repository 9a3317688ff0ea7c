"""Split training of a network of which some tensors are frozen is training of the whole network with the same ones frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from splitting import EQUAL, difference, first_weights, job_of, trained_apart, trained_whole

from concilium.answers import Job
from concilium.answers.train import Learner
from concilium.freezing import freezing, frozen_of

CASES = [
    ("nnunet", ["decoder"]),
    ("nnunet", ["down0.*", "heads"]),
    ("unet batch", ["decoder"]),
    ("unet batch", ["norms"]),
    ("swin_unet", ["norms", "biases"]),
    ("deeplabv3 batch", ["heads", "biases"]),
    ("pooling", ["*.weight"]),
]


def frozen_job(name: str, wanted: Sequence[str]) -> Job:
    """A job whose network has the same frozen tensors whenever it is built, and draws the others anew."""
    job = job_of(name)
    torch.manual_seed(3)
    values = frozen_of(freezing(job.network, wanted)())
    assert values
    return replace(job, network=freezing(job.network, wanted, values), frozen=values)


@pytest.mark.parametrize(("name", "wanted"), CASES, ids=[f"{name}: {' '.join(wanted)}" for name, wanted in CASES])
def test_split_equals_whole(name: str, wanted: list[str], tmp_path: Path) -> None:
    job = frozen_job(name, wanted)
    weights, engine = trained_apart(job, ("shallow",) if name != "nnunet" else ("deep",), tmp_path)
    assert difference(weights, trained_whole(job)) <= EQUAL
    assert difference(weights, first_weights(job)) > 1e-4, "nothing was trained"
    assert weights.keys().isdisjoint(job.frozen)
    _, learner = engine.members["a"]._models._resident or ("", None)
    assert isinstance(learner, Learner)
    at_site = frozen_of(learner.network)
    assert at_site
    assert all(torch.equal(t, job.frozen[n]) for n, t in at_site.items()), "running statistics among them"
    assert not any(n in job.frozen for _, m in (*engine.down, *engine.up) for n in getattr(m, "weights", ()))
