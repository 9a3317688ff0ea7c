"""Label maps from gradients: what a site returns in split training, or what a party of vertical training gets.

A decoder is trained on (gradients, label map) of own cases.

Label leakage from gradients after Li et al. 2022 (arXiv:2102.08504), for dense labels and with a learnt attack. Where a head
acts on a map of the server's, labels follow exactly (decisions/0008), and such a cut is refused; this asks what is left.
"""

from __future__ import annotations

import torch

from concilium.attacks import Auxiliary, Guess, Known, Transcript, stacked
from concilium.attacks._decoder import decoded, fit_mask
from concilium.data.draws import drawn_from

SEES, GUESSES = "gradients", "labels"
REVEALS = (
    "whoever gets gradients, and has annotated cases: the server of split training, or a party of vertical training"
)


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
    how = {"steps": steps, "width": width, "batch_size": batch_size}
    with drawn_from(seed, "label_inference"):
        decoder = fit_mask(gradients, auxiliary.own.labels, alone=True, learning_rate=learning_rate, **how)
    return Guess(labels=torch.sigmoid(decoded(decoder, stacked(transcript, "gradients")))[:, 0])
