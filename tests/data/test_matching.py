"""Sites that number their labels or order their channels otherwise are matched by name, or refused with both lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from concilium.answers.statistics import _agreed
from concilium.data.dataset import content_key, open_dataset, read_case, translated
from concilium.data.fingerprint import fingerprint_of_case
from concilium.data.matching import CHANNEL_NOTE, ID_NOTE, Names, Space, agree, renamed, reorder, translate
from concilium.errors import ContractError, DataError
from concilium.messages import Labels, PlugIn, Prepare, Training

STUDY = Space(("T1", "T2"), {"background": 0, "anterior": 1, "posterior": 2})


def space(channels: str = "T1 T2", /, **labels: int | tuple[int, ...]) -> Space:
    return Space(tuple(channels.split()), {"background": 0, **labels} if labels else STUDY.labels)


def test_what_is_the_same_is_left_alone() -> None:
    how = translate(STUDY, STUDY, where="south")
    assert (how.notes, how.channels, how.ids) == ((), (0, 1), {0: 0, 1: 1, 2: 2})


def test_ids_and_channels_are_matched_by_name() -> None:
    how = translate(space("T2 T1", posterior=1, anterior=2), STUDY, where="south")
    assert how.ids == {0: 0, 1: 2, 2: 1}
    assert how.channels == (1, 0)
    assert how.notes == (ID_NOTE, CHANNEL_NOTE)


def test_regions_are_matched_by_the_names_that_hold_an_id() -> None:
    """Edema, core, enhancing are 2, 1, 3 here and 1, 2, 3 there; none of these has a name of its own."""
    here = space(whole=(2, 1, 3), core=(1, 3), enhancing=3)
    there = space(whole=(1, 2, 3), core=(2, 3), enhancing=3)
    assert translate(here, there, where="south").ids == {0: 0, 1: 2, 2: 1, 3: 3}
    finer = space(whole=(1, 2, 3, 4), core=(3, 4), enhancing=4)  # 1 and 2 are both nothing but `whole`
    assert translate(finer, there, where="south").ids == {0: 0, 1: 1, 2: 1, 3: 2, 4: 3}
    assert translate(there, finer, where="south").ids == {0: 0, 1: 1, 2: 3, 3: 4}
    with pytest.raises(
        DataError, match=r"south has an id \(1\) that is core at once|has an id \(3\) that is core at once"
    ):
        translate(space(whole=(1, 2), core=(2, 3), enhancing=2), there, where="south")


def test_some_sites_know_all_their_voxels() -> None:
    partly: Labels = {**STUDY.labels, "ignore": 3}
    agreed, how = agree({"north": STUDY, "south": replace(STUDY, labels=partly)})
    assert agreed.labels == partly
    assert how["north"].ids == {0: 0, 1: 1, 2: 2}
    assert how["south"].ids == {0: 0, 1: 1, 2: 2, 3: 3}
    again, how = agree(
        {"south": Space(STUDY.channels, {"background": 0, "posterior": 1, "anterior": 2, "ignore": 3}), "north": STUDY}
    )
    assert again.labels["anterior"] == 2
    assert how["north"].ids == {0: 0, 1: 2, 2: 1}


def test_the_first_site_decides() -> None:
    other = space("T2 T1", posterior=1, anterior=2)
    assert agree({"north": STUDY, "south": other})[0] == STUDY
    assert agree({"south": other, "north": STUDY})[0] == other


@pytest.mark.parametrize(
    ("south", "words"),
    [
        (space(ant=1, posterior=2), r'south has labels background, ant, posterior. Expected background, anterior, posterior, as '
         r'in north. Perhaps labels = \{ "ant" = "anterior" \} in the site'),
        (space(Posterior=1, ANTERIOR=2), r'"Posterior" = "posterior", "ANTERIOR" = "anterior"'),
        (space(anterior=1), r"south lacks posterior. If nobody looked for it there, list what was looked for"),
        (space(anterior=1, posterior=2, tumour=3), r"north lacks tumour. If nobody looked for it there"),
        (space("T1 FLAIR"), r'south has channels T1, FLAIR. Expected T1, T2.*channels = \{ "FLAIR" = "T2" \}'),
        (space("T1"), r"south has channels T1\. Expected T1, T2"),
        (space("T1 T1"), r"south has channels T1, T1\. Expected T1, T2"),
        (space(anterior=1, posterior=3), r"Number the labels"),
        (space(anterior=-1, posterior=2), r"Number the labels"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_said_with_both_lists(south: Space, words: str) -> None:
    with pytest.raises(DataError, match=words):
        agree({"north": STUDY, "south": south})


def test_channels_of_one_name_cannot_be_told_apart() -> None:
    twice = Space(("MR", "MR", "CT"), STUDY.labels)
    assert translate(twice, twice, where="south").notes == ()
    with pytest.raises(DataError, match="MR, CT, MR"):
        translate(replace(twice, channels=("MR", "CT", "MR")), twice, where="south")


def test_a_site_has_its_own_words() -> None:
    own = space("T1w T2", ant=2, posterior=1)
    assert renamed(own, Names({"ant": "anterior"}, {"T1w": "T1"}), "south") == space(anterior=2, posterior=1)
    for table, words in (({"front": "anterior"}, "has labels background, ant, posterior"), ({"ant": "posterior"}, "the same"),
                         ({"background": "anterior"}, "'background' is to be called")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            renamed(own, Names(table), "south")


def test_channels_of_a_fingerprint_are_put_in_order() -> None:
    image = np.stack([np.full((2, 2, 2), 5.0), np.full((2, 2, 2), 9.0)]).astype(np.float32)
    told = fingerprint_of_case(image, np.ones((1, 2, 2, 2)), (1, 1, 1), exact_geometry=True)
    how = translate(space("T2 T1"), STUDY, where="south")
    assert [c.minimum for c in reorder(told, how).channels] == [9.0, 5.0]
    with pytest.raises(ContractError, match="1 channels, its site named 2"):
        reorder(replace(told, channels=told.channels[:1]), how)


def test_files_are_re_mapped_as_they_are_read(volumes: Path, write_site: Callable[..., Path], tmp_path: Path) -> None:
    image, label = (
        np.stack([np.full((4, 5, 6), 3.0), np.full((4, 5, 6), 8.0)]).astype(np.float32),
        np.zeros((4, 5, 6), np.uint8),
    )
    label[1], label[2] = 1, 2
    site = write_site(
        tmp_path / "site", {"a": (image, label)}, channels=("T2", "T1"), labels={"background": 0, "posterior": 1, "anterior": 2}
    )  # fmt: skip
    own = open_dataset(site)
    same, other = translated(own, own.space), translated(own, STUDY)
    case = own.cases[0]
    assert other.space == STUDY
    read, mapped, _ = read_case(case, other)
    assert mapped is not None
    assert [float(channel.mean()) for channel in read] == [8.0, 3.0]
    assert [int(s.max()) for s in mapped[0]] == [0, 2, 1, 0]
    assert content_key(case, own) == content_key(case, same) != content_key(case, other)
    about = json.loads((site / "dataset.json").read_text())
    (site / "dataset.json").write_text(json.dumps(about | {"labels": dict(STUDY.labels)}))
    assert content_key(case, translated(open_dataset(site), STUDY)) != content_key(case, other)
    (site / "dataset.json").write_text(json.dumps(about))
    label[3] = 3
    sitk.WriteImage(sitk.GetImageFromArray(label), str(site / "labelsTr" / "a.nii.gz"))
    with pytest.raises(DataError, match=r"holds 3\. dataset.json knows background = 0, posterior = 1, anterior = 2"):
        read_case(case, other)


def test_an_id_that_only_others_ignore_is_unknown_here(write_site: Callable[..., Path], tmp_path: Path) -> None:
    image, label = np.ones((1, 4, 5, 6), np.float32), np.zeros((4, 5, 6), np.uint8)
    label[1], label[2] = 1, 2
    site = write_site(tmp_path / "site", {"a": (image, label)}, labels={"background": 0, "tumour": 1})
    study = Space(("MRI",), {"background": 0, "tumour": 1, "ignore": 2})
    with pytest.raises(DataError, match="holds 2"):
        read_case(open_dataset(site).cases[0], translated(open_dataset(site), study))
    about = json.loads((site / "dataset.json").read_text()) | {"labels": dict(study.labels)}
    (site / "dataset.json").write_text(json.dumps(about))
    _, read, _ = read_case(open_dataset(site).cases[0], translated(open_dataset(site), study))
    assert read is not None
    assert set(np.unique(read)) == {0, 1, 2}


@pytest.mark.parametrize(
    "labels", [{"tumour": 1}, {"background": 0, "tumour": -1}, {"background": 0, "tumour": (1, 10**9)}]
)
def test_labels_of_a_server_that_cannot_be_are_refused(labels: Labels) -> None:
    training = Training("sgd", 0.01, 0, 0, "float32", 0.3, True, "none", 1, True, 0, PlugIn("dice_ce"), PlugIn("plain"))
    request = Prepare("", "3d_fullres", PlugIn("unet"), training, 5, 0, 1, 0.1, ("MRI",), labels)
    with pytest.raises(ContractError, match="The server tells labels"):
        _agreed(request)
