"""PyTorch's own file format, for programs that read nothing else: the one place that writes it, and nothing reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_torch_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, text and containers of these, so that `torch.load(weights_only=True)` can read the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(content), path)
