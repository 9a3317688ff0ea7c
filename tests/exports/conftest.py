"""Runs to export, in 3D with resampling and in colour, and what `concilium predict` makes of their images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).parent))

from made import BOTH, make_run, write_pictures, write_volumes

from concilium.predict import predict

Same = Callable[..., None]


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def volume_run(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spacing 3.3 x 0.9 x 1 mm in place of 2.5 x 1.1 x 0.8: every case is resampled, its slices apart; mirrored in prediction."""

    def other_spacing(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["spacing"] = [3.3, 0.9, 1.0]

    folder = tmp_path_factory.mktemp("run") / "volumes"
    return make_run(folder, volumes, patch=[8, 24, 24], edit=other_spacing, mirror=True)


@pytest.fixture(scope="session")
def picture_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "pictures", pictures, configuration="2d", patch=[48, 48])


@pytest.fixture(scope="session")
def regions_run(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Regions, and voxels to be ignored."""
    return make_run(tmp_path_factory.mktemp("run") / "regions", volumes, patch=[8, 24, 24], labels=BOTH)


@pytest.fixture(scope="session")
def resized_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures at one size, that is larger along one axis and smaller along the other."""
    resize = {"size": (64, 32), "intensity": "zscore"}
    return make_run(tmp_path_factory.mktemp("run") / "resized", pictures, configuration="2d", resize=resize)


@pytest.fixture(scope="session")
def resized_volume_run(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes at one size, with regions."""
    resize = {"size": (16, 32, 48), "intensity": (20.0, 130.0)}
    return make_run(tmp_path_factory.mktemp("run") / "resized_volumes", volumes, labels=BOTH, resize=resize)


@pytest.fixture(params=["volume", "picture", "regions", "resized", "resized_volume"])
def run_and_data(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Every kind of run, with the data set that it is of."""
    data = "pictures" if request.param in ("picture", "resized") else "volumes"
    return request.getfixturevalue(f"{request.param}_run"), request.getfixturevalue(data)


@pytest.fixture(scope="session")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], Path]:
    """`predicted(run, data)`: the folder of label maps that `concilium predict` writes for a data set's images."""
    done: dict[tuple[Path, Path], Path] = {}

    def find(run: Path, data: Path) -> Path:
        if (run, data) not in done:
            done[run, data] = tmp_path_factory.mktemp("predicted")
            assert predict(run, data / "imagesTr", done[run, data], device="cpu") == []
        return done[run, data]

    return find


@pytest.fixture(scope="session")
def same_label_maps() -> Same:
    """Checks that two folders hold the same label maps in the same geometry, and that these are worth comparing.

    `share`: of the voxels that may differ, where another library computes the logits. They differ by 1e-5, which decides where
    two labels are equal in float16; a network that was never trained has many such voxels.
    """

    def check(expected: Path, found: Path, share: float = 0.0) -> None:
        files = sorted(p.name for p in expected.iterdir())
        assert files
        for name in files:
            a, b = (sitk.ReadImage(str(folder / name)) for folder in (expected, found))
            for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(a, geometry)() == pytest.approx(getattr(b, geometry)())
            x, y = map(sitk.GetArrayFromImage, (a, b))
            assert x.dtype == y.dtype
            assert (x > 0).mean() > 0.01
            assert (x != y).mean() <= share, f"{name}: {(x != y).sum()} of {x.size} voxels differ"

    return check
