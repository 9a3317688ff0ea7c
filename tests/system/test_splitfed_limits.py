"""What split training refuses, and what it takes: bytes on the way and files on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import lines
from torch import Tensor

from concilium import wire
from concilium.data.plan import open_plan
from concilium.engines.simulation import Simulation
from concilium.errors import EngineError, StudyError
from concilium.line import run
from concilium.messages import Maps, Tail
from concilium.networks import cut_apart, make_network
from concilium.protocols._body import Body
from concilium.study import Study, read_study

Make = Callable[..., Study]
SITES = ("north", "south", "west")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (
            ["down0", "up9"],
            r"\[protocol\] cut = \['down0', 'up9'\] is not possible. Allowed: shallow, deep, or two of these",
        ),
        (
            ["up0", "down0"],
            "in this order: down0, encode0, down1, encode1, down2, encode2, up1, decode1, up0. After decode0 only",
        ),
        (["down0", "decode0"], r"After decode0 only with reveal_labels = true: the server can compute the labels\."),
        (["down0"], "Choose from these, or another network"),
        (["down0", "head0"], "is not possible"),
        (["down0", "down0"], "is not possible"),
        ([], "is not possible"),
        (["down0", "down1", "up0"], "is not possible"),
    ],
)
def test_a_cut_that_the_network_does_not_have_is_refused(
    cut: list[str], said: str, split_study: Make, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=said):
        run(split_study(protocol__cut=cut), tmp_path / "run")


def test_a_network_of_one_stage_is_refused(split_study: Make, tmp_path: Path) -> None:
    study = split_study(network__name="faults:blob", network__width=4, network__base_features=None)
    with pytest.raises(StudyError, match=r"in this order: none, the network is one stage\. Choose .* another network"):
        run(study, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol__variant": "v4"}, r"variant = 'v4' is not allowed. Allowed: 'v1', 'v2', 'v3', 'sequential'"),
        ({"training__precision": "float16", "engine__device": "auto"}, "Allowed: 'float32', 'bfloat16'"),
        ({"local_update__name": "faults:never"}, "'faults:never' is not allowed with splitfed.* Allowed: 'plain'"),
        ({"protocol__exchange_seconds": -1.0}, "exchange_seconds = -1.0 is not allowed"),
    ],
)
def test_what_split_training_cannot_do_is_refused_with_what_it_can(
    changes: dict[str, Any], said: str, split_study: Make
) -> None:
    with pytest.raises(StudyError, match=said):
        split_study(**changes)


@pytest.mark.parametrize("copied", [False, True])
def test_a_cut_where_the_image_would_leave_is_refused_by_the_sites(
    copied: bool, split_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []
    pack = wire.pack
    monkeypatch.setattr(wire, "pack", lambda message: sent.append(message) or pack(message))
    study = split_study(
        network__name="faults:leaky",
        network__copied=copied,
        network__base_features=None,
        protocol__cut=["down0", "middle"],
    )
    with pytest.raises(EngineError, match=r"0 of 3 sites answered \(.*north: refused by its policy"):
        run(study, tmp_path / "run")
    assert sum(type(m).__name__ == "Front" for m in sent) == 1  # shared by the sites
    assert not any(isinstance(m, Maps | Tail) for m in sent)


# --------------------------------------------------------------------------------------------------- bytes and the disk


def expected_bytes(folder: Path, cut: str, steps: int) -> tuple[int, int]:
    """To a site and from it in a round, from the shapes of the maps between the stages of the network alone."""
    study = read_study(folder / "study.toml")
    plan = open_plan((folder / "plans.json").read_text(), study.plan.configuration)
    network = make_network(study.network, n_channels=1, n_labels=3, plan=plan.architecture, deep_supervision=True)
    front, body, tail = cut_apart(network, (cut,)).__dict__.values()
    stack: tuple[Tensor, ...] = (torch.zeros(plan.batch_size, 1, *plan.patch_size),)
    before = front.run(stack)
    after = body.run(before)
    taken = max(-min(heights(body)), 0)
    there = sum(4 * m.numel() for m in before[len(before) - taken :])
    back = sum(4 * m.numel() for m in after[len(before) - taken :])
    update = sum(4 * t.numel() for part in (front, tail) for t in part.state_dict().values())
    step = there + back  # maps one way, as many gradients the other
    return update + steps * step, update + steps * step


def heights(part: Any) -> list[int]:
    """Height of the stack after each stage has taken its maps, from that before the first."""
    height, found = 0, []
    for name in part.names:
        found.append(height - part[name].takes)
        height += part[name].leaves - part[name].takes
    return found


@pytest.mark.parametrize(
    ("variant", "cut"),
    [
        ("v1", "shallow"),
        ("v2", "deep"),
        *(pytest.param(*one, marks=pytest.mark.exhaustive) for one in (("v2", "shallow"), ("v1", "deep"))),
    ],
)
def test_bytes_are_those_of_maps_gradients_and_the_weights_at_the_site(
    variant: str, cut: str, split_study: Make, tmp_path: Path
) -> None:
    """With the deep cut the skip of full resolution stays at the site."""
    study = split_study(
        protocol__variant=variant,
        protocol__cut=cut,
        protocol__steps=3,
        protocol__rounds=1,
        network__base_features=8,
    )
    run(study, tmp_path / "run")
    (line,) = lines(tmp_path / "run")
    down, up = expected_bytes(tmp_path / "run", cut, steps=3)
    for site in line["sites"].values():
        assert down <= site["bytes_down"] < 1.02 * down
        assert up <= site["bytes_up"] < 1.02 * up


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["v1", "v2", *(pytest.param(v, marks=pytest.mark.exhaustive) for v in ("v3", "sequential"))]
)
def test_the_disk_does_not_fill_with_messages_in_a_long_round(
    variant: str, split_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    backward = Body.backward

    def counting(self: Body, *args: Any, **options: Any) -> Any:
        counts.append(sum(1 for path in (tmp_path / "run" / "spool").glob("*/*")))
        return backward(self, *args, **options)

    monkeypatch.setattr(Body, "backward", counting)
    study = split_study(
        protocol__variant=variant,
        protocol__cut="shallow",
        protocol__steps=10,
        protocol__rounds=1,
        network__levels=2,
        network__base_features=2,
    )
    run(study, tmp_path / "run")
    assert len(counts) == 30
    assert max(counts[15:]) <= max(counts[:6])
    assert not (tmp_path / "run" / "spool").exists()


def test_the_count_of_files_sees_a_spool_that_is_not_cleared(
    split_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Simulation, "_clear", lambda self, request: None)
    with pytest.raises(AssertionError):
        test_the_disk_does_not_fill_with_messages_in_a_long_round("v1", split_study, tmp_path, monkeypatch)
