"""Label maps from the maps that were sent, without any gradient: a decoder trained on (maps, label map) of own cases.

The front of a network that segments makes maps to segment by. What whoever has a front's maps, or the images that they were made
of, can say of label maps is the measure of what gradients tell besides (`label_inference`).
"""

from __future__ import annotations

import torch

from concilium.attacks import Auxiliary, Guess, Known, Transcript, stacked
from concilium.attacks._decoder import decoded, fit_mask
from concilium.data.draws import drawn_from

SEES, GUESSES = "maps", "labels"
REVEALS = "whoever has maps, be it the site that made them, and annotated cases of its own; it needs no gradient"


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
    how = {"steps": steps, "width": width, "batch_size": batch_size}
    with drawn_from(seed, "labels_from_maps"):
        decoder = fit_mask(
            stacked(auxiliary.own.sent), auxiliary.own.labels, alone=False, learning_rate=learning_rate, **how
        )
    return Guess(labels=torch.sigmoid(decoded(decoder, stacked(transcript)))[:, 0])
