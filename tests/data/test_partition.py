"""One data set becomes sites: who gets whom, what is refused, and what lies in the folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from concilium.data._dealing import deal_by_dirichlet, deal_by_labels, deal_by_share, shuffled, stands_out
from concilium.data.dataset import open_dataset, read_case
from concilium.data.partition import Layout, Member, Partition, lay_out, materialise
from concilium.data.shifts import Shift
from concilium.errors import DataError, StudyError

LABELS = {"background": 0, "liver": 1, "kidney": 2}
Make = Callable[..., Path]


def write_set(folder: Path, cases: Mapping[str, Iterable[int]], **more: Any) -> Path:
    """Case -> ids in its label map, 2 x 2 voxels each. Images are 6 x 8 x 10 of noise."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i, (case, ids) in enumerate(cases.items()):
        image = np.random.default_rng(i).normal(100, 10, (6, 8, 10)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        for value in ids:
            label[2:4, 2:4, 2 * value] = value
        for array, path in ((image, f"imagesTr/{case}_0000.nii.gz"), (label, f"labelsTr/{case}.nii.gz")):
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / path))
    about = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": len(cases), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about | more))
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 cases of 10 patients: a0 ... a5 with a liver, b0 ... b5 with a kidney and every other one a liver; a0, a1 are one
    patient, and so are b0, b1."""
    cases = {f"a{i}": [1] for i in range(6)} | {f"b{i}": [1, 2] if i % 2 else [2] for i in range(6)}
    patients = {case: {"a1": "a0", "b1": "b0"}.get(case, case) for case in cases}
    return write_set(
        tmp_path_factory.mktemp("whole"), cases, patient=patients, site={c: c[0] for c in cases}, number={"a0": 1}
    )


def sites_of(layout: Layout) -> dict[str, list[str]]:
    return {name: sorted(part.cases) for name, part in layout.parts.items()}


def divided(folder: Path, members: Mapping[str, Member], seed: int = 1, **options: Any) -> dict[str, list[str]]:
    return sites_of(lay_out(Partition(folder, **options), members, Path("/nowhere"), seed=seed))


A, B = [f"a{i}" for i in range(6)], [f"b{i}" for i in range(6)]
TWO = {"x": Member(), "y": Member()}

# -------------------------------------------------------------------------------------------------------- by a value


def test_by_a_table_of_the_description(whole: Path) -> None:
    assert divided(whole, {"a": Member(), "b": Member()}, by="key", key="site") == {"a": A, "b": B}
    named = {"north": Member(values=("b", "c")), "south": Member(values=("a",))}
    assert divided(whole, named, by="key", key="site") == {"north": B, "south": A}


def test_by_a_part_of_the_name(whole: Path) -> None:
    assert divided(whole, {"a": Member(), "b": Member()}, by="key", pattern=r"^([ab])\d") == {"a": A, "b": B}


def test_values_may_be_held_out_and_the_rest_may_have_a_site(whole: Path) -> None:
    options = {"by": "key", "pattern": r"^(a|b[45])"}
    members = {"x": Member(values=("b4",)), "y": Member()}
    assert divided(whole, members, rest="y", test=("a",), **options) == {
        "x": ["b4"], "y": ["b0", "b1", "b2", "b3", "b5"], "test": A,
    }  # fmt: skip


def test_a_case_that_belongs_nowhere_is_told(whole: Path) -> None:
    with pytest.raises(DataError, match=r"by = 'key': 6 of 12 cases belong to no site \(b0: 'b', b1: 'b', .* rest = "):
        divided(whole, {"a": Member()}, by="key", key="site")
    with pytest.raises(DataError, match=r"10 of 12 cases belong to no site \(a2: no value, a3: no value"):
        divided(whole, {"one": Member(values=("1",))}, by="key", key="number", test=None)
    with pytest.raises(StudyError, match=r"key = 'scanner' is no table in .* There are: .*patient, site, number"):
        divided(whole, TWO, by="key", key="scanner")


def test_a_patient_is_never_divided(whole: Path) -> None:
    with pytest.raises(DataError, match=r"divides 2 patients \(a0: x, y, b0: x, y\)"):
        divided(whole, {"x": Member(values=("0",)), "y": Member()}, by="key", pattern=r"(\d)", rest="y")


def test_by_a_file(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "sites.csv"
    file.write_text("\ufeffsite,case,age\n" + "".join(f"{c[0]}, {c} ,3\n" for c in (*A, *B, "zz")), encoding="utf-8")
    partition = Partition(whole, by="csv", file=file)
    layout = lay_out(partition, {"a": Member(), "b": Member()}, tmp_path, seed=0)
    assert sites_of(layout) == {"a": A, "b": B}
    assert layout.notes == ("1 rows of sites.csv name no case of the data set (zz).",)
    for text in ("case,site\na0,\n", "case,site\na0,a\na0,b\n", "name,site\na0,a\n"):
        file.write_text(text)
        with pytest.raises(DataError, match="Expected a header with case and site, and one site for each case"):
            lay_out(partition, TWO, tmp_path, seed=0)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        lay_out(partition, TWO, tmp_path, seed=0)


# --------------------------------------------------------------------------------------------------------- by a number


@pytest.mark.parametrize("options", [{"by": "size"}, {"by": "dirichlet", "alpha": 0.5}])
@pytest.mark.parametrize("test", [None, 0.25])
def test_nobody_is_lost_and_no_patient_is_divided(whole: Path, options: dict[str, Any], test: float | None) -> None:
    found = divided(whole, TWO, test=test, **options)
    assert sorted(case for cases in found.values() for case in cases) == [*A, *B]
    assert list(found) == ["x", "y"] + ["test"] * (test is not None)
    assert all(found.values())
    for pair in (("a0", "a1"), ("b0", "b1")):
        assert len({name for name, cases in found.items() if set(pair) & set(cases)}) == 1
    assert found == divided(whole, TWO, test=test, **options)
    partition = Partition(whole, test=test, seed=1, **options)
    assert found == sites_of(lay_out(partition, TWO, Path("/nowhere"), seed=8))
    assert any(found != divided(whole, TWO, seed=s, test=test, **options) for s in range(2, 6))
    if test:
        names = open_patients(whole)
        assert len({names[c] for c in found["test"]}) == 2  # a quarter of ten, to the nearest even number


def open_patients(folder: Path) -> dict[str, str]:
    return json.loads((folder / "dataset.json").read_text())["patient"]


def test_the_order_of_patients_does_not_count_and_newcomers_do_not_mix_them() -> None:
    names = [f"p{i}" for i in range(50)]
    assert shuffled(reversed(names), 3) == shuffled(names, 3) != names
    assert [p for p in shuffled([*names, "new"], 3) if p != "new"] == shuffled(names, 3)


@pytest.mark.parametrize(
    ("shares", "n", "expected"),
    [
        ([1, 1, 1], 10, [4, 3, 3]),  # 3.33 each: the first is given what is left
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([5, 3, 2], 7, [4, 2, 1]),  # 3.5, 2.1, 1.4: what is left goes to .5
        ([1, 99], 30, [0, 30]),
    ],
)
def test_shares_are_rounded_so_that_they_add_up(shares: list[float], n: int, expected: list[int]) -> None:
    sites = dict(zip("xyz", shares, strict=False))
    dealt = deal_by_share([f"p{i}" for i in range(n)], sites, seed=0)
    assert [list(dealt.values()).count(s) for s in sites] == expected


def test_a_site_that_would_get_nobody_stops_the_study(whole: Path) -> None:
    with pytest.raises(StudyError, match=r"leaves no patient for x \(x 0, y 10\)"):
        divided(whole, {"x": Member(share=0.01), "y": Member(share=0.99)}, by="size")
    with pytest.raises(StudyError, match=r"leaves no patient for c \(a 5, b 5, c 0\)"):
        divided(whole, {n: Member() for n in "abc"}, by="key", key="site")


# ---------------------------------------------------------------------------------------------------------- by labels


def test_a_patient_belongs_to_the_label_that_stands_out() -> None:
    rows = {"p": [0.90, 0.08, 0.02], "q": [0.90, 0.02, 0.08], "r": [0.96, 0.02, 0.02], "s": None}
    assert stands_out(rows) == {"p": 1, "q": 2, "r": 0, "s": -1}
    assert stands_out({"p": [1.0, 0.0], "q": [1.0, 0.0]}) == {"p": 0, "q": 0}
    assert stands_out({}) == {}


def unevenness(alpha: float, seed: int) -> float:
    """Largest difference between two sites in the share of patients of one class."""
    rows = {f"p{i}": [0.0, float(i % 2), float(1 - i % 2)] for i in range(300)}
    dealt = deal_by_dirichlet(rows, ["x", "y", "z"], alpha=alpha, min_patients=5, seed=seed)
    assert sorted(dealt) == sorted(rows)
    of = {s: [int(p[1:]) % 2 for p, site in dealt.items() if site == s] for s in "xyz"}
    assert min(map(len, of.values())) >= 5
    shares = [sum(v) / len(v) for v in of.values()]
    return max(shares) - min(shares)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_alpha_makes_sites_differ_in_their_labels_and_a_large_one_does_not(seed: int) -> None:
    assert unevenness(1e6, seed) <= 0.01
    assert unevenness(0.1, seed) > 0.6


def test_dirichlet_proportions_have_the_variance_of_the_distribution() -> None:
    """Of a symmetric Dirichlet over two sites: Var = 1 / (4 (2 alpha + 1))."""
    rows = {f"p{i}": [1.0] for i in range(200)}
    shares = []
    for seed in range(400):
        dealt = deal_by_dirichlet(rows, ["x", "y"], alpha=2.0, min_patients=1, seed=seed)
        shares.append(list(dealt.values()).count("x") / 200)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.var(shares) == pytest.approx(1 / 20, rel=0.25)


def test_what_cannot_be_divided_so_is_told(whole: Path) -> None:
    with pytest.raises(StudyError, match=r"min_patients = 6 for 2 sites needs 12 patients\. There are 10\."):
        divided(whole, TWO, by="dirichlet", alpha=1.0, min_patients=6)
    with pytest.raises(
        StudyError, match=r"alpha = 0\.01 gave none of 1000 divisions in which each of 3 sites has 10 of 30"
    ):
        deal_by_dirichlet({f"p{i}": [1.0] for i in range(30)}, "xyz", alpha=0.01, min_patients=10, seed=0)


def test_everybody_goes_to_a_site_that_annotates_something_in_them() -> None:
    present = {"p": {"liver"}, "q": {"kidney"}, "r": {"liver", "kidney"}, "s": {"spleen"}, "t": None}
    dealt, nowhere = deal_by_labels(present, {"x": ["liver"], "y": ["kidney"]}, seed=0)
    assert (dealt["p"], dealt["q"], nowhere) == ("x", "y", ["s"])
    assert sorted(dealt) == ["p", "q", "r", "t"]
    assert {dealt["r"], dealt["t"]} == {"x", "y"}  # to the site with fewer
    many = {f"p{i}": {"liver", "kidney"} for i in range(40)} | {f"q{i}": {"liver"} for i in range(20)}
    dealt, _ = deal_by_labels(many, {"x": ["liver"], "y": ["kidney"]}, seed=0)
    assert list(dealt.values()).count("x") == 30
    assert dealt == deal_by_labels(dict(reversed(many.items())), {"x": ["liver"], "y": ["kidney"]}, seed=0)[0]


def test_label_maps_keep_what_their_site_annotates(whole: Path, tmp_path: Path) -> None:
    members = {"x": Member(annotated=("liver",)), "y": Member(annotated=("kidney",))}
    layout = lay_out(Partition(whole, by="labels", test=0.2), members, tmp_path, seed=1)
    assert layout.notes == ("Labels that a site does not annotate are background in its label maps: x, y.",)
    folders = materialise(layout, tmp_path, seed=1)
    source = {c.name: c for c in open_dataset(whole).cases}
    for site, ids in (("x", [1]), ("y", [2]), ("test", [1, 2])):
        dataset = open_dataset(folders[site])
        assert dataset.labels == LABELS
        for case in dataset.cases:
            label, original = (read_case(c, dataset)[1] for c in (case, source[case.name]))
            assert label is not None
            assert original is not None
            np.testing.assert_array_equal(label, np.where(np.isin(original, ids), original, 0))
            assert site == "test" or label.any()
            changed = not np.array_equal(label, original)
            assert (case.label.stat().st_ino != source[case.name].label.stat().st_ino) == changed  # type: ignore[union-attr]


def test_labels_that_nobody_annotates_need_a_site(whole: Path) -> None:
    members = {"x": Member(annotated=("kidney",)), "y": Member(annotated=("kidney",))}
    with pytest.raises(
        DataError, match=r"in 5 of 10 patients no label occurs that a site annotates \(a0, a2, a3, a4, a5\)"
    ):
        divided(whole, members, by="labels")
    assert set(A) <= set(divided(whole, members, by="labels", rest="y")["y"])
    with pytest.raises(StudyError, match=r"annotated = \['spleen'\] names spleen\. dataset.json has: liver, kidney"):
        divided(whole, {"x": Member(annotated=("spleen",))}, by="labels")


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_holds_links_and_a_description_of_its_own(whole: Path, tmp_path: Path) -> None:
    layout = lay_out(Partition(whole, by="key", key="site"), {"a": Member(), "b": Member()}, tmp_path, seed=0)
    folders = materialise(layout, tmp_path, seed=0)
    assert layout.summary == "a 6 cases of 5 patients, b 6 cases of 5 patients"
    dataset = open_dataset(folders["b"])
    assert [c.name for c in dataset.cases] == B
    assert [c.patient for c in dataset.cases] == ["b0", "b0", "b2", "b3", "b4", "b5"]
    for file in ("imagesTr/b3_0000.nii.gz", "labelsTr/b3.nii.gz"):
        assert (folders["b"] / file).samefile(whole / file)
    about = json.loads((folders["b"] / "dataset.json").read_text())
    assert about["numTraining"] == 6
    assert sorted(about["patient"]) == B
    rows = (tmp_path / "partition.csv").read_text().splitlines()
    assert rows[:3] == ["case,patient,site", "a0,a0,a", "a1,a0,a"]
    assert len(rows) == 13


def test_a_run_that_goes_on_finds_the_same(whole: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    cases = {f"c{i}": [1 + i % 2] for i in range(8)}
    write_set(data, cases)
    run.mkdir()
    partition = Partition(data, by="dirichlet", alpha=1.0)

    def again() -> dict[str, Path]:
        return materialise(lay_out(partition, TWO, run, seed=1), run, seed=1)

    made = again()
    before = {p: p.stat().st_mtime_ns for p in (run / "partition").rglob("*")}
    remembered = json.loads((run / "partition" / "labels.json").read_text())
    assert remembered["c1"]["voxels"] == {"background": 476, "liver": 0, "kidney": 4}
    assert again() == made
    assert {p: p.stat().st_mtime_ns for p in (run / "partition").rglob("*")} == before
    for path in (data / "imagesTr" / "c3_0000.nii.gz", data / "labelsTr" / "c3.nii.gz"):
        path.unlink()
    with pytest.raises(DataError, match=r"partition.csv would change: the data set that is divided is not what it was"):
        again()


def test_counts_are_remembered_until_a_label_map_changes(whole: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data", {f"c{i}": [1] for i in range(4)})
    (tmp_path / "partition").mkdir()
    partition = Partition(tmp_path / "data", by="dirichlet", alpha=1.0)
    counts = lay_out(partition, TWO, tmp_path, seed=1).counts
    assert counts is not None
    (tmp_path / "partition" / "labels.json").write_text(counts.replace('"liver": 4', '"liver": 5'))
    assert '"liver": 5' in (lay_out(partition, TWO, tmp_path, seed=1).counts or "")
    path = tmp_path / "data" / "labelsTr" / "c2.nii.gz"
    path.write_bytes((tmp_path / "data" / "labelsTr" / "c3.nii.gz").read_bytes())
    again = json.loads(lay_out(partition, TWO, tmp_path, seed=1).counts or "")
    assert [again[f"c{i}"]["voxels"]["liver"] for i in range(4)] == [5, 5, 4, 5]


def test_a_bad_case_goes_to_its_site_as_it_is(tmp_path: Path) -> None:
    data = write_set(tmp_path / "data", {f"c{i}": [1, 2] for i in range(6)})
    (data / "labelsTr" / "c0.nii.gz").unlink()
    (data / "imagesTr" / "c1_0000.nii.gz").write_bytes(b"no image")
    cut = data / "imagesTr" / "c2_0000.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-200])
    (data / "labelsTr" / "c3.nii.gz").write_bytes(b"no label map")
    for by in ("size", "dirichlet", "labels"):
        members = {
            n: Member(shift=Shift(gamma=2.0), annotated=("liver",) if by == "labels" else None) for n in ("x", "y")
        }
        partition = Partition(data, by=by, alpha=1.0 if by == "dirichlet" else None)  # type: ignore[arg-type]
        run = tmp_path / by
        run.mkdir()
        folders = materialise(lay_out(partition, members, run, seed=0), run, seed=0)
        datasets = [open_dataset(folder) for folder in folders.values()]
        cases = {case.name: (case, dataset) for dataset in datasets for case in dataset.cases}
        assert sorted(cases) == ["c1", "c2", "c3", "c4", "c5"]
        assert [m for d in datasets for m in d.missing] == [("c0", "missing_label")]
        for name in ("c1", "c2", "c3"):
            with pytest.raises(DataError) as e:
                read_case(*cases[name])
            assert e.value.code == "unreadable"


def test_a_shift_is_that_of_its_site_and_case(whole: Path, tmp_path: Path) -> None:
    members = {"a": Member(), "b": Member(shift=Shift(noise=0.5)), "test": Member(data=whole, shift=Shift(gamma=2.0))}
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        layout = lay_out(Partition(whole, by="key", key="site"), members, tmp_path / name, seed=0)
        runs.append(materialise(layout, tmp_path / name, seed=0))
    for site, shifted in (("a", False), ("b", True), ("test", True)):
        for file in sorted((runs[0][site] / "imagesTr").iterdir()):
            original = whole / "imagesTr" / file.name
            assert file.samefile(original) != shifted
            assert file.read_bytes() == (runs[1][site] / "imagesTr" / file.name).read_bytes()
            assert (runs[0][site] / "labelsTr" / file.name.replace("_0000", "")).samefile(
                whole / "labelsTr" / file.name.replace("_0000", "")
            )
    assert "test" not in (tmp_path / "one" / "partition.csv").read_text()


def test_a_site_with_data_of_its_own_can_be_shifted_too(whole: Path, tmp_path: Path) -> None:
    layout = lay_out(None, {"x": Member(data=whole, shift=Shift(blur=1.0)), "y": Member(data=whole)}, tmp_path, seed=0)
    assert list(materialise(layout, tmp_path, seed=0)) == ["x"]
    assert not (tmp_path / "partition.csv").exists()
    assert not lay_out(None, {"y": Member(data=whole)}, tmp_path, seed=0).parts


# ----------------------------------------------------------------------------------------------------------- real data


def test_the_figures_of_the_documents(federation: Callable[[str], Path], tmp_path: Path) -> None:
    """Share of the anterior part in the foreground, at three sites, as `docs/partition.md` tells it."""
    folder = federation("hippocampus")
    about: dict[str, Any] = {}
    for name in ("north", "south", "west"):
        about = json.loads((folder / name / "dataset.json").read_text()) | {"patient": {}}
        for kind in ("imagesTr", "labelsTr"):
            (tmp_path / kind).mkdir(exist_ok=True)
            for file in (folder / name / kind).iterdir():
                (tmp_path / kind / file.name).symlink_to(file)
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    found = {}
    for alpha in (1000.0, 0.1):
        partition = Partition(tmp_path, by="dirichlet", alpha=alpha, min_patients=5)
        layout = lay_out(partition, {n: Member() for n in "xyz"}, tmp_path / "run", seed=1)
        voxels = {case: entry["voxels"] for case, entry in json.loads(layout.counts or "").items()}
        sums = [
            [sum(voxels[case][name] for case in part.cases) for name in ("anterior", "posterior")]
            for part in layout.parts.values()
        ]
        found[alpha] = sorted(round(100 * a / (a + p)) for a, p in sums)
    assert found == {1000.0: [52, 52, 53], 0.1: [48, 52, 56]}
