"""What a run's record tells of the machine and the packages that it ran on."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from concilium import __version__

PACKAGES = (
    *("torch", "nnunetv2", "dynamic_network_architectures", "batchgeneratorsv2", "numpy", "scipy", "monai"),
    *("safetensors", "SimpleITK"),
)
"""Whose versions a record tells."""


def environment() -> dict[str, Any]:
    """What this process runs on."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "concilium": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": packages,
    }
