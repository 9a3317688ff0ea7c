"""Concilium trains one medical image segmentation model at several hospitals without moving an image.

import concilium as cc
run = cc.run("study.toml")
run.summary                                  # a table (pandas)
run.predict("images", "segmentations")
"""

from __future__ import annotations

from concilium.api import Run, check, open_run, run, table

__all__ = ["Run", "check", "open_run", "run", "table"]
__version__ = "0.1.0.dev0"
