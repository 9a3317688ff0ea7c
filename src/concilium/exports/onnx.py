"""ONNX, with all that comes before and after the network as numbers (preprocessing.json) and as a script (predict.py).

One graph per member: `image` float32 (batch, C, *spatial) to `logits` float32 (batch, L, *spatial). Batch and spatial sizes are
free; each spatial size must be a multiple of what the network pools along its axis.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from concilium.errors import StudyError
from concilium.exports import members, refuse_other_labels, write_json
from concilium.exports._sidecar import sidecar
from concilium.finished import Finished

OPSET = 20
"""Read by onnxruntime since 1.17."""


class _Finest(nn.Module):
    """The finest logits of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        finest: Tensor = self.network(image)[0]
        return finest


def export(finished: Finished, out: Path, *, card: str, intended_use: str) -> str:
    """Write `model.onnx` (`model_0.onnx`, ... for several members), `preprocessing.json` and `predict.py`.

    Raises:
        StudyError: PyTorch's exporter is not installed or cannot take the network, or labels or plan cannot be described.
    """
    require_onnx()
    refuse_other_labels(finished, "onnx")
    files = [f"{name}.onnx" for name in members(finished).values()]
    write_json(out / "preprocessing.json", sidecar(finished, files))
    for network, file in zip(finished.networks(), files, strict=True):
        _write(network, finished, out / file)
    shutil.copyfile(Path(__file__).with_name("_steps.py"), out / "predict.py")
    return "python {out}/predict.py IMAGES SEGMENTATIONS"


def require_onnx() -> None:
    """Check that what PyTorch needs to write ONNX is installed.

    Raises:
        StudyError: it is not; says how to install it.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise StudyError(
            "Format 'onnx' needs the package onnxscript, which is not installed. Install it with: pip install 'concilium[onnx]'"
        ) from e


def _write(network: nn.Module, finished: Finished, path: Path) -> None:
    """Trace on two patches of zeros: sizes of 1 would be taken for constants."""
    plan = finished.plan
    pooled = [math.prod(stride[axis] for stride in plan.strides) for axis in range(len(plan.patch_size))]
    size = [max(n, 2 * p) for n, p in zip(plan.patch_size, pooled, strict=True)]
    free = {2 + i: p * torch.export.Dim(f"n{i}") for i, p in enumerate(pooled)}
    image = torch.zeros(2, len(finished.channels), *size)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                _Finest(network).eval(),
                (image,),
                path,
                input_names=["image"],
                output_names=["logits"],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={"image": {0: torch.export.Dim("batch"), **free}},
                external_data=False,
                verbose=False,
            )
        except Exception as e:  # whatever a network that is not ours provokes
            raise StudyError(
                f"PyTorch cannot write network {finished.study.network.name!r} as ONNX ({type(e).__name__}). Allowed is one that "
                "torch.export can trace with any batch and spatial size. Change it, or export it as safetensors."
            ) from e
