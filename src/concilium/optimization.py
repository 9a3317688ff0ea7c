"""Optimisers, learning rate, precision and device: the same at a site and, in split learning, for the server's part."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from concilium.errors import ContractError
from concilium.messages import Training

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None  # type: ignore[assignment]

LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Of a control group of Linux (version 2, version 1): the memory that its processes may have, and have."""
POWER = 0.9
"""Exponent of the polynomial decay of the learning rate (Isensee et al. 2021)."""


def make_optimizer(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimiser, over the parameters that train; without `requires_grad` a parameter has no state."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    parameters = parameters or [nn.Parameter(torch.empty(0))]  # a part of a network may be frozen as a whole
    match training.optimizer:
        case "sgd":
            return torch.optim.SGD(
                parameters,
                training.learning_rate,
                momentum=training.momentum,
                weight_decay=training.weight_decay,
                nesterov=training.momentum > 0,
            )
        case "adam":
            return torch.optim.Adam(parameters, training.learning_rate, weight_decay=training.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, training.learning_rate, weight_decay=training.weight_decay)
    raise ContractError(f"Optimiser {training.optimizer!r} is not known. Known: sgd, adam, adamw. Correct the request.")


def set_rate(optimizer: torch.optim.Optimizer, training: Training, *, step: int, total_steps: int) -> None:
    """Give the optimiser the learning rate of this step of `total_steps`."""
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate * (1 - step / total_steps) ** POWER


def clip_and_step(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """Clip the gradient of these parameters to `clip_norm` together, and let the optimiser take its step.

    Raises:
        FloatingPointError: the gradient is not finite; no step is taken.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError(f"The norm of the gradient is {float(norm)}.")
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], str]:
    """The optimiser's state as named tensors on the CPU, and as JSON what of it is no tensor."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{index}/{name}"] = value
    return tensors, json.dumps(numbers)


def restore_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: str) -> None:
    """Give the optimiser the state that `state_of` told."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **json.loads(numbers)}.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which the network computes in this precision; weights stay float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def device_named(name: str) -> torch.device:
    """The device of this name; `auto` is a GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def memory_of(device: torch.device) -> int:
    """Most bytes that this process ever held; of a GPU, most bytes of its tensors there. 0: the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def at_hand(device: torch.device) -> int:
    """Bytes of memory that can still be taken; of a GPU, there. On Linux no more than the process's control group allows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    here = int(psutil.virtual_memory().available)
    for limit, used in LIMITS:
        try:
            return min(here, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
    return here


def floats_of(network: nn.Module) -> torch.dtype:
    """The type of its first parameter; float32 where it has none."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def gradient_of(m: Tensor) -> Tensor:
    """The gradient of a leaf; zeros where the loss does not depend on it, so that each map sent has one."""
    return torch.zeros_like(m) if m.grad is None else m.grad


def are_of(gradients: Sequence[Tensor], maps: Sequence[Tensor]) -> bool:
    """Whether gradients are, in number, shape and type, those of these maps."""
    return [(g.shape, g.dtype) for g in gradients] == [(m.shape, m.dtype) for m in maps]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element of every tensor is finite."""
    return all(not t.is_floating_point() or bool(torch.isfinite(t).all()) for t in tensors)
