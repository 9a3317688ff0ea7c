"""ONNX, with all that comes before and after the network as numbers (preprocessing.json) and as a script (predict.py).

Where the model needs no more than a plain one does, the same stands there once more in as few lines as it takes (plain.py).

One graph per member: `image` float32 (batch, C, *spatial) to `logits` float32 (batch, L, *spatial). The batch is free. Spatial
sizes are too, each a multiple of what the network pools along its axis, unless the network does otherwise at another size (`sam`
and `swin_unet` fill up what their windows do not divide): its graph is for the plan's patch alone, the size of every window that
`predict.py` gives it, and preprocessing.json says so (`any_size`).

Written by PyTorch's older exporter, which traces. The newer one needs two packages more, takes 50 times as long, and leaves paths
of this machine in the file. Tracing takes decisions that depend on the input for constants, so every graph is compared with its
network before it is let out.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from concilium.errors import StudyError
from concilium.exports import comparison, members, write_json
from concilium.exports._sidecar import is_plain, sidecar
from concilium.finished import Finished

OPSET = 18
"""Read by onnxruntime since 1.14."""
FATAL = 4
"""What onnxruntime says by itself while graphs are compared: what fails is said here."""
TOLERANCE = 1e-3
"""Largest difference of a logit, as a share of the largest logit (and of 1); 3e-6 is usual."""


class _Finest(nn.Module):
    """The finest logits of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        finest: Tensor = self.network(image)[0]
        return finest


def export(finished: Finished, out: Path, *, card: str, intended_use: str) -> str:
    """Write `model.onnx` (`model_0.onnx`, ... for several members), `preprocessing.json`, `predict.py`, perhaps `plain.py`.

    Raises:
        StudyError: PyTorch's exporter is not installed or cannot take the network, or the plan cannot be described.
    """
    require_onnx()
    files = [f"{name}.onnx" for name in members(finished).values()]
    about = sidecar(finished, files)
    any_size = [_write(network, finished, out / f) for network, f in zip(finished.networks(), files, strict=True)]
    write_json(out / "preprocessing.json", about | {"any_size": all(any_size)})
    shutil.copyfile(Path(__file__).with_name("_steps.py"), out / "predict.py")
    if is_plain(about):
        shutil.copyfile(Path(__file__).with_name("_plain.py"), out / "plain.py")
    return "python {out}/predict.py IMAGES SEGMENTATIONS" + comparison(finished)


def require_onnx() -> None:
    """Check that what writes and runs ONNX is installed.

    Raises:
        StudyError: it is not; says how to install it.
    """
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise StudyError(
            f"Format 'onnx' needs {' and '.join(missing)}, not installed here. Every other format is allowed without. "
            "Install with: pip install 'concilium[onnx]'"
        )


def _write(network: nn.Module, finished: Finished, path: Path) -> bool:
    """Whether the graph takes images of any size; otherwise those of the plan's patch."""
    plan = finished.plan
    pooled = [math.prod(stride[axis] for stride in plan.strides) for axis in range(len(plan.patch_size))]
    patch = (2, len(finished.channels), *plan.patch_size)
    one = (1, *patch[1:])
    sizes = list(zip(plan.patch_size, pooled, strict=True))
    larger = (1, patch[1], *(n + p for n, p in sizes))
    smaller = (1, patch[1], *(max(2, math.ceil(n / p / 2)) * p for n, p in sizes))
    finest = _Finest(network).eval()
    with contextlib.suppress(Exception):  # what decides by its size often cannot run at another
        if _written(
            finest, path, patch, {2 + axis: f"size_{axis}" for axis in range(len(pooled))}, (patch, larger, smaller)
        ):
            return True
    try:
        same = _written(finest, path, patch, {}, (patch, one))
    except Exception as e:  # whatever a network that is not ours provokes
        raise StudyError(
            f"PyTorch cannot write network {finished.study.network.name!r} as ONNX ({type(e).__name__}). Allowed is one that "
            "it can trace. Change it, or export it as safetensors."
        ) from e
    if not same:
        raise StudyError(
            f"Network {finished.study.network.name!r} gives other logits as ONNX. Allowed is one without decisions that depend "
            "on its input. Change it, or export it as safetensors."
        )
    return False


def _written(
    finest: nn.Module, path: Path, patch: tuple[int, ...], free: dict[int, str], shapes: Sequence[tuple[int, ...]]
) -> bool:
    """Write a graph whose batch and these axes are free; whether it gives the network's logits for images of these shapes."""
    axes = {0: "batch"} | free
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of its age, and of norms that compute their statistics in prediction
        torch.onnx.export(
            finest, (torch.zeros(patch),), str(path), dynamo=False, opset_version=OPSET,
            input_names=["image"], output_names=["logits"], dynamic_axes={"image": axes, "logits": axes},
        )  # fmt: skip
        return all(_same(finest, path, shape) for shape in shapes)


def _same(network: nn.Module, path: Path, shape: tuple[int, ...]) -> bool:
    import onnxruntime

    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(image).numpy()
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = FATAL
    session = onnxruntime.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": image.numpy()})
    difference = np.abs(found - expected).max() if found.shape == expected.shape else math.inf
    return bool(difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())))
