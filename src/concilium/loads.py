"""What a step of training asks of the machines that take it, operations and memory, from shapes alone.

The step is taken on tensors that have shapes and no values (`torch._subclasses.fake_tensor`): forward, a stand-in for the loss,
and back. Memory is that of all tensors that are alive at the same time, at the worst moment of the step; what libraries and
kernels need besides is not in it. The stand-in is a soft Dice, which keeps about what `dice_ce` keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from concilium.errors import ContractError
from concilium.freezing import front_of, frozen_of
from concilium.messages import Training
from concilium.networks import Parts, Stack, Stages, cut_apart
from concilium.networks._fusion import FRONTS, Own, fronts_of, own_part
from concilium.optimization import autocast

MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}
"""Tensors that an optimiser keeps for each parameter; `sgd` without momentum none."""
CPU = torch.device("cpu")
Watch: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes the context in which one owner computes."""


@dataclass(frozen=True)
class Load:
    """What a step asks of one machine."""

    flops: int
    """Of convolutions and matrix products, forward and back, a multiplication and an addition being two."""
    memory: int
    """Most bytes of tensors at a time: weights, gradients, the optimiser's state, and maps kept for the way back."""


def whole_load(build: Callable[..., Stages], batch: Sequence[int], training: Training, *, at_once: int = 0) -> Load:
    """Of a site that trains the whole network on images of shape `batch` (B, C, *patch).

    Args:
        at_once: cases of the batch that it computes at a time; 0: all.
    """
    n = min(at_once or batch[0], batch[0])
    site = _Held()
    with FakeTensorMode(), CPU:
        network = build(deep_supervision=training.deep_supervision)
        with site.watched():
            site.note((*network.state_dict().values(), *frozen_of(network).values()))
            kept = [*_moments(network, training), *(torch.empty_like(t) for t in network.state_dict().values())]
        image = torch.empty(n, *batch[1:])
        kept_maps = front_of(network) if training.views else None
        if kept_maps is None:
            whole_step(network, image, training, at_site=site.watched)
        else:  # what the front makes of each view is computed once, and read from then on
            front, rest = kept_maps
            with torch.no_grad(), autocast(CPU, training.precision):
                with site.watched():  # a view at a time, whose maps are all let go of but the last
                    front.run((image[:1],))
                site.flops = 0
                maps = front.run((image,))
            with site.watched():
                site.note(maps)
                with autocast(CPU, training.precision):
                    torch.autograd.backward(_loss(rest.run(maps)[::-1]))
        del kept  # the optimiser's state, and the weights as they came
    return Load(round(site.flops * batch[0] / n), site.most)


def split_loads(
    build: Callable[..., Stages], cut: tuple[str, ...], batch: Sequence[int], training: Training, *, reveal_labels: bool
) -> tuple[Load, Load]:
    """Of a site, and of the server for the body of one site, where the network is cut so.

    Raises:
        StudyError: the network cannot be cut so.
    """
    site, server = _Held(), _Held()
    with FakeTensorMode(), CPU:
        whole = build(deep_supervision=training.deep_supervision and reveal_labels)
        parts = cut_apart(whole, cut, reveal_labels=reveal_labels)
        kept = []
        for held, part in ((site, parts.at_site), (server, parts.body)):
            with held.watched():
                held.note((*part.state_dict().values(), *frozen_of(part).values()))
                kept += _moments(part, training)
        split_step(parts, torch.empty(*batch), training, at_site=site.watched, at_server=server.watched)
        del kept
    return Load(site.flops, site.most), Load(server.flops, server.most)


def party_loads(
    build: Callable[..., Stages], batch: Sequence[int], training: Training, *, after: str, labels: str
) -> tuple[dict[str, Load], Load, int]:
    """Of each party of a network of several, of the server, and the operations of the label holder's tail alone.

    Args:
        after: the stage after which the tail begins; of the fronts, where the server has no part.
        labels: who has the tail.
    """
    server, tail = _Held(), _Held()
    with FakeTensorMode(), CPU:
        whole = build(deep_supervision=training.deep_supervision and after == FRONTS)
        cut = parties_of(whole, after=after, labels=labels)
        held = {name: _Held() for name in cut.own}
        kept = []
        for one, part in (*((held[n], own.held) for n, own in cut.own.items()), (server, cut.body)):
            with one.watched():
                one.note((*part.state_dict().values(), *frozen_of(part).values()))
                kept += _moments(part, training)
        at = {name: one.watched for name, one in held.items()}
        party_step(cut, torch.empty(*batch), training, at=at, at_tail=tail.watched, at_server=server.watched)
        del kept
    loads = {name: Load(one.flops, one.most) for name, one in held.items()}
    return loads, Load(server.flops, server.most), tail.flops


@dataclass(frozen=True)
class Parties:
    """A network of several parties, by who has what."""

    own: Mapping[str, Own]
    channels: Mapping[str, Sequence[int]]
    body: Stages
    labels: str
    each: int
    """Maps of a party."""


def parties_of(whole: Stages, *, after: str, labels: str) -> Parties:
    """Cut it.

    Raises:
        ContractError: it is none of several parties.
    """
    fronts = fronts_of(whole)
    if fronts is None:
        raise ContractError(
            f"A network of stages {', '.join(whole.names[:3])}, ... has no fronts. Expected some. Report this."
        )
    names = dict.fromkeys([*fronts.parties, labels])
    own = {name: own_part(whole, name, tail_after=after, labelled=name == labels) for name in names}
    body = whole.split(FRONTS, after)[1] if after != FRONTS else Stages({})
    return Parties(own, fronts.channels, body, labels, fronts.each)


def party_step(
    cut: Parties, images: Tensor, training: Training, *, at: Mapping[str, Watch], at_tail: Watch, at_server: Watch
) -> None:
    """Forward and back of several parties, each owner's share within its context; that of the tail in one of its own besides."""
    with autocast(images.device, training.precision):
        sent = {}
        for name, channels in cut.channels.items():
            with at[name]():
                sent[name] = cut.own[name].front.run((images[:, list(channels)],))
        with at_server():
            came = _leaves([m for maps in sent.values() for m in maps])
            left = cut.body.run(came)
        tail = cast(Stages, cut.own[cut.labels].tail)
        with at[cut.labels](), at_tail():
            mine = _leaves(left)
            torch.autograd.backward(_loss(tail.run(mine)))
        with at_server():
            if cut.body.names:
                _back(left, mine)
            else:
                came = mine
        for i, (name, maps) in enumerate(sent.items()):
            with at[name]():
                _back(maps, came[i * cut.each : (i + 1) * cut.each])


def whole_step(network: Stages, images: Tensor, training: Training, *, at_site: Watch) -> None:
    """Forward and back, with the stand-in for the loss."""
    with at_site(), autocast(images.device, training.precision):
        torch.autograd.backward(_loss(network(images)))


def split_step(parts: Parts, images: Tensor, training: Training, *, at_site: Watch, at_server: Watch) -> None:
    """The same of a network that is cut, each owner's share within its context."""
    with autocast(images.device, training.precision):
        with at_site():
            stack = parts.front.run((images,))
        home = len(stack) - parts.body.reach()
        with at_server():
            came = _leaves(stack[home:])
            left = parts.body.run(came)
        with at_site():
            mine = _leaves((*stack[:home], *left))
            torch.autograd.backward(_loss(parts.tail.run(mine)))
        with at_server():
            _back(left, mine[home:])
        with at_site():
            _back(stack, (*mine[:home], *came))


def _moments(network: nn.Module, training: Training) -> list[Tensor]:
    n = 0 if training.optimizer == "sgd" and not training.momentum else MOMENTS[training.optimizer]
    return [torch.empty_like(p) for p in network.parameters() if p.requires_grad for _ in range(n)]


def _leaves(maps: Iterable[Tensor]) -> Stack:
    return tuple(m.detach().requires_grad_(m.is_floating_point()) for m in maps)


def _loss(logits: Iterable[Tensor]) -> Tensor:
    """As much is kept for the way back as of soft Dice and cross entropy."""
    found = torch.zeros(())
    for one in logits:
        p = one.float().softmax(1)
        found = found - (p * torch.empty_like(p)).sum() - torch.log_softmax(one.float(), 1).sum()
    return found


def _back(maps: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Back-propagate into these maps the gradients of the leaves that were made of them."""
    pairs = [(m, leaf.grad) for m, leaf in zip(maps, leaves, strict=True) if m.requires_grad and leaf.grad is not None]
    torch.autograd.backward([m for m, _ in pairs], [g for _, g in pairs])


class _Held(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it watches, as long as they live, and operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.flops = 0
        self._known: set[int] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter, self:
            yield
        self.flops += counter.get_total_flops()

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Count these, unless they are known."""
        for t in tensors:
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                weakref.finalize(storage, partial(self._drop, key, size))
                self.now += size
        self.most = max(self.most, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(t for t in tree_leaves(out) if isinstance(t, Tensor))
        return out
