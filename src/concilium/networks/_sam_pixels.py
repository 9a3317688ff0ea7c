"""From the intensities that preprocessing delivers to those that Segment-Anything expects.

Its encoder was trained on pictures of 0 to 255 in three colours, less `MEAN`, divided by `DEVIATION`: values of about mean 0
and deviation 1. What is delivered here is said by the plan, channel by channel.

- `zscore` (z-scores of each image, nnU-Net's rule for MRI and pictures; of all images, its rule for CT): of that scale already,
  and passed on as they are. What a picture loses is its brightness and the cast of its colours; a medical intensity has neither,
  and nothing makes an MRI a photograph: this is the scale of the numbers, not their meaning.
- `0-1` (`[preprocessing] intensity = "0-1"` or a range; nnU-Net's `RGBTo01`): times 255, then as the authors do.
- `0-255` (nnU-Net's `NoNormalization`): as the authors do.

One channel is taken for all three colours. Three are taken for red, green and blue, as FedFMS takes three slices or sequences.
Any other number is mixed into three by a linear map, at first the mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from concilium.errors import StudyError

MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of red, green and blue, from 0 to 255."""
COLOURS = 3
Scale: TypeAlias = Literal["zscore", "0-1", "0-255"]
_RANGE: Mapping[str, float] = {"0-1": 255.0, "0-255": 1.0}
"""What values are multiplied by to be of 0 to 255."""
_SCHEMES: Mapping[str, Scale] = {
    "RGBTo01Normalization": "0-1",
    "Rescale0to1Normalization": "0-1",
    "RescaleTo01Normalization": "0-1",
    "NoNormalization": "0-255",
}
"""nnU-Net's normalisations that leave no z-scores."""


class Pixels(nn.Module):
    """Images (B, C, *spatial) as Segment-Anything's encoder wants them, (B, 3, *spatial)."""

    def __init__(self, scales: tuple[Scale, ...]) -> None:
        super().__init__()
        n = len(scales)
        means, deviations = (MEAN, DEVIATION) if n in (1, COLOURS) else ((_mean(MEAN),) * n, (_mean(DEVIATION),) * n)
        each = scales if n != 1 else scales * COLOURS
        factors = [1.0 if s == "zscore" else _RANGE[s] / d for s, d in zip(each, deviations, strict=True)]
        shifts = [0.0 if s == "zscore" else -m / d for s, m, d in zip(each, means, deviations, strict=True)]
        self.factor: Tensor
        self.shift: Tensor
        self.register_buffer("factor", torch.tensor(factors), persistent=False)
        self.register_buffer("shift", torch.tensor(shifts), persistent=False)
        self.mix = None if n in (1, COLOURS) else nn.Linear(n, COLOURS, bias=False)
        if self.mix is not None:
            nn.init.constant_(self.mix.weight, 1 / n)

    def forward(self, image: Tensor) -> Tensor:
        last = image.ndim - 1  # not -1: tracing for ONNX loses how many axes there are
        y = torch.addcmul(self.shift, image.permute(0, *range(2, last + 1), 1), self.factor)
        y = y if self.mix is None else self.mix(y)
        return y.permute(0, last, *range(1, last))


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def scales_of(plan: Mapping[str, Any], n_channels: int, given: str) -> tuple[Scale, ...]:
    """What the values of each channel are, as the plan says, or as the study does where `given` is not `plan`.

    Raises:
        StudyError: channels differ, and the plan is one of other channels.
    """
    if given != "plan":
        return (given,) * n_channels  # type: ignore[return-value]
    if (resize := plan.get("resize")) is not None:
        return ("zscore" if resize["intensity"] == "zscore" else "0-1",) * n_channels
    found: list[Scale] = [_SCHEMES.get(name, "zscore") for name in plan.get("normalization_schemes", ())]
    if len(set(found)) <= 1:
        return (found[0] if found else "zscore",) * n_channels
    if len(found) != n_channels:
        raise StudyError(
            f"[network] intensity = 'plan' is not possible: the plan says {', '.join(found)} for {len(found)} channels, and the "
            f"network has {n_channels}. Allowed: a plan with the same normalisation for all. Set intensity to '0-1', '0-255' or "
            "'zscore'."
        )
    return tuple(found)
