"""Reproducible shifts of images, so that sites of one data set differ as hospitals do: contrast, noise, blur, shading, spacing.

A shifted image is a function of (seed, site, case, channel). Label maps are left alone but for the spacing. Files go through
SimpleITK and keep their format and number type: whole numbers are rounded, and clipped to what the type holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from concilium.data._itk import read_file, write_file
from concilium.data.draws import digest
from concilium.errors import StudyError

Array: TypeAlias = NDArray[np.float64]
Key: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Shift:
    """What is done to the images of a site, in this order: bias, gamma, blur, spacing, noise. The defaults do nothing."""

    gamma: float = 1.0
    """Exponent of the contrast curve between the darkest and the brightest voxel (8-bit images: between 0 and 255)."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise, as a share of the image's own."""
    blur: float = 0.0
    """Standard deviation of a Gaussian [mm]; pixels in formats without a spacing."""
    bias: float = 0.0
    """Largest smooth change of brightness across the image, as a share of it."""
    spacing: tuple[float, ...] | None = None
    """New spacing along x, y (and z) of the file [mm]; in pixels in formats without one. Image linear, label nearest."""


def check_dimensions(shift: Shift, image: Path, where: str) -> None:
    """Check that images like this one can be shifted so.

    Raises:
        StudyError: they have other axes than `spacing`, or more than three.
    """
    header = sitk.ImageFileReader()
    header.SetFileName(str(image))
    try:
        header.ReadImageInformation()
    except RuntimeError:
        return  # a case that cannot be read is set aside by the site
    n = header.GetDimension()
    if n > 3:
        raise StudyError(f"{where} is for images of 2 or 3 axes. {image.name} has {n}. Write one file per channel.")
    if shift.spacing is not None and len(shift.spacing) != n:
        raise StudyError(
            f"{where} spacing = {list(shift.spacing)} has {len(shift.spacing)} numbers. The images have {n} axes. "
            "Give one for each, along x, y, z."
        )


def shift_case(images: Sequence[tuple[Path, Path]], label: tuple[Path, Path], shift: Shift, *, key: Key) -> None:
    """Read the channels and the label map of a case, shift them, and write what changes: pairs of (from, to).

    The case must be one that can be read. The label map changes with the spacing only. `key`: (seed, site, case).
    """
    read = [read_file(source) for source, _ in images]
    for channel, ((_, target), image) in enumerate(zip(images, read, strict=True)):
        write_file(shift_image(image, shift, key=key, channel=channel), target)
    if shift.spacing is not None:
        label_map = read_file(label[0])
        label_map.CopyInformation(read[0])  # what counts is the image's geometry, and that both have the same voxels
        write_file(_resampled(label_map, shift.spacing, sitk.sitkNearestNeighbor), label[1])


def shift_image(image: sitk.Image, shift: Shift, *, key: Key, channel: int = 0) -> sitk.Image:
    """The shifted image, of the same number type. All channels of a case share the bias field; noise is drawn for each."""
    array = sitk.GetArrayFromImage(image)
    n_axes = image.GetDimension()
    values = array.astype(np.float64)
    low, high = (0.0, 255.0) if array.dtype == np.uint8 else (float(values.min()), float(values.max()))
    if shift.bias:
        field = 1 + shift.bias * _bias_field(values.shape[:n_axes], key)
        values = low + (values - low) * field.reshape(field.shape + (1,) * (values.ndim - n_axes))
    if shift.gamma != 1 and high > low:
        values = low + (high - low) * (np.clip(values - low, 0, high - low) / (high - low)) ** shift.gamma
    if shift.blur:
        sigma = [shift.blur / s for s in reversed(image.GetSpacing())] + [0.0] * (values.ndim - n_axes)
        values = gaussian_filter(values, sigma, mode="nearest")
    if shift.spacing is not None:
        moved = sitk.GetImageFromArray(values, isVector=values.ndim > n_axes)
        moved.CopyInformation(image)
        image = _resampled(moved, shift.spacing, sitk.sitkLinear)
        values = sitk.GetArrayFromImage(image)
    if shift.noise:
        drawn = _generator(*key, "noise", channel).standard_normal(values.shape)
        values = values + shift.noise * values.std() * drawn
    shifted = sitk.GetImageFromArray(_as_type(values, array.dtype), isVector=values.ndim > n_axes)
    shifted.CopyInformation(image)
    return shifted


def _bias_field(shape: Sequence[int], key: Key) -> Array:
    """A random polynomial of degree 2 in the image's coordinates, with its largest absolute value at 1."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij", sparse=True)
    terms = [*axes, *(a * b for i, a in enumerate(axes) for b in axes[i:])]
    field = np.zeros(tuple(shape))
    for weight, term in zip(_generator(*key, "bias").standard_normal(len(terms)), terms, strict=True):
        field += weight * term
    return field / max(float(np.abs(field).max()), 1e-12)


def _generator(*key: str | int) -> np.random.RandomState:
    """NumPy promises the same numbers in every version of this generator only."""
    number = digest(*key, "shift")
    return np.random.RandomState([number & 0xFFFFFFFF, number >> 32])


def _as_type(values: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not np.issubdtype(dtype, np.integer):
        return values.astype(dtype)
    allowed = np.iinfo(dtype)
    return np.clip(np.rint(values), allowed.min, allowed.max).astype(dtype)


def _resampled(image: sitk.Image, spacing: Sequence[float], interpolator: int) -> sitk.Image:
    """The image on a grid of this spacing whose outer edge at the first voxel is the old one."""
    old = np.array(image.GetSpacing())
    new = np.array(spacing)
    size = np.maximum(1, np.rint(np.array(image.GetSize()) * old / new)).astype(int)
    resample = sitk.ResampleImageFilter()
    resample.SetSize(size.tolist())
    resample.SetOutputSpacing(new.tolist())
    resample.SetOutputDirection(image.GetDirection())
    # the middle of the new first voxel, counted in old voxels from the middle of the old one
    resample.SetOutputOrigin(image.TransformContinuousIndexToPhysicalPoint(((new / old - 1) / 2).tolist()))
    resample.SetInterpolator(interpolator)
    resample.SetUseNearestNeighborExtrapolator(True)
    resampled: sitk.Image = resample.Execute(image)
    return resampled
