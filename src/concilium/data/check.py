"""Everything that is wrong with the sites' data sets, in plain words, before anything runs.

It runs where the data lie and sends nothing. Within a site, between a site and the test set, and between the sites of a
simulation the same image is found by its voxels. Across hospitals duplicates are not looked for: a digest of an image that
leaves a hospital tells whoever has that image that the patient was there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from concilium.data._check_case import check_case
from concilium.data._check_files import list_files
from concilium.data._check_held import as_held
from concilium.data._check_parts import into_parts
from concilium.data._check_site import check_site
from concilium.data._check_sites import check_together
from concilium.data._check_types import Finding, Listing, Seen, Severity
from concilium.data.matching import Names
from concilium.data.mend import Change
from concilium.data.partition import Layout
from concilium.messages import Holding

__all__ = ["Checked", "Finding", "check"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Checked:
    """What was looked at, and everything that was found, the gravest first. `cases`: data set -> number of cases."""

    cases: Mapping[str, int]
    findings: tuple[Finding, ...]
    changes: tuple[Change, ...] = ()
    """What is mended in copies, if any were asked for."""

    def n(self, severity: Severity) -> int:
        """How many findings are of this severity."""
        return sum(f.severity == severity for f in self.findings)


def check(
    sites: Mapping[str, Path],
    *,
    test: Path | None = None,
    folds: int = 5,
    names: Mapping[str, Names] | None = None,
    divide: Callable[[], Layout] | None = None,
    holds: Mapping[str, Holding] | None = None,
    watch: Callable[[int, int, str], None] = lambda done, total, case: None,
) -> Checked:
    """All findings in the nnU-Net raw folders of these sites and of a held-out `test` set, whatever state they are in.

    Cases are read one after the other, one file in memory at a time; `watch` is told the number done, of how many, and the case.
    `names`: what a data set calls otherwise than the study. `divide`: how a study divides the one of `sites` into its sites.
    `holds`: what each site contributes, where they have different channels of the same patients.
    Nothing is changed and nothing raised: a file that cannot be read is a finding.
    """
    members = {**sites, **({} if test is None else {"test": test})}
    listings = [list_files(name, folder) for name, folder in members.items()]
    total, done = sum(len(x.cases) for x in listings), 0
    found: list[Finding] = []
    data_sets: list[tuple[Listing, list[Seen]]] = []
    for listing in listings:
        seen: list[Seen] = []
        own = list(listing.findings)
        for files in listing.cases:
            watch(done, total, f"{listing.site}: {files.name}")
            one, wrong = check_case(listing.site, files, listing.about, _ending(listing))
            seen.append(one)
            own += wrong
            done += 1
        parts = [(listing, seen)]
        if divide is not None and listing.site in sites:
            parts, own = into_parts(listing, seen, own, divide)
        data_sets += parts
        found += own
    watch(done, total, "")
    held_out = None if test is None and divide is None else "test"
    found += _beside_each_other(data_sets, held_out, folds, names or {})
    if holds:
        found = as_held(found, listings, holds, names or {})
    order = {name: i for i, name in enumerate(dict.fromkeys([*sites, *(x.site for x, _ in data_sets)]))}
    found.sort(key=lambda f: (order[f.site], SEVERITIES.index(f.severity), f.code))
    return Checked({x.site: len(x.cases) for x, _ in data_sets}, tuple(found))


def _beside_each_other(
    data_sets: Sequence[tuple[Listing, list[Seen]]], test: str | None, folds: int, names: Mapping[str, Names]
) -> list[Finding]:
    """What shows only when a data set, or several, have been read; `test` is the name of the held-out one."""
    found = [f for x, seen in data_sets for f in check_site(x, seen, folds=folds, test=x.site == test)]
    listings, everyone = [x for x, _ in data_sets], [s for _, seen in data_sets for s in seen]
    return found + check_together(listings, everyone, test=test, names=names)


def _ending(listing: Listing) -> str:
    """That of the data set's files, which dataset.json may not say."""
    if listing.about.ending:
        return listing.about.ending
    case = listing.cases[0]
    path = next(iter([*case.images.values(), *([case.label] if case.label else [])]))
    return ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
