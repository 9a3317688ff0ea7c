"""`check` on cases beside each other and sites beside each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from check_sites import SHAPE, found, rewrite, save, site, write

from concilium.data.check import Finding, check
from concilium.data.matching import Names
from concilium.study import data_sets


def of(findings: tuple[Finding, ...], code: str) -> list[tuple[str, str, str | None]]:
    return [(f.severity, f.site, f.case) for f in findings if f.code == code]


def image(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(1000 + seed).normal(100, 10, SHAPE).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ the same twice


def test_the_same_image_is_found_whatever_its_file(tmp_path: Path) -> None:
    """Other name, other type of number, other compression, other geometry."""
    folder = site(tmp_path / "a")
    whole = np.round(image()).astype(np.int16)
    write(folder, "c0", whole)
    write(folder, "c3", whole.astype(np.float64), place={"spacing": (1, 2, 3)})
    sitk.WriteImage(
        sitk.ReadImage(str(folder / "imagesTr/c3_0000.nii.gz")), str(folder / "imagesTr/c3_0000.nii.gz"), True, 1
    )
    findings = check({"a": folder}).findings
    assert of(findings, "duplicate") == [("error", "a", "c3")]
    assert "case c0." in findings[0].text
    assert "differ" not in findings[0].text


def test_a_copy_of_the_same_patient_is_milder_unless_its_labels_differ(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    rewrite(folder, patient={f"c{i}": f"p{max(i, 1)}" for i in range(6)})
    for case in ("c0", "c1"):
        write(folder, case, image())
    assert of(check({"a": folder}).findings, "duplicate") == [("warning", "a", "c1")]
    write(folder, "c1", image(), np.ones(SHAPE, np.uint8))
    findings = check({"a": folder}).findings
    assert of(findings, "duplicate") == [("error", "a", "c1")]
    assert "label maps differ" in findings[0].text


def test_the_same_image_in_site_and_test_set_and_at_two_sites(tmp_path: Path) -> None:
    a, b, test = (site(tmp_path / n, seed=i, prefix=n) for i, n in enumerate("abt"))
    for folder, case in ((a, "a0"), (b, "b1"), (test, "t2")):
        write(folder, case, image())
    findings = check({"a": a, "b": b}, test=test).findings
    assert of(findings, "in_test_set") == [("error", "a", "a0")]
    assert of(findings, "duplicate") == [("error", "b", "b1")]
    assert not of(check({"a": a}, test=b).findings, "duplicate")


def test_constant_images_are_no_duplicates(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    for case in ("c0", "c1"):
        write(folder, case, np.zeros(SHAPE))
    assert set(found(folder)) == {"constant_image"}


def test_a_patient_on_both_sides(tmp_path: Path) -> None:
    """In the test set: by the tables an error, by names alone a warning. At two sites: a warning, and a note."""
    a, b, test = (site(tmp_path / n, seed=i, prefix=n) for i, n in enumerate("abt"))
    for folder, case in ((a, "a4"), (b, "b5"), (test, "t3")):
        rewrite(folder, patient={f"{case[0]}{i}": f"{case[0]}-{i}" for i in range(6)} | {case: "17"})
    findings = check({"a": a, "b": b}, test=test).findings
    assert of(findings, "patient_in_test_set") == [("error", "a", "a4"), ("error", "b", "b5")]
    assert of(findings, "patient_at_two_sites") == [("warning", "a", None)]
    rewrite(b, patient={f"b{i}": f"b-{i}" for i in range(5)})
    write(b, "17", seed=70)
    findings = check({"a": a, "b": b}).findings
    assert of(findings, "patient_at_two_sites") == [("note", "a", None)]
    rewrite(test, patient=None)
    rewrite(a, patient={"a4": "t0"})
    assert of(check({"a": a}, test=test).findings, "patient_in_test_set") == [("warning", "a", "a4")]


# ----------------------------------------------------------------------------------------------------------- one site


def test_too_few_patients_for_the_folds(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    rewrite(folder, patient={f"c{i}": f"p{i % 3}" for i in range(6)})
    assert found(folder, folds=3) == {}
    findings = check({"a": folder}, folds=5).findings
    assert [(f.code, f.text) for f in findings] == [
        ("few_patients", "There are 3 patients for 5 folds: 3 folds are made.")
    ]
    rewrite(folder, patient=dict.fromkeys([f"c{i}" for i in range(6)], "p"))
    assert "single patient (6 cases)" in check({"a": folder}).findings[0].text
    assert not of(check({"a": site(tmp_path / "b", seed=1)}, test=folder).findings, "few_patients")


def test_labels_that_no_case_has(tmp_path: Path) -> None:
    """nnU-Net #2517: structures not annotated in some cases are learnt as background."""
    folder = site(tmp_path / "a")
    rewrite(folder, labels={"background": 0, "tumour": 1, "cyst": 2, "stone": 3})
    (finding,) = check({"a": folder}).findings
    assert (finding.severity, finding.code) == ("warning", "absent_label")
    assert "cyst (2), stone (3)" in finding.text
    rewrite(folder, annotated=["tumour"])
    assert found(folder) == {}
    for i in range(6):
        write(folder, f"c{i}", label=np.zeros(SHAPE, np.uint8), seed=i)
    assert set(found(folder)) == {"no_foreground", "empty_label"}


def test_volumes_stored_along_other_axes(tmp_path: Path) -> None:
    """nnU-Net #850: axes in another order. Reading does not look at the direction."""
    folder = site(tmp_path / "a")
    mirrored = {"direction": (-1, 0, 0, 0, 1, 0, 0, 0, 1)}
    turned = {"direction": (0, 0, 1, 1, 0, 0, 0, 1, 0)}
    write(folder, "c0", place=mirrored, seed=50)
    write(folder, "c1", place=turned, seed=51)
    findings = check({"a": folder}).findings
    assert of(findings, "orientation") == [("warning", "a", "c0"), ("warning", "a", "c1")]
    assert "Stored RPS, most of this site's cases LPS: to the network it is mirrored along x." in findings[0].text
    assert "axes in another order" in findings[1].text
    other = site(tmp_path / "b", seed=1, prefix="b")
    for i in range(6):
        write(other, f"b{i}", place=mirrored, seed=60 + i)
    findings = check({"b": other, "a": folder}).findings
    assert of(findings, "sites_orientation") == [("warning", "a", None)]


def test_a_spacing_of_one_may_be_unknown(tmp_path: Path) -> None:
    """nnU-Net #2937, #1285. A note where all have it (resampled data do), a warning where some have."""
    folder = site(tmp_path / "a")
    write(folder, "c0", place={"spacing": (1, 1, 1)}, seed=50)
    assert of(check({"a": folder}).findings, "unit_spacing") == [("warning", "a", "c0")]
    for i in range(6):
        write(folder, f"c{i}", place={"spacing": (1, 1, 1)}, seed=i)
    assert of(check({"a": folder}).findings, "unit_spacing") == [("note", "a", None)]
    write(folder, "c0", place={"spacing": (1, 1, 2)}, seed=50)  # where most have it, they are not listed
    (finding,) = check({"a": folder}).findings
    assert (finding.severity, finding.code, finding.case) == ("warning", "unit_spacing", None)
    assert "5 of 6 cases" in finding.text
    assert "the others have not (c0)" in finding.text


def test_a_spacing_in_another_unit(tmp_path: Path) -> None:
    """nnU-Net #538, #2304: a wrong spacing gives nonsense."""
    folder = site(tmp_path / "a")
    write(folder, "c0", place={"spacing": (0.07, 0.08, 0.2)}, seed=50)
    (finding,) = check({"a": folder}).findings
    assert (finding.severity, finding.code, finding.case) == ("warning", "odd_spacing", "c0")
    assert "0.104 mm" in finding.text  # the cube root of 0.07 x 0.08 x 0.2


# ------------------------------------------------------------------------------------------------------- several sites


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channel_names": {"0": "CT"}}, "b has channels CT. Expected MRI, as in a."),
        (
            {"labels": {"background": 0, "lesion": 1}},
            "b has labels background, lesion. Expected background, tumour, as in a.",
        ),
    ],
)
def test_sites_that_disagree(tmp_path: Path, change: dict[str, dict[str, object]], words: str) -> None:
    a, b = site(tmp_path / "a"), site(tmp_path / "b", seed=1, prefix="b", **change)
    findings = check({"a": a, "b": b}).findings
    assert [(f.severity, f.code, f.site) for f in findings] == [("error", "sites_differ", "b")]
    assert findings[0].text == words
    assert "give the site a table of" in findings[0].fix


def test_what_a_study_re_maps_is_no_error(tmp_path: Path) -> None:
    """Ids are matched by name in a run, and names by the study's own tables."""
    labels = {"background": 0, "tumour": 1, "cyst": 2}
    a, b = site(tmp_path / "a", labels=labels), site(tmp_path / "b", seed=1, prefix="b")
    rewrite(b, labels={"background": 0, "tumour": 2, "cyst": 1})
    (finding,) = [f for f in check({"a": a, "b": b}).findings if f.code.startswith("sites")]
    assert (finding.severity, finding.code, finding.site) == ("note", "sites_renumbered", "b")
    assert "re-mapped by name" in finding.text
    rewrite(b, labels={"background": 0, "lesion": 1, "cyst": 2}, channel_names={"0": "T1"})
    assert check({"a": a, "b": b}).n("error") == 1
    names = {"b": Names({"lesion": "tumour"}, {"T1": "MRI"})}
    assert not [f for f in check({"a": a, "b": b}, names=names).findings if f.code.startswith("sites")]
    wrong = {"b": Names({"mass": "tumour"})}
    (finding,) = [f for f in check({"a": a, "b": b}, names=wrong).findings if f.severity == "error"]
    assert "'mass' is to be called 'tumour'" in finding.text


def test_the_names_of_a_study_are_known_to_the_command(tmp_path: Path) -> None:
    """An `ignore` label may be at some sites only, as in a run."""
    site(tmp_path / "a", labels={"background": 0, "tumour": 1, "ignore": 2})
    site(tmp_path / "b", seed=1, prefix="b")
    rewrite(tmp_path / "b", labels={"background": 0, "lesion": 1})
    study = tmp_path / "study.toml"
    study.write_text(
        '[study]\nname = "s"\n[sites.a]\ndata = "a"\n[sites.b]\ndata = "b"\nlabels = { lesion = "tumour" }\n'
        "[protocol]\nrounds = 1\nsteps = 1\n",
        encoding="utf-8",
    )
    data = data_sets([study])
    assert data.names == {"b": Names({"lesion": "tumour"})}
    assert not [f for f in check(data.sites, names=data.names).findings if f.code == "sites_differ"]


def test_a_site_whose_voxels_have_another_unit_or_none(tmp_path: Path) -> None:
    """Each is the same within itself, so that only the other site shows it."""
    a, b, c = (site(tmp_path / n, seed=i, prefix=n) for i, n in enumerate("abc"))
    for i in range(6):
        write(b, f"b{i}", place={"spacing": (0.07, 0.08, 0.2)}, seed=80 + i)
        for path in list(c.glob(f"*/c{i}*.nii.gz")):
            slices = np.repeat(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), 2, 0)
            tifffile.imwrite(str(path).replace(".nii.gz", ".tif"), slices)
            path.unlink()
    rewrite(c, file_ending=".tif")
    findings = check({"a": a, "b": b, "c": c}).findings
    assert of(findings, "sites_spacing") == [("warning", "b", None), ("warning", "c", None)]
    texts = [f.text for f in findings if f.code == "sites_spacing"]
    assert "edges of 0.104 mm" in texts[0]
    assert "at a 1.04 mm" in texts[0]
    assert "No case says its spacing, where those of a do" in texts[1]
    assert not of(check({"c": c}).findings, "sites_spacing")


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["hippocampus", "glioma3d"])
def test_real_federations_have_no_errors(federation: Callable[[str], Path], name: str) -> None:
    folders = sorted(p for p in federation(name).iterdir() if p.is_dir())
    sites = {p.name: p for p in folders if p.name != "test"}
    checked = check(sites, test=federation(name) / "test")
    assert not checked.n("error")
    assert {f.code for f in checked.findings} <= {"unit_spacing", "few_patients"}
    assert sum(checked.cases.values()) == {"hippocampus": 195, "glioma3d": 43}[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fetal_head", "glioma", "lungs", "nuclei", "polyps", "skin", "vessels"])
def test_real_pictures_have_no_errors(federation: Callable[[str], Path], name: str) -> None:
    folders = {p.name: p for p in sorted(federation(name).iterdir()) if p.is_dir()}
    checked = check({n: p for n, p in folders.items() if n != "test"}, test=folders["test"])
    assert not checked.n("error")
    assert {f.code for f in checked.findings} <= {"pixels", "few_patients", "empty_label", "sideways"}
    assert len([f for f in checked.findings if f.code == "sideways"]) <= 1


def test_one_case_of_one_channel_saved_differently(tmp_path: Path) -> None:
    """A file of 64-bit voxels beside others of 32 bits is no finding."""
    folder = site(tmp_path / "a")
    save(folder / "imagesTr/c0_0000.nii.gz", image().astype(np.float64))
    assert found(folder) == {}
