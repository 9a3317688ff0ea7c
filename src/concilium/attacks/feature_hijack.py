"""Images from maps, by a receiver that departs from the protocol: the gradients that it returns make a front tell more.

Feature-space hijacking, Pasquini, Ateniese & Bernaschi 2021 (arXiv:2012.02670), section 3. On images of its own the attacker
trains a front of its own and a decoder of that front's maps, here before it meets a site. In place of the gradient of the loss a
site then gets that of a critic which tells its maps from the attacker's (least squares: Mao et al. 2017, arXiv:1611.04076), and
of how far means and covariances of both are apart (Sun & Saenko 2016, arXiv:1607.01719): its front learns to make the attacker's
maps, which the attacker's decoder reads. Of the site's front no weight is used, only the architecture, with what defends it. It
may take many steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from concilium.attacks import Auxiliary, Guess, Known, Release, Transcript, stacked
from concilium.attacks._decoder import Decoder, decoded
from concilium.data.draws import drawn_from
from concilium.errors import ContractError
from concilium.networks import Stack

SEES, GUESSES = "steering", "images"
REVEALS = "whoever returns gradients to a front, and departs from the protocol: a malicious server, or holder of labels"
ON_REQUEST = True


def attack(  # noqa: PLR0913  (options of the study)
    transcript: Transcript,
    network: Known,
    auxiliary: Auxiliary,
    *,
    seed: int,
    steps: int = 400,
    width: int = 32,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
    critic_rate: float = 1e-3,
    strength: float = 100.0,
) -> Guess:
    """An image for each patch behind what is sent at the end of the steering.

    Args:
        steps: of training the attacker's own front and decoder, before.
        width: channels of the decoder; the critic has half of them.
        batch_size: own images in a step.
        learning_rate: of the attacker's own front and decoder, at the start.
        critic_rate: learning rate of the critic.
        strength: factor of the gradients that are returned, beside which those of the site's own tail should be small.

    Raises:
        ContractError: no sites can be steered here, or they send no float map.
    """
    images = auxiliary.own.images
    axes = (0, *range(2, images.ndim))
    mean, deviation = images.mean(axes, keepdim=True), images.std(axes, keepdim=True).clamp_min(1e-6)
    with drawn_from(seed, "feature_hijack"):
        pilot = _pilot(network, images, (images - mean) / deviation, steps, width, batch_size, learning_rate)
        critic = _critic(pilot, max(1, width // 2), critic_rate)
    number = 0

    def answer(release: Release) -> Stack:
        nonlocal number
        number += 1
        with drawn_from(seed, "feature_hijack", number):
            mine = torch.randint(len(images), (len(release.maps[0]),))
            gradients = critic.step(tuple(m[mine] for m in pilot.maps), _floats(release.maps))
        return tuple(strength * g for g in gradients)

    sent = network.open_steer(answer)
    return Guess(images=decoded(pilot.decoder, _floats(stacked(sent))) * deviation + mean)


@dataclass(frozen=True)
class _Pilot:
    """What the attacker's own front leaves of its images, and the decoder of that."""

    maps: Stack
    decoder: Decoder


def _pilot(
    network: Known, images: Tensor, target: Tensor, steps: int, width: int, batch_size: int, learning_rate: float
) -> _Pilot:
    """Train a front of the site's layers, with weights of its own, together with a decoder that finds the image."""
    front = copy.deepcopy(network.open_front).train()
    for module in front.modules():
        if (draw_anew := getattr(module, "reset_parameters", None)) is not None:
            draw_anew()

    def maps_of(x: Tensor) -> Stack:
        left = front.run((x,))
        return _floats(tuple(left[i] for i in network.places))

    with torch.no_grad():
        first = maps_of(images)
    if not first:
        raise ContractError("The front leaves no float map. Feature-space hijacking needs one. Use another attack.")
    decoder = Decoder(first, tuple(images.shape[2:]), images.shape[1], width=width)
    optimizer = torch.optim.Adam([*front.parameters(), *decoder.parameters()], learning_rate)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,))
        optimizer.zero_grad(set_to_none=True)
        functional.l1_loss(decoder(maps_of(images[chosen])), target[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
    with torch.no_grad():
        return _Pilot(maps_of(images), decoder)


@dataclass(frozen=True)
class _Critic:
    """Tells maps of sites (0) from the attacker's (1), at each voxel of the largest map."""

    judge: Decoder
    scales: Stack
    """Deviation of each channel of the attacker's maps."""
    moments: tuple[tuple[Tensor, Tensor], ...]
    """Of the attacker's maps (`_moments`)."""
    optimizer: torch.optim.Optimizer

    def step(self, mine: Stack, theirs: Stack) -> Stack:
        """Learn from both; the gradients by which theirs become more like mine."""
        theirs = tuple(m.detach() for m in theirs)
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.judge(mine) - 1).square().mean() + self.judge(theirs).square().mean()
        loss.backward()
        self.optimizer.step()
        theirs = tuple(m.requires_grad_() for m in theirs)
        verdict = (self.judge(theirs) - 1).square().mean()
        for m, scale, (mean, covariance) in zip(theirs, self.scales, self.moments, strict=True):
            found = _moments(m / scale)
            verdict = verdict + (found[0] - mean).square().mean() + (found[1] - covariance).square().mean()
        return torch.autograd.grad(verdict, theirs)


def _moments(m: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each channel, and the covariances of all channels, at one voxel and at neighbours along each axis."""
    near = torch.cat([m, *(m.roll(1, axis) for axis in range(2, m.ndim))], 1)
    values = near.transpose(0, 1).flatten(1)
    mean = values.mean(1, keepdim=True)
    return mean, (values - mean) @ (values - mean).T / values.shape[1]


def _critic(pilot: _Pilot, width: int, learning_rate: float) -> _Critic:
    axes = [(0, *range(2, m.ndim)) for m in pilot.maps]
    scales = tuple(m.std(a, keepdim=True).clamp_min(1e-6) for m, a in zip(pilot.maps, axes, strict=True))
    moments = tuple(_moments(m / scale) for m, scale in zip(pilot.maps, scales, strict=True))
    largest = max((tuple(m.shape[2:]) for m in pilot.maps), key=lambda size: torch.Size(size).numel())
    judge = Decoder(pilot.maps, largest, 1, width=width)
    return _Critic(judge, scales, moments, torch.optim.Adam(judge.parameters(), learning_rate, betas=(0.5, 0.9)))


def _floats(maps: Stack) -> Stack:
    """Those that get a gradient."""
    return tuple(m for m in maps if m.is_floating_point())
