"""How the channels and label ids of one site become those of the study: by name, as its files are read."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from concilium.data.labels import BACKGROUND, IGNORE, all_ids, flaw, foreground, ids_of
from concilium.errors import ContractError, DataError
from concilium.messages import Fingerprint, Labels


@dataclass(frozen=True)
class Names:
    """What a site calls otherwise than the study: its own name -> the study's."""

    labels: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, str] = field(default_factory=dict)
    annotated: tuple[str, ...] | None = None
    """The labels that were looked for in its cases, in the study's words, in place of the list in its dataset.json.

    What a table there says of single cases is not widened."""


@dataclass(frozen=True)
class Space:
    """The channels of an image, in order, and the labels of its label map."""

    channels: tuple[str, ...]
    labels: Labels
    annotated: tuple[str, ...] | None = None
    """The labels that were looked for in some case; `None`: all. A site need not know the others."""


@dataclass(frozen=True)
class Translation:
    """How what lies in a site's files becomes what the study means."""

    channels: tuple[int, ...]
    """For each channel of the study: its place in the site's files."""
    ids: Mapping[int, int]
    """The site's id -> the study's."""
    own: Labels
    """The site's labels, with its own ids."""

    @property
    def moves_ids(self) -> bool:
        """Whether any id changes."""
        return any(own != study for own, study in self.ids.items())

    @property
    def moves_channels(self) -> bool:
        """Whether the order of the channels changes."""
        return list(self.channels) != sorted(self.channels)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report must say of it: sentences without names."""
        return (ID_NOTE,) * self.moves_ids + (CHANNEL_NOTE,) * self.moves_channels


ID_NOTE = "Label ids differ from the study's: re-mapped by name."
CHANNEL_NOTE = "The order of the channels differs from the study's: re-ordered by name."


def renamed(space: Space, names: Names, where: str) -> Space:
    """The space in the study's words.

    Raises:
        DataError: a name is not there, or two would be called the same (`sites_differ`).
    """
    labels, channels = list(space.labels), list(space.channels)
    for kind, known, table in (("labels", labels, names.labels), ("channels", channels, names.channels)):
        for own, new in table.items():
            if own not in known or own in (BACKGROUND, IGNORE):
                raise DataError(
                    f"{where}: {own!r} is to be called {new!r}, but its dataset.json has {kind} {', '.join(known)}. Correct the "
                    f"table of {kind} (in the study, or in the site's own settings).",
                    code="sites_differ",
                )
        called = [table.get(name, name) for name in known]
        if len(set(called)) < len(set(known)):
            raise DataError(
                f"{where}: two of its {kind} would be called the same: {', '.join(called)}. Each needs a name of its own. "
                f"Correct the table of {kind}.",
                code="sites_differ",
            )
    annotated = None if space.annotated is None else tuple(names.labels.get(n, n) for n in space.annotated)
    return Space(
        tuple(names.channels.get(c, c) for c in channels),
        {names.labels.get(n, n): value for n, value in space.labels.items()},
        annotated if names.annotated is None else names.annotated,
    )


def translate(own: Space, study: Space, *, where: str, other: str = "the study") -> Translation:
    """How a site's files become what the study means.

    Ids are matched by the names that hold them: an id of regions may become any that lies in the same regions.

    Args:
        where: the site, or its folder, for messages.
        other: where the study's words come from.

    Raises:
        DataError: a name is missing at one of them (`sites_differ`).
    """
    _match("channels", own.channels, study.channels, where, other)
    optional = {IGNORE} if IGNORE in study.labels else set()  # a site may know all its voxels
    if own.annotated is not None:
        optional |= {n for n in foreground(study.labels) if n not in own.annotated and n not in own.labels}
    _match(
        "labels",
        [n for n in own.labels if n not in optional],
        [n for n in study.labels if n not in optional],
        where,
        other,
    )
    theirs = _members(study.labels)
    ids: dict[int, int] = {}
    for members, group in _members(own.labels).items():
        if members not in theirs:
            raise DataError(
                f"{where} has an id ({group[0]}) that is {' and '.join(sorted(members))} at once. In {other} no id is. Draw the "
                "label maps and write the regions the same way at every site.",
                code="sites_differ",
            )
        found = theirs[members]
        ids |= {i: i if i in found else found[min(place, len(found) - 1)] for place, i in enumerate(group)}
    order = tuple(range(len(own.channels)))
    if own.channels != study.channels:
        order = tuple(own.channels.index(c) for c in study.channels)
    return Translation(order, dict(sorted(ids.items())), own.labels)


def agree(told: Mapping[str, Space]) -> tuple[Space, dict[str, Translation]]:
    """The space of a study, and how each site gets there: the first site's, with `ignore` if any site has it.

    Where sites looked for some labels only, those that others know besides are added.

    Raises:
        DataError: labels that cannot be, or names that differ between sites.
    """
    for site, space in told.items():
        if problem := flaw(space.labels):
            raise DataError(f"{site} has labels {dict(space.labels)}. {problem}, in its dataset.json.")
    first = next(iter(told))
    study = replace(told[first], labels=united(told.values()), annotated=None)
    for site, space in told.items():
        require_known(space, study.labels, where=site)
    if IGNORE not in study.labels and any(IGNORE in space.labels for space in told.values()):
        study = replace(study, labels={**study.labels, IGNORE: all_ids(study.labels)[-1] + 1})
    return study, {site: translate(space, study, where=site, other=first) for site, space in told.items()}


def united(told: Iterable[Space]) -> Labels:
    """The first site's labels and those that others know besides, where the sites that lack them did not look for them."""
    spaces = list(told)
    first = spaces[0]
    labels: dict[str, Any] = {n: v for n, v in first.labels.items() if n != IGNORE}
    for space in spaces:
        for name in foreground(space.labels):
            lack = [s for s in spaces if name not in s.labels]
            if name not in labels and all(s.annotated is not None and name not in s.annotated for s in lack):
                labels[name] = max(all_ids(labels)) + 1
    if IGNORE in first.labels:
        labels[IGNORE] = max(all_ids(labels)) + 1
    return labels


def require_known(space: Space, labels: Labels, *, where: str) -> None:
    """Check that what a site looked for are labels of the study.

    Raises:
        DataError: one is not (`sites_differ`).
    """
    if unknown := [name for name in space.annotated or () if name not in labels]:
        raise DataError(
            f"{where} says that {', '.join(unknown)} is annotated there. Labels are {', '.join(foreground(labels))}. Correct "
            "annotated, in the study or in its dataset.json.",
            code="sites_differ",
        )


def annotation_notes(
    labels: Labels, told: Mapping[str, tuple[str, ...] | None], *, partly: Collection[str] = ()
) -> list[str]:
    """What a report must say of the sites that annotate some labels only; every label must be annotated somewhere.

    Args:
        told: site -> what was looked for in some case.
        partly: sites with a case in which not all of that was looked for.

    Raises:
        DataError: one is not.
    """
    nowhere = [n for n in foreground(labels) if all(names is not None and n not in names for names in told.values())]
    if nowhere:
        raise DataError(
            f"No site annotates {', '.join(nowhere)}. Every label needs one that does. Correct annotated, or take it out."
        )
    notes = []
    for site, names in told.items():
        if names is not None and not set(foreground(labels)) <= set(names):
            notes.append(
                f"{site} annotates {', '.join(names) or 'nothing'} only: other labels are unknown there, not background."
            )
        elif site in partly:
            notes.append(
                f"{site} annotates some labels only in some cases: the others are unknown there, not background."
            )
    return notes


def reorder(fingerprint: Fingerprint, translation: Translation) -> Fingerprint:
    """The fingerprint with its channels in the study's order.

    Raises:
        ContractError: it has other channels than its site named.
    """
    if len(fingerprint.channels) != len(translation.channels):
        raise ContractError(
            f"A fingerprint has {len(fingerprint.channels)} channels, its site named {len(translation.channels)}. Both must be "
            "equal. Ask the site again."
        )
    return replace(fingerprint, channels=tuple(fingerprint.channels[i] for i in translation.channels))


def _members(labels: Labels) -> dict[frozenset[str], list[int]]:
    """Names -> the ids, ascending, that all of them and no others hold."""
    holders: dict[int, set[str]] = {}
    for name, value in labels.items():
        for i in ids_of(value):
            holders.setdefault(i, set()).add(name)
    members: dict[frozenset[str], list[int]] = {}
    for i, names in sorted(holders.items()):
        members.setdefault(frozenset(names), []).append(i)
    return members


def _match(kind: str, own: Sequence[str], study: Sequence[str], where: str, other: str) -> None:
    """Check that both have the same names."""
    if sorted(own) == sorted(study) and (list(own) == list(study) or len(set(own)) == len(own)):
        return
    mine, missing = [n for n in own if n not in study], [n for n in study if n not in own]
    partial = kind == "labels" and bool(mine) is not bool(missing)
    raise DataError(
        f"{where} has {kind} {', '.join(own)}. Expected {', '.join(study)}, as in {other}. "
        + (_partial(*((other, mine) if mine else (where, missing))) if partial else _nearest(kind, mine, missing)),
        code="sites_differ",
    )


def _partial(who: str, lacks: Sequence[str]) -> str:
    return (
        f'{who} lacks {", ".join(lacks)}. If nobody looked for it there, list what was looked for: "annotated" in its '
        "dataset.json, or annotated = [...] in the site's table of the study."
    )


def _nearest(kind: str, mine: Iterable[str], missing: Sequence[str]) -> str:
    """What the names may be called in the study."""
    pairs = {name: near for name in mine if (near := _near(name, missing))}
    table = ", ".join(f'"{a}" = "{b}"' for a, b in pairs.items())
    hint = f"Perhaps {kind} = {{ {table} }} in the site's table of the study? " if pairs else ""
    return f"{hint}Correct its dataset.json, or give the site a table of {kind} (its own name = the study's)."


def _near(name: str, missing: Sequence[str]) -> str | None:
    folded = {m.casefold(): m for m in missing}
    found = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.4)
    return folded[found[0]] if found else (missing[0] if len(missing) == 1 else None)
