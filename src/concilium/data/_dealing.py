"""Who gets which patient: pure functions from patients to sites. None depends on the order in which patients are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from concilium.data.draws import digest
from concilium.errors import StudyError

Frequencies: TypeAlias = Mapping[str, Sequence[float] | None]
"""Patient -> share of voxels of each label; `None` where no label map can be read."""

_DRAWS = 1000


def shuffled(patients: Iterable[str], *key: str | int) -> list[str]:
    """The patients in an order that is drawn from the key; adding one does not move the others past each other."""
    return sorted(patients, key=lambda patient: (digest(*key, patient), patient))


def held_out(patients: Sequence[str], share: float, *, seed: int) -> set[str]:
    """This share of the patients, and at least one of them."""
    n = max(1, round(share * len(patients)))
    return set(shuffled(patients, seed, "partition", "test")[:n])


def deal_by_share(patients: Sequence[str], shares: Mapping[str, float], *, seed: int) -> dict[str, str]:
    """Patient -> site, so many of them as its share says, to the nearest whole patient."""
    counts = _whole(len(patients), list(shares.values()))
    dealt = np.repeat(list(shares), counts)
    return dict(zip(shuffled(patients, seed, "partition"), map(str, dealt), strict=True))


def deal_by_dirichlet(
    frequencies: Frequencies, sites: Sequence[str], *, alpha: float, min_patients: int, seed: int
) -> dict[str, str]:
    """Patient -> site, with label shift and sites of different size; the smaller `alpha`, the more.

    A patient belongs to the label, background included, whose frequency in it stands out most: (frequency - mean) / standard
    deviation over patients. The patients of each such class are divided by proportions from a symmetric Dirichlet distribution
    over sites (Yurochkin et al. 2019, arXiv:1905.12022; the role of `alpha` as in Hsu et al. 2019, arXiv:1909.06335).
    Divisions are drawn until every site has `min_patients` (as Li et al. 2022, arXiv:2102.02079, do).

    Raises:
        StudyError: there are too few patients, or no such division is found.
    """
    classes = stands_out(frequencies)
    n = len(classes)
    if n < min_patients * len(sites):
        raise StudyError(
            f"[partition] min_patients = {min_patients} for {len(sites)} sites needs {min_patients * len(sites)} patients. "
            f"There are {n}. Lower it, or make fewer sites."
        )
    groups = [
        shuffled([p for p, c in classes.items() if c == group], seed, "partition")
        for group in sorted(set(classes.values()))
    ]
    for attempt in range(_DRAWS):
        number = digest(seed, "partition", "dirichlet", attempt)
        generator = np.random.RandomState([number & 0xFFFFFFFF, number >> 32])
        drawn = generator.dirichlet([alpha] * len(sites), size=len(groups))
        if not np.isfinite(drawn).all():  # a tiny alpha may underflow in all sites at once
            continue
        counts = np.array([_whole(len(group), list(row)) for group, row in zip(groups, drawn, strict=True)])
        if counts.sum(axis=0).min() >= min_patients:
            return {
                patient: str(site)
                for group, row in zip(groups, counts, strict=True)
                for patient, site in zip(group, np.repeat(sites, row), strict=True)
            }
    raise StudyError(
        f"[partition] alpha = {alpha:g} gave none of {_DRAWS} divisions in which each of {len(sites)} sites has "
        f"{min_patients} of {n} patients. Allowed are larger alpha or smaller min_patients. Change one of them."
    )


def stands_out(frequencies: Frequencies) -> dict[str, int]:
    """Patient -> number of the label that stands out most in it; -1 where no label map can be read."""
    known = {patient: row for patient, row in sorted(frequencies.items()) if row is not None}
    classes = dict.fromkeys(frequencies, -1)
    if known:
        table = np.array(list(known.values()), np.float64)
        deviation = table.std(axis=0)
        scores = (table - table.mean(axis=0)) / np.where(deviation > 0, deviation, np.inf)
        classes |= dict(zip(known, map(int, scores.argmax(axis=1)), strict=True))
    return classes


def deal_by_labels(
    present: Mapping[str, set[str] | None], annotated: Mapping[str, Sequence[str]], *, seed: int
) -> tuple[dict[str, str], list[str]]:
    """Patient -> site that annotates a label which occurs in the patient; and the patients for whom there is none.

    Who has least choice is dealt first, always to the site with the fewest patients; `None` (no label map can be read) may go
    anywhere.
    """
    choices = {
        patient: [s for s, names in annotated.items() if labels is None or labels & set(names)]
        for patient, labels in present.items()
    }
    load = dict.fromkeys(annotated, 0)
    dealt: dict[str, str] = {}
    for patient in sorted(shuffled(choices, seed, "partition"), key=lambda p: len(choices[p])):
        if choices[patient]:
            site = min(choices[patient], key=load.__getitem__)
            load[site] += 1
            dealt[patient] = site
    return dealt, sorted(p for p in choices if p not in dealt)


def _whole(n: int, shares: Sequence[float]) -> NDArray[np.int64]:
    """`n` divided by these shares into whole numbers that add up to it: the largest remainders are rounded up."""
    exact = n * np.array(shares, np.float64) / sum(shares)
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: n - int(counts.sum())]] += 1
    return counts
