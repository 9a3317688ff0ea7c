"""Concilium trains one medical image segmentation model at several hospitals without moving an image."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
