"""TIFF files of two and of three dimensions, which share an ending: nnU-Net finds out by trying, and so does this.

A stack of 3 or 4 slices looks like a picture in colour; a file with the spacing beside it says that it is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concilium.data._description import FLAT, spacing_file
from concilium.nnunet_parts import NaturalImage2DIO, Tiff3DIO


class TiffIO:
    """Reads as nnU-Net's `NaturalImage2DIO` where that can, otherwise as its `Tiff3DIO`; writes what it has read."""

    def read_images(self, paths: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """Image (C, X, Y, Z) and its properties."""
        if not spacing_file(Path(paths[0]), channel=True).is_file():
            try:
                flat: tuple[Any, dict[str, Any]] = NaturalImage2DIO().read_images(paths)
            except Exception:  # an assertion, a wrong number of axes: whatever; the other one says what is wrong
                pass
            else:
                return flat
        deep: tuple[Any, dict[str, Any]] = Tiff3DIO().read_images(paths)
        return deep

    def read_seg(self, path: str) -> tuple[Any, dict[str, Any]]:
        """Label map (1, X, Y, Z) and its properties."""
        try:
            flat: tuple[Any, dict[str, Any]] = NaturalImage2DIO().read_seg(path)
            if len(flat[0]) == 1:
                return flat
        except Exception:  # as above
            pass
        deep: tuple[Any, dict[str, Any]] = Tiff3DIO().read_seg(path)
        return deep

    def write_seg(self, label: Any, path: str, properties: dict[str, Any]) -> None:
        """Write a label map (X, Y, Z) as its image was; in 3D the spacing goes into a file beside it."""
        flat = tuple(properties["spacing"]) == FLAT
        (NaturalImage2DIO if flat else Tiff3DIO)().write_seg(label, path, properties)
