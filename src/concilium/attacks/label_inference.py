"""Label maps from the gradients that a site returns in split training: a decoder trained on (gradients, label map) of own cases.

Label leakage from gradients after Li et al. 2022 (arXiv:2102.08504), for dense labels and with a learnt attack. Where a head
acts on a map of the server's, labels follow exactly (decisions/0008), and such a cut is refused; this asks what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from concilium.attacks import Auxiliary, Guess, Known, Transcript, stacked
from concilium.attacks._decoder import Decoder, decoded, train
from concilium.data.draws import drawn_from

SEES, GUESSES = "gradients", "labels"
REVEALS = "the server of split training with annotated cases of its own, which runs front, body and tail on them"


def attack(
    transcript: Transcript,
    network: Known,
    auxiliary: Auxiliary,
    *,
    seed: int,
    steps: int = 400,
    width: int = 32,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
) -> Guess:
    """The chance of foreground for each voxel.

    Args:
        steps: of training the decoder.
        width: channels of the decoder.
        batch_size: pairs in a step.
        learning_rate: at the start.
    """
    gradients = stacked(auxiliary.own.sent, "gradients")
    mask = (auxiliary.own.labels > 0).float().unsqueeze(1)
    with drawn_from(seed, "label_inference"):
        decoder = Decoder(gradients, tuple(mask.shape[2:]), 1, width=width, alone=True)
        train(decoder, gradients, mask, _loss, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    return Guess(labels=torch.sigmoid(decoded(decoder, stacked(transcript, "gradients")))[:, 0])


def _loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy and soft Dice: foreground is rare."""
    p = torch.sigmoid(logits)
    overlap = (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    return functional.binary_cross_entropy_with_logits(logits, mask) - overlap
