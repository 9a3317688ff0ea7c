"""Concilium trains one medical image segmentation model at several hospitals without moving an image.

import concilium as cc
cc.check("study.toml").findings             # a table (pandas)
run = cc.run("study.toml")
run.summary
run.predict("images", "segmentations")
"""

from __future__ import annotations

from concilium.api import (
    Check,
    Plan,
    Run,
    Scores,
    check,
    dossier,
    evaluate,
    network,
    open_run,
    plan,
    report,
    run,
    table,
    tensorboard,
)

__all__ = [
    "Check", "Plan", "Run", "Scores", "check", "dossier", "evaluate", "network", "open_run", "plan", "report", "run", "table",
    "tensorboard"
]  # fmt: skip
__version__ = "0.1.0.dev0"
