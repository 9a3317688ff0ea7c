"""Images from the maps that were sent, by whoever has the front's weights: the image is sought whose maps are those that came.

Mahendran & Vedaldi 2015 (arXiv:1412.0035), with total variation as the prior; of split networks He, Zhang & Lee 2019
(doi:10.1145/3359789.3359824). Where fronts are averaged their weights are known to all who take part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from concilium.attacks import Auxiliary, Guess, Known, Release, Transcript
from concilium.data.draws import drawn_from

SEES, GUESSES = "maps", "images"
REVEALS = "a receiver of maps that knows the front's weights: the server, and every site, where fronts are averaged"
NEEDS_FRONT = True


def attack(
    transcript: Transcript,
    network: Known,
    auxiliary: Auxiliary,
    *,
    seed: int,
    steps: int = 800,
    learning_rate: float = 0.1,
    smoothness: float = 0.001,
    moments: float = 1.0,
) -> Guess:
    """An image for each patch.

    Args:
        steps: of Adam, on all patches of a release together.
        learning_rate: in deviations of the image.
        smoothness: weight of the total variation.
        moments: weight of the prior that channels have mean and deviation of the attacker's own images; instance norms hide both.
    """
    images = auxiliary.own.images
    axes = (0, *range(2, images.ndim))
    mean, deviation = images.mean(axes, keepdim=True), images.std(axes, keepdim=True).clamp_min(1e-6)
    front = network.open_front.train(not network.finished)
    for module in front.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # what was dropped is not known: the mean of it is sought
    found = []
    for number, release in enumerate(transcript):
        with drawn_from(seed, "inversion_white", number):
            x = torch.zeros(len(release.maps[0]), *images.shape[1:], requires_grad=True)
            optimizer = torch.optim.Adam([x], learning_rate)
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                left = front.run((x * deviation + mean,))
                prior = smoothness * _variation(x) + moments * _unlike(x)
                loss = _mismatch([left[i] for i in network.places], release) + prior
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        found.append(x.detach() * deviation + mean)
    return Guess(images=torch.cat(found))


def _mismatch(maps: Sequence[Tensor], release: Release) -> Tensor:
    """Mean squared difference, each map in units of its own variance; maps of whole numbers have no gradient."""
    total = torch.zeros(())
    for ours, theirs in zip(maps, release.maps, strict=True):
        if ours.is_floating_point() and ours.shape[1]:
            total = total + (ours.float() - theirs).pow(2).mean() / theirs.var().clamp_min(1e-12)
    return total


def _unlike(x: Tensor) -> Tensor:
    """How far mean and deviation of each channel of each patch are from 0 and 1, squared."""
    flat = x.flatten(2)
    return (flat.mean(2).pow(2) + (flat.var(2) + 1e-6).sqrt().sub(1).pow(2)).mean()


def _variation(x: Tensor) -> Tensor:
    """Total variation: the mean difference between neighbours along each spatial axis."""
    return sum((x.diff(dim=axis).abs().mean() for axis in range(2, x.ndim)), torch.zeros(()))
