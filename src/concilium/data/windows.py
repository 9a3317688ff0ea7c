"""A whole image through the network: nnU-Net's sliding window."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from concilium.data.augment import mirror_axes
from concilium.data.labels import Labels, to_nnunet
from concilium.data.plan import Plan
from concilium.data.preprocess import Array
from concilium.errors import ContractError
from concilium.nnunet_parts import nnUNetPredictor

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Some:
    """Some of the windows of an image, which are numbered in their order, mirrored ones included; then how many there are."""

    start: int
    count: int
    first: int = 0
    """The number of the first that the network was given."""
    n_windows: int = 0

    def of(self, positions: list[Any], each: int) -> list[Any]:
        """The positions with these windows, of all, which have `each` windows."""
        self.first, self.n_windows = self.start // each * each, len(positions) * each
        return positions[self.start // each : -(-(self.start + self.count) // each)]


def predict_logits(
    network: nn.Module,
    image: Array | Tensor,
    plan: Plan,
    *,
    labels: Labels,
    device: torch.device,
    mirror: bool,
    precision: str,
    some: Some | None = None,
) -> Tensor:
    """Logits float16 (L, X, Y, Z), on the CPU, of a preprocessed image (C, X, Y, Z), by nnU-Net's sliding window.

    Windows of the plan's patch size overlap by half and are added with Gaussian weights; with `mirror` each is the mean over
    all mirrorings, along the network's `mirror_axes` where it says them. The network may return one tensor or its logits finest
    first. It is moved to `device` and stays there;
    the training mode of its modules is left as it was. `precision` is that of autocast: `float32`, `bfloat16` or `float16`.

    With `some` the network gets only the windows at positions of which one is wanted; what is returned then means nothing.
    """
    if precision not in PRECISIONS:
        raise ContractError(f"Precision {precision!r}. Known are: {', '.join(PRECISIONS)}. Choose one of them.")
    if not isinstance(image, Tensor):
        # torch takes no read-only array: the windows are copies, but it cannot know
        image = torch.from_numpy(np.require(image, np.float32, ["C", "W"]))
    own_axes = getattr(network, "mirror_axes", None)
    axes = mirror_axes(plan) if own_axes is None else own_axes
    benchmark, modes = torch.backends.cudnn.benchmark, {module: module.training for module in network.modules()}
    with redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(
            tile_step_size=0.5,
            use_gaussian=True,
            use_mirroring=mirror,
            perform_everything_on_device=device.type == "cuda",
            device=device,
            allow_tqdm=False,
        )
        torch.backends.cudnn.benchmark = benchmark  # nnU-Net's predictor switches it on for the whole process
        predictor.manual_initialization(
            _Finest(network, device.type, PRECISIONS[precision]),
            plan.manager,
            plan.configuration,
            None,
            to_nnunet(labels),
            "nnUNetTrainer",
            axes or None,  # nnU-Net takes the largest of these axes
        )
        if some is not None:
            every = predictor._internal_get_sliding_window_slicers
            each = 2 ** len(axes) if mirror else 1
            predictor._internal_get_sliding_window_slicers = lambda size: some.of(every(size), each)
        try:
            logits: Tensor = predictor.predict_sliding_window_return_logits(image)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return logits.cpu()


class _Finest(nn.Module):
    """The finest logits of a network, computed in the precision asked for."""

    def __init__(self, network: nn.Module, device_type: str, precision: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.device_type = device_type
        self.precision = precision

    def forward(self, image: Tensor) -> Tensor:
        # nnU-Net's predictor switches autocast on wherever it finds a GPU; float32 must switch it off again
        reduced = self.precision != torch.float32
        dtype = self.precision if reduced else None
        with torch.autocast(self.device_type, dtype=dtype, enabled=reduced):
            out = self.network(image)
        finest: Tensor = out[0] if isinstance(out, tuple | list) else out
        # the mean over mirrorings is taken in place: bfloat16 has too few digits for it
        return finest.float() if self.precision == torch.bfloat16 else finest
