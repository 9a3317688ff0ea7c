"""The bundle's own steps, between MONAI's reading and writing: nnU-Net's preprocessing, windows and way back, from `_steps.py`.

MONAI's transforms of the same names crop, normalise, resample and place windows by other rules, which give other label maps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from torch import nn

from ._steps import cases, preprocess, restore, slide


class Members(nn.Module):
    """Several networks as one: the mean of their logits."""

    def __init__(self, networks: Any) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Any) -> Any:
        """Logits (B, L, *patch) of a patch (B, C, *patch)."""
        return torch.stack([network(image) for network in self.networks]).mean(0)


def list_cases(folder: str, about: Any) -> list[dict[str, Any]]:
    """The cases of a folder, as MONAI's data sets take them."""
    return [{"image": files} for files in cases(folder, about).values()]


def prepare(data: Any, about: Any) -> dict[str, Any]:
    """The image as the network is to see it, and `geometry`, for `finish`. MONAI's axes are X, Y, Z; nnU-Net's Z, Y, X."""
    image = data["image"]
    array = image.numpy()
    array = array.transpose(0, *range(array.ndim - 1, 0, -1))
    spacing = [float(s) for s in image.pixdim][: array.ndim - 1][::-1]
    if array.ndim == 3:  # two-dimensional
        array, spacing = array[:, None], [999 * max(spacing), *spacing]
    x, found = preprocess(array, [999.0, 1.0, 1.0] if about["natural_images"] else spacing, about)
    box = [(b.start, b.stop) for b in found["box"]]
    geometry = np.array([found["whole"], *zip(*box, strict=True), found["old"], found["new"]], np.float64)
    return {"image": MetaTensor(np.ascontiguousarray(x), meta=image.meta), "geometry": torch.from_numpy(geometry)}


def infer(inputs: Any, network: Any, about: Any, **_: Any) -> Any:
    """Logits (1, L, Z, Y, X) of a preprocessed image (1, C, Z, Y, X)."""

    def run(part: Any, member: Any) -> Any:
        logits: Any = member(torch.from_numpy(part).to(inputs.device))
        return logits.float().cpu().numpy()

    x = np.asarray(inputs[0].cpu())
    members = network.networks if isinstance(network, Members) else [network]
    logits = [slide(x, partial(run, member=member), about) for member in members]  # averaged last, as nnU-Net does
    return torch.from_numpy(sum(logits[1:], logits[0]) / np.float16(len(members)))[None]


def finish(data: Any, about: Any) -> dict[str, Any]:
    """The label map in the geometry of the image's file, as `pred`."""
    whole, start, stop, old, new = np.asarray(data["geometry"].cpu())
    box = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    geometry = {"whole": whole.astype(int), "box": box, "old": list(old), "new": list(new)}
    labels = restore(np.asarray(data["pred"].cpu()), geometry, about)
    meta = dict(data["image"].meta)
    flat = len(meta["spatial_shape"]) == 2
    labels = (labels[0] if flat else labels).transpose()
    ending = about["file_ending"]
    file = str(meta["filename_or_obj"])
    meta["filename_or_obj"] = file[: -len(ending) - 5] + ending  # without the number of the channel
    return {**data, "pred": MetaTensor(np.ascontiguousarray(labels)[None], meta=meta)}
