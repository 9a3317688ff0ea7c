"""`check` where sites hold different channels of the same patients: what is no fault there, and what is one only there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from concilium.data._check_types import Finding, Listing, count, some
from concilium.data.matching import Names
from concilium.messages import Holding

BETWEEN = {"sites_differ", "sites_renumbered", "patient_at_two_sites"}
"""Findings between data sets that are meant to differ, and to have the same patients."""
TWICE = "duplicate"
OF_LABELS = {
    "absent_label", "annotated_table", "case_count", "empty_label", "missing_label", "no_training_cases", "nothing_annotated",
    "patient_table", "few_patients", "unknown_label",
}  # fmt: skip
"""Findings about label maps, and about who is whose patient: of a site whose label maps are not read."""


def as_held(
    found: Sequence[Finding], listings: Sequence[Listing], holds: Mapping[str, Holding], names: Mapping[str, Names]
) -> list[Finding]:
    """The findings that are ones where each site holds what `holds` says, and those that are ones only there."""
    kept = [f for f in found if not _is_meant(f, holds)]
    return kept + _channels(listings, holds, names) + _together([x for x in listings if x.site in holds])


def _is_meant(finding: Finding, holds: Mapping[str, Holding]) -> bool:
    held = holds.get(finding.site)
    if finding.code in BETWEEN:
        return True
    if finding.code == TWICE and any(f" of {site}." in finding.text for site in holds):
        return True  # sites that read different channels of one folder
    if held is None or held.labelled:
        return False
    return finding.code in OF_LABELS or (finding.code == "no_data_set" and "labelsTr" in finding.text)


def _channels(listings: Sequence[Listing], holds: Mapping[str, Holding], names: Mapping[str, Names]) -> list[Finding]:
    """Channels that a data set lacks."""
    every = tuple(channel for held in holds.values() for channel in held.channels)
    found = []
    for listing in listings:
        if listing.about.channels is None:
            continue
        called = names.get(listing.site, Names()).channels
        own = [called.get(channel, channel) for channel in listing.about.channels]
        wanted = holds[listing.site].channels if listing.site in holds else every
        fix = "Correct holds in the site's table of the study, or channel_names in dataset.json."
        if lacking := [channel for channel in wanted if channel not in own]:
            text = f"It has channels {', '.join(own)}, not {', '.join(lacking)}, which it is said to hold."
            found.append(Finding("error", "sites_differ", listing.site, None, text, fix))
        if listing.site not in holds and (more := [channel for channel in own if channel not in every]):
            text = f"It has {', '.join(more)}, which no site holds. Expected {', '.join(every)}."
            found.append(Finding("error", "sites_differ", listing.site, None, text, fix))
    return found


def _together(listings: Sequence[Listing]) -> list[Finding]:
    """Cases that not all sites have, by the names of files."""
    names = {listing.site: {case.name for case in listing.cases if case.images} for listing in listings}
    common = set.intersection(*names.values()) if names else set()
    found = []
    for site, own in names.items():
        if not common:
            text = f"None of its {count(len(own), 'case')} is at all sites. Cases must be called the same at each."
            found.append(Finding("error", "not_everywhere", site, None, text, "Rename the files."))
        elif left := sorted(own - common):
            text = f"{count(len(left), 'case')} of {len(own)} are not at all sites ({some(left)}): not trained on."
            fix = "Nothing, if the others do not have them; or rename the files."
            found.append(Finding("note", "not_everywhere", site, None, text, fix))
    return found
