"""Image files through SimpleITK, where the number type must stay: nnU-Net's readers give float32, and write label maps only."""

from __future__ import annotations

from pathlib import Path

import SimpleITK as sitk

from concilium.data._description import READERS

_PICTURES = tuple(ending for ending, name in READERS.items() if name == "NaturalImage2DIO")


def read_file(path: Path) -> sitk.Image:
    """The image or label map in a file; pictures have a spacing of 1 and one component where they are grey.

    Raises:
        RuntimeError: it cannot be read.
    """
    image = sitk.ReadImage(str(path))
    if path.name.endswith(_PICTURES):  # such a file may tell a resolution, which nnU-Net does not look at
        image.SetSpacing([1.0] * image.GetDimension())
        image.SetOrigin([0.0] * image.GetDimension())
    if path.suffix == ".bmp" and _bits_per_pixel(path) <= 8:  # grey, which ITK makes colours of
        image = sitk.VectorIndexSelectionCast(image, 0) if image.GetNumberOfComponentsPerPixel() > 1 else image
    return image


def write_file(image: sitk.Image, path: Path) -> None:
    """Write an image or a label map, compressed without loss where the format can.

    Raises:
        RuntimeError: it cannot be written.
    """
    sitk.WriteImage(image, str(path), useCompression=True)


def _bits_per_pixel(path: Path) -> int:
    """From the header of a BMP file."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(30)[28:30], "little")
