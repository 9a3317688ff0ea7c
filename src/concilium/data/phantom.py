"""A synthetic multi-site data set with known shapes: what `concilium demo` and the tests run on.

One body, drawn in millimetres: a textured organ with a lesion in or at it, and two structures that only look like them, a
smooth organ of nearly the same brightness and a vessel as bright as the lesion. So no threshold finds either label; texture,
size and surroundings do. Each site then images patients of its own with its own voxels, contrast curve and noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from concilium.data.draws import digest
from concilium.errors import ContractError

Array: TypeAlias = NDArray[np.float64]

LABELS = {"background": 0, "organ": 1, "lesion": 2}
EXTENT_MM = (40.0, 40.0, 42.0)
"""Field of view (x, y, z) [mm] at scale 1; each case deviates by up to a tenth."""
VISITS_EVERY = 4
"""Every fourth patient was imaged twice, so that splits must be made by patient."""


@dataclass(frozen=True)
class PhantomSite:
    """How many cases a site has, and how its scanner shows them."""

    name: str
    n_cases: int
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.5)
    """(x, y, z) [mm]."""
    gain: float = 1000.0
    """Intensity of the brightest tissue above that of air."""
    offset: float = 0.0
    """Intensity of air."""
    gamma: float = 1.0
    """Contrast curve: below 1 bright tissues look alike, above 1 dark ones do."""
    noise: float = 0.04
    """Standard deviation as a share of `gain`."""
    shading: float = 0.1
    """Largest smooth change of brightness across the field of view, as a share of it."""


DEFAULT_SITES = (
    PhantomSite("north", 12),
    PhantomSite("south", 8, spacing=(1.2, 1.2, 2.0), gain=400.0, offset=-150.0, gamma=0.5, noise=0.05),
    PhantomSite("west", 3, spacing=(0.9, 0.9, 1.2), gain=2500.0, offset=300.0, gamma=1.8, noise=0.08, shading=0.25),
)


@dataclass(frozen=True)
class _Ellipsoid:
    centre: Array
    """(3,) x, y, z [mm] from the middle of the field of view."""
    radii: Array
    """(3,) [mm]."""

    def depth(self, points: tuple[Array, Array, Array]) -> Array:
        """About how far each point lies inside [mm]; negative outside, zero on the surface."""
        squares: Any = sum(((p - c) / r) ** 2 for p, c, r in zip(points, self.centre, self.radii, strict=True))
        return np.asarray((1 - np.sqrt(squares)) * self.radii.min())


@dataclass(frozen=True)
class _Anatomy:
    organ: _Ellipsoid
    lesion: _Ellipsoid
    lookalike: _Ellipsoid
    vessel: Array
    """(4,) x and y [mm] in the middle, and their slopes along z."""
    waves: Array
    """(n, 4) wave vectors [1/mm] and phases of the organ's texture."""
    brightness: Array
    """(5,) of body, lookalike, organ, lesion, vessel; air is 0."""


def write_phantom(
    folder: Path,
    *,
    seed: int = 0,
    sites: Sequence[PhantomSite] = DEFAULT_SITES,
    n_test: int = 6,
    scale: float = 1.0,
) -> None:
    """One nnU-Net raw folder per site and one called `test`, whose `n_test` cases take turns through the sites' scanners.

    A case depends on the seed, its site and its number only: a site with more cases has the same first ones.

    Args:
        folder: where the folders of the sites are written; made if missing.
        seed: another seed, other patients.
        sites: the sites; the name `test` is taken.
        n_test: cases of the held-out set; its patients are at no site.
        scale: size of body and field of view; 1 is about 40 x 40 x 28 voxels, 0.5 makes quick tests.

    Raises:
        ContractError: the sites, their names or the scale make no data set.
    """
    names = [site.name for site in sites]
    if not names or len({*names, "test"}) != len(names) + 1 or any(site.n_cases < 1 for site in sites):
        raise ContractError(
            f"Phantom sites {names} given. Allowed are different names other than 'test', each with 1 case or more. Rename them."
        )
    if not 0.4 <= scale <= 4:
        raise ContractError(f"Phantom scale {scale} given. Between 0.4 and 4 is allowed. Choose one of these.")
    for site in sites:
        _write_set(folder / site.name, [(site, site.name, i) for i in range(site.n_cases)], seed, scale)
    turns = [(sites[i % len(sites)], f"test_{sites[i % len(sites)].name}", i // len(sites)) for i in range(n_test)]
    _write_set(folder / "test", turns, seed, scale)


def _write_set(folder: Path, cases: Sequence[tuple[PhantomSite, str, int]], seed: int, scale: float) -> None:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    patients = {}
    for site, group, number in cases:
        patient, visit = _patient(number)
        case = f"{group}_{number:03d}"
        patients[case] = f"{group}_p{patient:03d}"
        image, label = _acquire(site, (seed, group, patient), visit, scale)
        _write(image, site.spacing, folder / "imagesTr" / f"{case}_0000.nii.gz")
        _write(label, site.spacing, folder / "labelsTr" / f"{case}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": len(patients),
        "file_ending": ".nii.gz",
        "patient": patients,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _patient(number: int) -> tuple[int, int]:
    """Patient and visit behind a case number: of each run of patients 0, 1, 2, 3, the last comes twice."""
    run, place = divmod(number, VISITS_EVERY + 1)
    last = VISITS_EVERY - 1
    return run * VISITS_EVERY + min(place, last), int(place > last)


def _write(array: NDArray[Any], spacing: tuple[float, float, float], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path), useCompression=True)


def _acquire(
    site: PhantomSite, key: tuple[int, str, int], visit: int, scale: float
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image and label map, both (z, y, x), of one visit of one patient."""
    anatomy = _draw_anatomy(np.random.default_rng(digest("phantom", *key)), scale)
    rng = np.random.default_rng(digest("phantom", *key, visit))
    extent = np.array(EXTENT_MM) * scale * rng.uniform(0.9, 1.1, 3)
    shape = np.maximum(np.rint(extent / np.array(site.spacing)).astype(int), 8)
    # A second visit is another position on the table, not another body.
    shift = rng.uniform(-1.5, 1.5, 3) * scale
    axes = [(np.arange(n) - (n - 1) / 2) * s + d for n, s, d in zip(shape, site.spacing, shift, strict=True)]
    z, y, x = np.meshgrid(*axes[::-1], indexing="ij")
    tissue, label = _draw_tissue(anatomy, (x, y, z), scale)
    slope = rng.uniform(-1, 1, 3) / (extent / 2)
    shading = 1 + site.shading * (slope[0] * x + slope[1] * y + slope[2] * z) / 3
    image = tissue**site.gamma * shading + rng.normal(0, site.noise, tissue.shape)
    return np.rint(site.offset + site.gain * image).astype(np.int16), label


def _draw_anatomy(rng: np.random.Generator, scale: float) -> _Anatomy:
    """The body of one patient."""
    organ = _Ellipsoid(
        (np.array([6.0, 0.0, 0.0]) + rng.uniform(-2, 2, 3)) * scale,
        np.array([8.0, 9.0, 11.0]) * rng.uniform(0.85, 1.15, 3) * scale,
    )
    radii = rng.uniform(3.5, 5.5) * rng.uniform(0.85, 1.15, 3) * scale
    direction = rng.normal(size=3)
    direction *= rng.uniform(0.3, 1.1) / np.linalg.norm(direction)
    # In the organ or at its surface, and always well inside the smallest field of view.
    limit = 0.45 * np.array(EXTENT_MM) * scale - radii - 2.5 * scale
    lesion = _Ellipsoid(np.clip(organ.centre + direction * organ.radii, -limit, limit), radii)
    lookalike = _Ellipsoid(
        (np.array([-9.0, 3.0, 0.0]) + rng.uniform(-1.5, 1.5, 3)) * scale,
        np.array([5.0, 6.0, 8.0]) * rng.uniform(0.85, 1.15, 3) * scale,
    )
    vessel = np.array([*(np.array([-4.0, -10.0]) + rng.uniform(-2, 2, 2)) * scale, *rng.uniform(-0.15, 0.15, 2)])
    directions = rng.normal(size=(6, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = rng.uniform(5, 8, (6, 1))  # [mm], not scaled: coarser than the coarsest voxels at every scale
    waves = np.concatenate([2 * np.pi * directions / lengths, rng.uniform(0, 2 * np.pi, (6, 1))], axis=1)
    brightness = np.array([0.35, 0.54, 0.57, 0.9, 0.9]) + rng.uniform(-0.03, 0.03, 5)
    return _Anatomy(organ, lesion, lookalike, vessel, waves, brightness)


def _draw_tissue(
    anatomy: _Anatomy, points: tuple[Array, Array, Array], scale: float
) -> tuple[Array, NDArray[np.uint8]]:
    """Brightness (between 0.02 and 1) and label at each point."""
    x, y, z = points
    body, lookalike, organ, lesion, vessel = anatomy.brightness
    around = (1 - np.hypot(x / (0.47 * EXTENT_MM[0]), y / (0.43 * EXTENT_MM[1])) / scale) * 0.43 * EXTENT_MM[1] * scale
    at = anatomy.vessel
    tube = 1.8 * scale - np.hypot(x - at[0] - at[2] * z, y - at[1] - at[3] * z)
    texture = np.mean([np.cos(x * a + y * b + z * c + phase) for a, b, c, phase in anatomy.waves], axis=0)
    in_organ, in_lesion = anatomy.organ.depth(points), anatomy.lesion.depth(points)
    tissue = np.full_like(x, 0.02)
    for depth, brightness in (
        (around, body),
        (anatomy.lookalike.depth(points), lookalike),
        (tube, vessel),
        (in_organ, organ + 0.22 * texture),
        (in_lesion, lesion),
    ):
        share = 1 / (1 + np.exp(-np.clip(depth / 0.35, -40, 40)))  # a surface voxel holds some of both
        tissue = tissue + share * (brightness - tissue)
    label = np.where(in_lesion > 0, LABELS["lesion"], np.where(in_organ > 0, LABELS["organ"], 0))
    return np.clip(tissue, 0.02, 1.0), label.astype(np.uint8)
