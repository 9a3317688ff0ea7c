"""Images from the maps that were sent, without knowing a weight: a decoder trained on (maps, image) of the attacker's own cases.

Dosovitskiy & Brox 2016 (arXiv:1506.02753); of split networks He, Zhang & Lee 2019 (doi:10.1145/3359789.3359824). The pairs come
from the front as it sends, with whatever defends it switched on, so the decoder is trained against the defence.
"""

from __future__ import annotations

from torch.nn import functional

from concilium.attacks import Auxiliary, Guess, Known, Transcript, stacked
from concilium.attacks._decoder import Decoder, decoded, train
from concilium.data.draws import drawn_from

SEES, GUESSES = "maps", "images"
REVEALS = "a receiver of maps with images of its own, that may run the front or has seen some of its maps"


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
    """An image for each patch.

    Args:
        steps: of training the decoder; 0 leaves it as it was drawn.
        width: channels of the decoder.
        batch_size: pairs in a step.
        learning_rate: at the start.
    """
    maps, images = stacked(auxiliary.own.sent), auxiliary.own.images
    axes = (0, *range(2, images.ndim))
    mean, deviation = images.mean(axes, keepdim=True), images.std(axes, keepdim=True).clamp_min(1e-6)
    with drawn_from(seed, "inversion"):
        decoder = Decoder(maps, tuple(images.shape[2:]), images.shape[1], width=width)
        train(
            decoder,
            maps,
            (images - mean) / deviation,
            functional.l1_loss,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
        )
    return Guess(images=decoded(decoder, stacked(transcript)) * deviation + mean)
