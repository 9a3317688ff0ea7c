"""`check` where sites hold different channels of the same patients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from concilium.data.check import Checked, check
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.messages import Holding

HOLDS = {name: Holding((name,), name == "first") for name in SEQUENCES}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    write_sequences(folder, n_cases=3, n_test=1, size=16)
    return folder


def checked(data: Path, holds: dict[str, Holding] | None = None) -> Checked:
    return check({name: data / name for name in SEQUENCES}, test=data / "test", holds=holds or HOLDS)


def errors(found: Checked) -> list[tuple[str, str]]:
    return [(f.site, f.code) for f in found.findings if f.severity == "error"]


def test_sites_without_label_maps_and_with_the_same_patients_are_right(sequences: Path) -> None:
    assert errors(checked(sequences)) == []
    alone = check({name: sequences / name for name in SEQUENCES}, test=sequences / "test")
    assert {code for _, code in errors(alone)} >= {"no_data_set", "missing_label", "sites_differ"}


def test_sites_may_read_different_channels_of_one_folder(sequences: Path) -> None:
    sites = dict.fromkeys(SEQUENCES, sequences / "test")
    assert errors(check(sites, holds=HOLDS)) == []


def test_a_label_map_that_lacks_where_they_are_read_is_found(sequences: Path, tmp_path: Path) -> None:
    shutil.copytree(sequences, tmp_path / "data")
    (tmp_path / "data/first/labelsTr/case_001.nii.gz").unlink()
    assert errors(checked(tmp_path / "data")) == [("first", "missing_label")]


def test_a_channel_that_a_site_does_not_have_is_found(sequences: Path) -> None:
    holds = HOLDS | {"second": Holding(("other",), False)}
    found = checked(sequences, holds)
    assert errors(found) == [("second", "sites_differ"), ("test", "sites_differ"), ("test", "sites_differ")]
    assert "It has channels second, not other, which it is said to hold." in {f.text for f in found.findings}


def test_patients_that_are_not_everywhere_are_told(sequences: Path, tmp_path: Path) -> None:
    shutil.copytree(sequences, tmp_path / "data")
    (tmp_path / "data/third/imagesTr/case_000_0000.nii.gz").unlink()
    notes = {(f.site, f.text) for f in checked(tmp_path / "data").findings if f.code == "not_everywhere"}
    assert notes == {(s, "1 case of 3 are not at all sites (case_000): not trained on.") for s in ("first", "second")}
    about = json.loads((tmp_path / "data/second/dataset.json").read_text())
    (tmp_path / "data/second/dataset.json").write_text(json.dumps(about | {"patient": {}}))
    for path in sorted((tmp_path / "data/second/imagesTr").iterdir()):
        path.rename(path.with_name(f"other_{path.name}"))
    assert errors(checked(tmp_path / "data")) == [(name, "not_everywhere") for name in SEQUENCES]
