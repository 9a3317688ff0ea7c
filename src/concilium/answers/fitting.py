"""How much of a batch a site computes at a time, where it leaves that to the memory that it has (`micro_batch = "auto"`).

What a step takes is told from its shapes (`loads.py`), before anything is computed. Of the ways to take it the quickest that
fits is chosen: the whole batch; the whole batch, whose blocks are computed once more on the way back in place of being kept,
where the network has such (Chen et al. 2016, arXiv:1604.06174); half of the batch at a time, and so on; and both. By any of them
the step is the same but for rounding. A resumed run goes on by the way that it began with, so that it has the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from concilium.answers import AUTO, Settings
from concilium.answers.micro_batch import layers_that_mix
from concilium.data.draws import drawn_from
from concilium.data.kept import whole
from concilium.data.plan import Plan
from concilium.loads import whole_load
from concilium.local_updates import is_more_than_a_step
from concilium.messages import Prepare
from concilium.networks import Stages
from concilium.optimization import at_hand, device_named

ROOM = 0.8
"""The part of the memory at hand that tensors may take: libraries, kernels and other programs need some."""
NOTE = "memory.json"
AGAIN = "again"
"""Of a stage that may compute its inner values once more in place of keeping them: whether it does."""


@dataclass(frozen=True)
class Way:
    """A way to take a step."""

    at_once: int
    """Patches at a time."""
    again: bool
    """Whether blocks are computed once more on the way back."""
    needs: int
    """Bytes of tensors at the worst moment."""
    had: int
    """Bytes that were at hand when it was chosen; 0: nobody knows."""

    @property
    def fits(self) -> bool:
        return not self.had or self.needs <= ROOM * self.had


def fitted(
    settings: Settings, request: Prepare, plan: Plan, network: Callable[..., Stages], n_channels: int
) -> tuple[int | None, Callable[..., Stages]]:
    """How many patches the site computes at a time, and the network to do it with; as its settings say, or as its memory allows.

    Where not even one patch fits, one is tried. A party of several computes as it is asked.
    """
    if settings.micro_batch != AUTO:
        return settings.micro_batch, network
    if request.holding is not None:
        return None, network
    about = repr((request.plans, request.configuration, request.network, request.training))
    key, path = blake2b(about.encode(), digest_size=16).hexdigest(), settings.folder / NOTE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if key in known:
        way = Way(**known[key])
    else:
        had = at_hand(device_named(settings.device))
        way = _first_that_fits(request, plan, network, n_channels, had)
        with whole(path) as unfinished:
            Path(unfinished).write_text(json.dumps(known | {key: asdict(way)}, indent=1), encoding="utf-8")
    return way.at_once, (lambda **how: _again(network(**how))) if way.again else network


def _first_that_fits(request: Prepare, plan: Plan, network: Callable[..., Stages], n_channels: int, had: int) -> Way:
    image = (plan.batch_size, n_channels, *plan.patch_size)
    with drawn_from("memory"):  # the weights are thrown away
        looked = network()
    divisible = not is_more_than_a_step(request.training.local_update.name) and not layers_that_mix(looked)
    can_again = any(hasattr(stage, AGAIN) for stage in looked.modules())
    found = []
    for at_once, again in _ways(plan.batch_size, divisible, can_again):
        build = (lambda **how: _again(network(**how))) if again else network
        needs = whole_load(build, image, request.training, at_once=at_once).memory
        found.append(Way(at_once, again, needs, had))
        if found[-1].fits:
            return found[-1]
    return min(found, key=lambda way: way.needs)


def _ways(batch_size: int, divisible: bool, can_again: bool) -> Iterator[tuple[int, bool]]:
    """Patches at a time, and whether blocks are computed again: the quickest first, what takes least last."""
    yield from ((batch_size, again) for again in (False, True)[: 1 + can_again])
    for again in (False, True)[: 1 + can_again]:
        at_once = batch_size
        while divisible and at_once > 1:
            at_once = -(-at_once // 2)
            yield at_once, again


def _again(network: Stages) -> Stages:
    """The network, whose blocks are computed once more on the way back."""
    for stage in network.modules():
        if hasattr(stage, AGAIN):
            setattr(stage, AGAIN, True)
    return network
