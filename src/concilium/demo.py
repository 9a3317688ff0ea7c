"""The study of `concilium demo`: three synthetic sites, one of them tiny, that differ in contrast, noise, spacing and size."""

from __future__ import annotations

from pathlib import Path

from concilium.data.phantom import write_phantom
from concilium.study import Study, parse_study

SITES = ("north", "south", "west")


def demo_study(out: Path) -> Study:
    """Write the phantom into `out`/data and return the study on it."""
    data = out / "data"
    if not data.exists():
        unfinished = out / "data.unfinished"
        write_phantom(unfinished)
        unfinished.rename(data)
    raw = {
        "study": {"name": "demo", "seed": 1},
        "sites": {name: {"data": name} for name in SITES},
        "test": {"data": "test"},
        "protocol": {"name": "federated", "rounds": 8, "steps": 18, "compare": ["local", "centralized"]},
        "network": {"base_features": 8},
        "training": {
            "optimizer": "adamw",
            "learning_rate": 3e-3,
            "batch_size": 2,
            "patch_size": [32, 32, 24],
            "mirror": False,
        },
        "engine": {"threads": 1},  # the network is too small for more
    }
    return parse_study(raw, folder=data.resolve(), source="demo")
