"""A vertical party's own audit, before anything is sent: its front as the first round has it, on its own cases alone.

The front is untrained: it learns by gradients of a loss that needs the other parties' maps and the labels, and nothing here has
these. So the study is run with this party alone, for one step whose outcome nobody looks at, and what is attacked are the maps
that the party would send in the first round. Where it has no labels, every voxel counts as labelled: intensities are then those
of whole images, as in the study.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from concilium.data.dataset import Dataset, open_dataset, read_case, reader, restricted
from concilium.data.joined import write_joined
from concilium.data.matching import Names
from concilium.deployment.kits import SiteSettings
from concilium.errors import StudyError
from concilium.leakage import ANYTHING, Asked
from concilium.messages import Json, PlugIn
from concilium.study import SiteTable, Study, fronts_stay
from concilium.study._parties import parted


def party_of(study: Study, data: Path, names: Names) -> str:
    """The site of the study whose channels these data have.

    Raises:
        StudyError: none is, or several are.
        DataError: the data set cannot be used.
    """
    there = open_dataset(data, names, labelled=False).channels
    found = [name for name, site in study.sites.items() if site.holds and set(site.holds) <= set(there)]
    if len(found) != 1:
        held = "; ".join(f"{name}: {', '.join(site.holds or ()) or 'none'}" for name, site in study.sites.items())
        raise StudyError(
            f"{data} has the channels {', '.join(there)}, which are those of {', '.join(found) or 'no site'} in the study "
            f"({held}). Expected those of one site: one that holds no channel sends no maps. Correct channel_names in site.toml."
        )
    return found[0]


def party_alone(study: Study, site: SiteSettings, folder: Path) -> Study:
    """The study with this party as its only site, on copies of its cases (links, where the disk knows them) in `folder`.

    Raises:
        StudyError: `party_of` raises it, or `site.toml` names no test set.
        DataError: the data set cannot be used.
    """
    names = Names(site.label_names or {}, site.channel_names or {}, site.annotated)
    name = party_of(study, site.data, names)
    if site.test is None:
        raise StudyError(
            f"The site.toml of {name} names no test set, whose cases an attacker could have. An attack needs cases of its own, "
            f"with the channels {', '.join(study.sites[name].holds or ())}, and no label maps. Name a folder: test = 'PATH'."
        )
    held, p = study.sites[name].holds or (), study.protocol
    labelled = name == p.options["labels"]
    data = [
        _own_cases(source, names, held, folder / part, labelled=labelled)
        for source, part in ((site.data, "data"), (site.test, "test"))
    ]
    alone = {
        "labels": name,
        "parties": (),
        "fronts": "sent",  # a run of one owner, with a test set; whose front stays says `party_asked`
        "drop": 0.0,
        "patches": "uniform",
        "new_patients": False,
        "incomplete": False,
    }
    made = study.network.options
    one = replace(
        study,
        sites={name: SiteTable(data=data[0], holds=held, micro_batch=site.micro_batch)},
        test=SiteTable(data=data[1]),
        network=PlugIn(str(made["of"]), cast(Mapping[str, Json], made["options"])),
        protocol=replace(p, rounds=1, steps=1, epochs=None, compare=(), min_sites=1, options={**p.options, **alone}),
        partition=None,
        variants={},
    )
    return replace(one, network=parted(one))


def party_asked(study: Study, asked: Asked, *, compare: bool) -> Asked:
    """What an audit of one party's untrained front is to do.

    Raises:
        StudyError: something was asked for that it cannot tell.
    """
    given = {
        "--auxiliary": asked.auxiliary,
        "--round": asked.rounds,
        "--cut": asked.cuts,
        "--predicting": asked.predicting,
        "--model": asked.model,
        "--compare": compare,
    }
    if wrong := [name for name, value in given.items() if value]:
        raise StudyError(
            f"{', '.join(wrong)} was asked for. A party alone has its front as it is before the first round, at the study's cut, "
            "and the test set of site.toml. Allowed: --attack, --option, --victims, --own, --gallery. Leave out the rest."
        )
    return replace(asked, untrained=True, hidden=fronts_stay(study))


def _own_cases(source: Path, names: Names, held: Sequence[str], folder: Path, *, labelled: bool) -> Path:
    """A raw folder with these channels only; without labels every voxel has one."""
    dataset = restricted(open_dataset(source, names, labelled=labelled), held)
    if not labelled:
        dataset = replace(dataset, labels={"background": 0, ANYTHING: 1})
    shutil.rmtree(folder, ignore_errors=True)
    write_joined(folder, {"own": (dataset, True)}, labels="own", cases=[case.name for case in dataset.cases])
    if not labelled:
        _label_all(dataset, folder / "labelsTr")
    return folder


def _label_all(dataset: Dataset, folder: Path) -> None:
    folder.mkdir(parents=True)
    for case in dataset.cases:
        image, _, properties = read_case(case, dataset)
        path = folder / f"{case.name}{dataset.file_ending}"
        reader(dataset.file_ending)().write_seg(np.ones(image.shape[1:], np.uint8), str(path), properties)
