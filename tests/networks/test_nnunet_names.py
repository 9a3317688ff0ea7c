"""Weights of nnU-Net as what a study starts from: each tensor at its place, also from a network of another depth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from concilium.matching import match
from concilium.messages import PlugIn
from concilium.networks import names_elsewhere

FILE = Path("there.pth")


def names(plan: dict[str, Any]) -> dict[str, str]:
    return dict(names_elsewhere(PlugIn("nnunet"), plan=plan, n_channels=2, n_labels=3))


def test_all_names_of_nnunet_are_known(nnunet: SimpleNamespace, plan: dict[str, Any]) -> None:
    library = nnunet.library(plan)
    nnunet.scramble(library)
    found = match(nnunet.made(plan).state_dict(), library.state_dict(), names(plan), FILE)
    assert (found.fraction, found.missing, found.other_shape, found.unused) == (1.0, [], {}, [])
    assert nnunet.same(found.weights, nnunet.imported(library.state_dict(), plan))


def test_from_another_depth_equal_resolutions_match(nnunet: SimpleNamespace) -> None:
    """nnU-Net counts its decoder from the coarsest resolution; by the plan of the weights, `up0` is the finest all the same."""
    deep, shallow = (nnunet.configuration(dims=2, levels=n) for n in (4, 3))
    library = nnunet.library(deep)
    nnunet.scramble(library)
    here, theirs = nnunet.made(shallow).state_dict(), nnunet.imported(library.state_dict(), deep)
    found = match(here, library.state_dict(), names(deep), FILE)
    assert (found.fraction, found.missing, found.other_shape) == (1.0, [], {})
    assert all(torch.equal(t, theirs[name]) for name, t in found.weights.items())
    assert {name.partition(".")[0] for name in found.unused} == {"down3", "up2", "head2"}
    assert match(here, library.state_dict(), names(shallow), FILE).fraction < 0.9
