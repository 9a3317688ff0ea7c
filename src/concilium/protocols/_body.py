"""The server's part of a split network: between the maps that a site sends and those that it gets back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from concilium.data.draws import seed_all
from concilium.errors import ContractError, EngineError
from concilium.messages import Tensors, Training
from concilium.networks import Parts, Stack, are_of_kinds
from concilium.optimization import (
    all_finite,
    are_of,
    autocast,
    clip_and_step,
    floats_of,
    gradient_of,
    make_optimizer,
    restore_state,
    set_rate,
    state_of,
)
from concilium.protocols import STATE, WEIGHTS
from concilium.transport import Transport, decode, decode_like, encode

MOMENTS = "body/"
"""Prefix of a round's tensors: the state of the bodies' optimisers, `body/OWNER/...`."""
ALL = "server"
"""Owner of the one body that serves all sites (none may have this name); where there are several, each site owns one."""


class Body:
    """The body with its optimiser. Between `forward` and `backward` it holds the graph of one step of one site."""

    def __init__(
        self, parts: Parts, training: Training, device: torch.device, transport: Transport = "float32"
    ) -> None:
        self.network = parts.body.to(device).train()
        self.takes = parts.taken
        self.training = training
        self.device = device
        self.transport = transport
        self.optimizer = make_optimizer(self.network, training)
        self.seconds = 0.0
        """Of computing, since it was last loaded."""
        self._in: Stack = ()
        self._out: tuple[Tensor, ...] = ()
        """What was sent back and has a gradient."""

    def load(self, weights: Tensors, moments: Tensors, numbers: str) -> None:
        """Take over weights, and the optimiser's state as `state` told it; copies, which no later step changes."""
        self.seconds = 0.0
        self.network.load_state_dict(dict(weights))
        restore_state(self.optimizer, {n: t.clone() for n, t in moments.items()}, numbers)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights, on the CPU."""
        return {n: t.detach().cpu().clone() for n, t in self.network.state_dict().items()}

    def state(self) -> tuple[dict[str, Tensor], str]:
        """A copy of the optimiser's state: tensors, and as JSON the rest."""
        moments, numbers = state_of(self.optimizer)
        return {n: t.clone() for n, t in moments.items()}, numbers

    def is_finite(self) -> bool:
        """Whether all weights are."""
        return all_finite(self.network.state_dict().values())

    def forward(self, maps: Sequence[Tensor], key: tuple[int | str, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Run on the maps that a site sent; the maps and the order that go back (`messages.Tail`).

        Args:
            maps: the lowest first, as they came; none: nothing is annotated in the batch, and the step changes nothing.
            key: of the step, from which dropout and the like are drawn.

        Raises:
            ContractError: they are not as many as this body takes, not of these types, or not finite.
            FloatingPointError: the maps that would go back cannot travel.
        """
        if not maps:
            self.give_up()
            return (), ()
        maps = decode(maps, self.transport, dtype=floats_of(self.network))
        if not are_of_kinds(maps, self.takes) or not all_finite(maps):
            raise ContractError(
                f"Maps of type {', '.join(str(m.dtype) for m in maps) or 'none'} came. Expected {', '.join(self.takes)}: whole "
                "numbers as uint8, all others float, and all finite. Start the round again."
            )
        began = time.monotonic()
        self._in = tuple(m.to(self.device).requires_grad_(m.is_floating_point()) for m in maps)
        self.optimizer.zero_grad(set_to_none=True)
        seed_all(*key, "body")
        with autocast(self.device, self.training.precision):
            left = self.network.run(self._in)
        order = tuple(next((j for j, came in enumerate(self._in) if m is came), -1) for m in left)
        sent = [m for m, j in zip(left, order, strict=True) if j < 0]
        self._out = tuple(m for m in sent if m.requires_grad)
        encoded = encode(sent, self.transport)
        self.seconds += time.monotonic() - began
        return encoded, order

    def backward(self, gradients: Sequence[Tensor], *, step: int, total_steps: int) -> tuple[Tensor, ...]:
        """Back-propagate, take a step with the rate of `step`; the gradients of the float maps that the site had sent.

        Raises:
            ContractError: they are not the gradients of what was sent, or not finite.
            FloatingPointError: the body's own gradient is not finite, or those of the maps cannot travel; no step is taken.
        """
        began = time.monotonic()
        gradients = decode_like(gradients, self.transport, self._out)
        if not are_of(gradients, self._out) or not all_finite(gradients):
            raise ContractError(
                f"{len(gradients)} gradients came. Expected {len(self._out)}, finite, in shape and type of the float maps that "
                "were sent. Start the round again."
            )
        if self._in:
            torch.autograd.backward(self._out, [g.to(self.device) for g in gradients])
        back = encode((gradient_of(m) for m in self._in if m.requires_grad), self.transport)
        if self._in:
            set_rate(self.optimizer, self.training, step=step, total_steps=total_steps)
            clip_and_step(self.network.parameters(), self.optimizer, self.training.clip_norm)
        self.give_up()
        self.seconds += time.monotonic() - began
        return back

    def give_up(self) -> None:
        """Let go of the step at hand."""
        self._in, self._out = (), ()


def together(weights: Tensors, state: Tensors, moments: Mapping[str, tuple[Tensors, str]]) -> Tensors:
    """The tensors of a round under their prefixes: weights, the rule's, and of each owner's body what its optimiser keeps."""
    named = {WEIGHTS + n: t for n, t in weights.items()} | {STATE + n: t for n, t in state.items()}
    return named | {f"{MOMENTS}{o}/{n}": t for o, (ts, _) in moments.items() for n, t in ts.items()}


def require_finite(body: Body | None, *, model: str, number: int) -> None:
    """Check the one body of all after a round, where there is one.

    Raises:
        EngineError: a weight of it is not finite.
    """
    if body is not None and not body.is_finite():
        raise EngineError(
            f"{model}, round {number}: the body is not finite any more. Expected finite weights. Go on from the round before "
            "with --resume, or start again with a lower learning rate."
        )
