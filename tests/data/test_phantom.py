from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from concilium.data.phantom import DEFAULT_SITES, EXTENT_MM, PhantomSite, write_phantom
from concilium.errors import ContractError

SITES = [site.name for site in DEFAULT_SITES]
Voxels = np.ndarray[Any, Any]


def read(path: Path) -> tuple[Voxels, tuple[float, ...]]:
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image), image.GetSpacing()


def cases(folder: Path) -> dict[str, tuple[Voxels, Voxels, tuple[float, ...]]]:
    """Case -> image, label map, spacing; image and label map lie on the same grid."""
    found = {}
    for path in sorted((folder / "labelsTr").glob("*.nii.gz")):
        case = path.name.removesuffix(".nii.gz")
        label, spacing = read(path)
        image, same = read(folder / "imagesTr" / f"{case}_0000.nii.gz")
        assert image.shape == label.shape
        assert same == spacing
        found[case] = (image, label, spacing)
    return found


def describe(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "dataset.json").read_text()))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is for everybody, at half size."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, n_test=3, scale=0.5)
    return folder


def test_folders_are_as_nnunet_expects(phantom: Path) -> None:
    assert sorted(p.name for p in phantom.iterdir()) == sorted([*SITES, "test"])
    for name, n_cases in [*((site.name, site.n_cases) for site in DEFAULT_SITES), ("test", 3)]:
        dataset = describe(phantom / name)
        assert len(cases(phantom / name)) == dataset["numTraining"] == n_cases
        assert len(list((phantom / name / "imagesTr").iterdir())) == n_cases
        assert set(dataset["patient"]) == set(cases(phantom / name))
        assert dataset["channel_names"] == {"0": "MRI"}
        assert dataset["labels"] == {"background": 0, "organ": 1, "lesion": 2}
        assert dataset["file_ending"] == ".nii.gz"


def test_some_patients_have_two_cases_and_none_is_in_two_sets(phantom: Path) -> None:
    patients = {name: list(describe(phantom / name)["patient"].values()) for name in (*SITES, "test")}
    assert [len(patients["north"]), len(set(patients["north"]))] == [12, 10]
    assert sum(len(set(p)) for p in patients.values()) == len(set().union(*patients.values()))


def test_every_case_has_every_label_in_plausible_amounts(tmp_path: Path) -> None:
    """By the radii drawn [mm]: organ (8, 9, 11), lesion 3.5 to 5.5, each within 15 %; the lesion hides a part of the organ."""
    write_phantom(tmp_path, n_test=3)
    for name in (*SITES, "test"):
        for case, (_, label, spacing) in cases(tmp_path / name).items():
            volume = np.bincount(label.ravel(), minlength=3) * np.prod(spacing)
            assert len(volume) == 3
            assert 1000 < volume[1] < 5046, case
            assert 100 < volume[2] < 1060, case
            assert not any(label.take(edge, axis).any() for axis in range(3) for edge in (0, -1)), f"{case}: cut off"


def test_the_geometry_in_mm_is_common_and_the_voxels_are_not(tmp_path: Path) -> None:
    write_phantom(tmp_path, n_test=0)
    seen = set()
    for site in DEFAULT_SITES:
        for _, label, spacing in cases(tmp_path / site.name).values():
            assert spacing == pytest.approx(site.spacing)
            extent = np.array(label.shape[::-1]) * spacing
            assert np.all(np.abs(extent / EXTENT_MM - 1) < 0.15)
            seen.add(spacing)
    assert len(seen) == len(DEFAULT_SITES)


def test_sites_show_the_same_tissue_differently(phantom: Path) -> None:
    """Also after z-scoring, nnU-Net's normalisation: gain and offset go, the contrast curve stays."""
    scores = {}
    for name in SITES:
        found = [(image - image.mean()) / image.std() for image, _, _ in cases(phantom / name).values()]
        labels = [label for _, label, _ in cases(phantom / name).values()]
        scores[name] = np.mean([z[label == 2].mean() for z, label in zip(found, labels, strict=True)])
    assert scores["south"] + 0.5 < scores["north"] < scores["west"] - 0.5
    means = {name: np.mean([image.mean() for image, _, _ in cases(phantom / name).values()]) for name in SITES}
    assert means["south"] < means["north"] < means["west"]


def test_no_threshold_finds_a_label(tmp_path: Path) -> None:
    """The best window of intensities, chosen by the truth itself, stays below what a network reaches (organ 0.9, lesion 0.75)."""
    write_phantom(tmp_path, sites=[PhantomSite("north", 3)], n_test=0)
    best = {1: 0.0, 2: 0.0}
    levels = np.arange(0, 1200, 100)
    for low in levels:
        for high in [*levels[levels > low], 10**6]:
            for value in best:
                dice = []
                for image, label, _ in cases(tmp_path / "north").values():
                    guess, truth = (image >= low) & (image < high), label == value
                    dice.append(2 * (guess & truth).sum() / (guess.sum() + truth.sum()))
                best[value] = max(best[value], float(np.mean(dice)))
    assert 0.3 < best[1] < 0.75
    assert 0.3 < best[2] < 0.75


def test_voxels_depend_on_seed_site_and_number_only(phantom: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "again", n_test=1, scale=0.5, sites=[PhantomSite("north", 6)])
    write_phantom(tmp_path / "other", n_test=1, scale=0.5, sites=[PhantomSite("north", 6)], seed=1)
    before, again = cases(phantom / "north"), cases(tmp_path / "again" / "north")
    for case, (image, label, spacing) in again.items():
        assert image.tobytes() == before[case][0].tobytes()
        assert label.tobytes() == before[case][1].tobytes()
        assert spacing == before[case][2]
    other = cases(tmp_path / "other" / "north")
    assert not any(np.array_equal(label, other[case][1]) for case, (_, label, _) in again.items())


def test_a_second_visit_shows_the_same_body_elsewhere(tmp_path: Path) -> None:
    write_phantom(tmp_path, sites=[PhantomSite("north", 5)], n_test=0)
    found, patient = cases(tmp_path / "north"), describe(tmp_path / "north")["patient"]
    assert patient["north_003"] == patient["north_004"] != patient["north_002"]
    volumes = {case: (label == 1).sum() for case, (_, label, _) in found.items()}
    assert volumes["north_004"] == pytest.approx(volumes["north_003"], rel=0.03)
    assert not np.array_equal(found["north_003"][1], found["north_004"][1])


def test_the_test_set_takes_turns_through_the_scanners(phantom: Path) -> None:
    spacings = {spacing[0] for _, _, spacing in cases(phantom / "test").values()}
    assert sorted(spacings) == pytest.approx(sorted(site.spacing[0] for site in DEFAULT_SITES))


@pytest.mark.parametrize(
    ("sites", "scale"),
    [
        ([], 1.0),
        ([PhantomSite("test", 2)], 1.0),
        ([PhantomSite("a", 2), PhantomSite("a", 2)], 1.0),
        ([PhantomSite("a", 0)], 1.0),
        (DEFAULT_SITES, 0.1),
    ],
)
def test_what_makes_no_data_set_is_refused(tmp_path: Path, sites: list[PhantomSite], scale: float) -> None:
    with pytest.raises(ContractError, match="given"):
        write_phantom(tmp_path, sites=sites, scale=scale)
    assert not list(tmp_path.iterdir())
