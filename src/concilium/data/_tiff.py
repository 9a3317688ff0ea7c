"""TIFF files of two and of three dimensions, which share an ending: nnU-Net finds out by trying, and so does this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from concilium.data._description import FLAT
from concilium.nnunet_parts import NaturalImage2DIO, Tiff3DIO


class TiffIO:
    """Reads as nnU-Net's `NaturalImage2DIO` where that can, otherwise as its `Tiff3DIO`; writes what it has read."""

    def read_images(self, paths: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """Image (C, X, Y, Z) and its properties."""
        try:
            image, properties = NaturalImage2DIO().read_images(paths)
        except Exception:  # an assertion, a wrong number of axes: whatever; the other one says what is wrong
            image, properties = Tiff3DIO().read_images(paths)
        return image, properties

    def read_seg(self, path: str) -> tuple[Any, dict[str, Any]]:
        """Label map (1, X, Y, Z) and its properties."""
        try:
            label, properties = NaturalImage2DIO().read_seg(path)
        except Exception:
            label, properties = Tiff3DIO().read_seg(path)
        return label, properties

    def write_seg(self, label: Any, path: str, properties: dict[str, Any]) -> None:
        """Write a label map (X, Y, Z) as its image was; in 3D the spacing goes into a file beside it."""
        flat = tuple(properties["spacing"]) == FLAT
        (NaturalImage2DIO if flat else Tiff3DIO)().write_seg(label, path, properties)
