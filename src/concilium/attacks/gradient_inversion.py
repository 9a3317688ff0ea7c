"""Images from a federated update of one step: images are sought whose gradient points where the update does.

Geiping et al. 2020 (arXiv:2003.14053): the angle between gradients, total variation as the prior, and Adam on the signs. After
one step of SGD the update is the gradient but for its length. The attacker is given much: label maps and the size of the batch
are taken to be known, and of a mean of several sites' updates what each counts. It fails where the update is no gradient any
more: after many steps, or after one of Adam, whose first step tells little but signs; and with large batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from concilium.attacks import Auxiliary, Guess, Known, Transcript
from concilium.data.draws import drawn_from
from concilium.errors import ContractError

SEES, GUESSES = "updates", "images"
REVEALS = "a server that sees updates, or their sum, after one step of SGD, and knows the label maps"


def attack(
    transcript: Transcript,
    network: Known,
    auxiliary: Auxiliary,
    *,
    seed: int,
    steps: int = 300,
    learning_rate: float = 0.1,
    smoothness: float = 1e-3,
) -> Guess:
    """An image for each patch.

    Args:
        steps: of Adam on the images of one update.
        learning_rate: at the start, in deviations of the image; it falls to a thousandth in three steps.
        smoothness: weight of the total variation.
    """
    if auxiliary.labels is None or network.loss is None:
        raise ContractError("No label maps, or no loss, were given. Gradient inversion needs both. Give them.")
    images, whole, objective = auxiliary.own.images, network.open_whole.train(), network.loss
    axes = (0, *range(2, images.ndim))
    mean, deviation = images.mean(axes, keepdim=True), images.std(axes, keepdim=True).clamp_min(1e-6)
    parameters = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    all_alike = ((len(auxiliary.labels) // len(transcript), 1.0),)
    found, left = [], auxiliary.labels
    for number, release in enumerate(transcript):
        parts = [(n, share) for n, share in release.parts or all_alike if n]
        size = sum(n for n, _ in parts)
        labels, left = left[:size], left[size:]
        if not size:  # nobody was in the step
            continue
        aim = [release.update[n] for n in parameters]
        with drawn_from(seed, "gradient_inversion", number):
            x = torch.randn(size, *images.shape[1:]).requires_grad_()
            optimizer = torch.optim.Adam([x], learning_rate)
            rates = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps * k // 8 for k in (3, 5, 7)], 0.1)
            for _ in range(steps):
                total, begin = torch.zeros(()), 0
                for n, share in parts:
                    own = slice(begin, begin := begin + n)
                    total = total + share * objective(whole(x[own] * deviation + mean), labels[own])
                ours = torch.autograd.grad(total, list(parameters.values()), create_graph=True, allow_unused=True)
                loss = _angle(ours, aim) + smoothness * _variation(x)
                (gradient,) = torch.autograd.grad(loss, x)
                x.grad = gradient.sign()
                optimizer.step()
                rates.step()
        found.append(x.detach() * deviation + mean)
    return Guess(images=torch.cat(found))


def _angle(ours: Sequence[Tensor | None], aim: Sequence[Tensor]) -> Tensor:
    """1 less the cosine between gradients, all parameters as one vector; those without a gradient are left out."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(ours, aim, strict=True) if a is not None]
    a, b = (torch.cat(of) for of in zip(*pairs, strict=True))
    return 1 - nn.functional.cosine_similarity(a, b, dim=0)


def _variation(x: Tensor) -> Tensor:
    """Total variation: the mean difference between neighbours along each spatial axis."""
    return sum((x.diff(dim=axis).abs().mean() for axis in range(2, x.ndim)), torch.zeros(()))
