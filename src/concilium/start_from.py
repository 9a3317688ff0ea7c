"""Weights to start from: those of a run, of nnU-Net, or of a file, as far as they fit the study's network.

They are the server's business: sites get them with the first round, as they get drawn ones. What was read from elsewhere is kept
in the run folder (`start_from.safetensors`, and how it was matched in `start_from.json`), so that every model of the run, after
a stop too, starts from the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from concilium.catalog import allowed
from concilium.checkpoints import read_checkpoint, sha256_of
from concilium.data.plan import open_plan
from concilium.errors import ConciliumError, StudyError
from concilium.finished import finished_models, open_finished
from concilium.matching import as_table, match, note_of, require
from concilium.messages import Tensors
from concilium.networks import bare, beside_build, names_elsewhere
from concilium.record import Record
from concilium.study import Study, read_study
from concilium.wire import read_tensors, write_tensors

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
"""Of a fold of nnU-Net's model folder; the first that is there."""


_LICENCE = re.compile(r"\A---\n(?:.*\n)*?licen[sc]e:[ \t]*(.+)\n(?:.*\n)*?---")
_LONGEST = 80
"""Characters of a licence's name that are shown."""


@dataclass(frozen=True)
class Start:
    """Tensors of the study's network that take the place of drawn ones; `note` says in a line where they come from."""

    weights: Tensors
    note: str
    warnings: tuple[str, ...] = ()
    sha256: str = ""
    """Of the file."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Name there -> the network's, of those that differ."""


@dataclass(frozen=True)
class Source:
    """A file of weights. `plans`, `configuration`: of the nnU-Net that wrote it, where they lie beside it."""

    file: Path
    plans: Path | None = None
    configuration: str = ""
    of_run: bool = False
    """Whether a run of Concilium wrote it."""

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return sha256_of(self.file)

    @property
    def licence(self) -> str:
        """What the file, the front matter of a README.md beside it or the first line of a LICENSE there says; else nothing."""
        told = ""
        if self.file.suffix == ".safetensors":
            metadata = read_tensors(self.file)[1]
            told = metadata.get("license", metadata.get("licence", ""))
        if not told and (found := _LICENCE.search(_beginning(self.file.with_name("README.md")))):
            told = found[1]
        told = told or _beginning(self.file.with_name("LICENSE")).strip().partition("\n")[0]
        return "".join(c for c in told.strip().strip("\"'") if c.isprintable())[:_LONGEST]


def start_of(
    study: Study,
    fresh: Tensors,
    record: Record,
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    name: str = "start_from",
) -> Start:
    """What a study with `[network] weights` starts from.

    Args:
        fresh: drawn weights of the study's network.
        plan: as for `make_network`.
        name: of the files in the run folder.

    Raises:
        StudyError: there is nothing there, or it matches less than the study asks for.
        DataError: what is there cannot be read, or is not finite.
    """
    path, table = record.folder / f"{name}.safetensors", _kept(record, name)
    given = cast(Path, study.start.weights)
    if table is not None:
        kept = read_tensors(path)[0]
        return Start(kept, note_of(table), _changed(given, table), table["sha256"], table.get("names", {}))
    source = find_source(given)
    digest, there = source.sha256, read_source(source)
    known = partial(names_elsewhere, study.network, n_channels=n_channels, n_labels=n_labels, there=there.keys())
    elsewhere = _names_beside(source, study.plan.configuration, known) or known(plan=plan)
    refit, added = (beside_build(study.network, name) for name in ("refitted", "added"))
    matched = match(fresh, there, elsewhere, source.file, refit=refit, added=added)
    require(matched, study.start.min_matched, fresh=fresh, file=source.file)
    table = as_table(source.file, digest, matched, fresh) | {"min_matched": study.start.min_matched}
    table |= {} if source.of_run else {"licence": source.licence}
    known_there = {bare(name) for name in there}
    names = {n: ours for n, ours in elsewhere.items() if n != ours and n in known_there and ours in matched.weights}
    table |= {"names": names} if names else {}
    write_tensors(path, matched.weights, {"sha256": digest})
    record.write_json(f"{name}.json", table)
    return Start(matched.weights, note_of(table), sha256=digest, names=names)


def check_start(study: Study, record: Record) -> None:
    """Raise StudyError where a study starts from what is not there: before the sites read every case."""
    if study.start.weights is not None and not record.begun:
        find_source(study.start.weights)


def weights_at_sites(study: Study) -> dict[str, tuple[Path, ...]]:
    """What a simulation tells its sites: the files that the study and its variants start from, as far as they are still there."""
    found = []
    for one in (study, *study.variants.values()):
        if one.start.weights is not None and study.engine.name == "simulation":
            with suppress(ConciliumError, OSError):  # a run that was stopped goes on without it
                found.append(find_source(one.start.weights).file)
    return {"weights": tuple(dict.fromkeys(found))} if found else {}  # between hospitals each site names its own copy


def _kept(record: Record, name: str) -> dict[str, Any] | None:
    """How weights were matched in a run that has trained from them since; `None` where there is nothing to go on with."""
    table: dict[str, Any] | None = record.read_json(f"{name}.json") if record.begun else None
    return table if (record.folder / f"{name}.safetensors").is_file() else None


# ------------------------------------------------------------------------------------------------------------- sources


def find_source(path: Path) -> Source:
    """The file behind `[network] weights`; `#MODEL` or `#fold_0` at its end chooses within a folder.

    Raises:
        StudyError: it is none of what is allowed.
    """
    base, _, choice = str(path).rpartition("#") if not path.exists() and "#" in path.name else (str(path), "", "")
    given = Path(base)
    if (given / "study.toml").is_file():
        return _in_run(given, choice)
    if folds := sorted(p for p in given.glob("fold_*") if any((p / name).is_file() for name in CHECKPOINTS)):
        return _in_model_folder(given, folds, choice)
    if not choice and given.is_file() and given.suffix in (".pth", ".pt", ".safetensors"):
        folder = next((p for p in (given.parent, given.parent.parent) if (p / "plans.json").is_file()), given.parent)
        return _beside_plans(given, folder)
    what = "is none of these" if given.exists() else "does not exist"
    raise StudyError(
        f"[network] weights = '{path}' {what}. Allowed: a run folder (RUN or RUN#MODEL), nnU-Net's model folder, which holds "
        "fold_0/checkpoint_final.pth (or FOLDER#fold_1), a .safetensors or a .pth file. Correct the path."
    )


def _in_run(run: Path, choice: str) -> Source:
    name, known = choice or read_study(run / "study.toml", check_data=False).protocol.name, finished_models(run)
    if name not in known:
        raise StudyError(
            f"[network] weights: the run {run} holds no finished model {name!r}. {allowed(name, known)} "
            "Choose one with RUN#MODEL."
        )
    return Source(open_finished(run, name).files[0], of_run=True)


def _in_model_folder(folder: Path, folds: Sequence[Path], choice: str) -> Source:
    by_name = {fold.name: fold for fold in folds}
    name = choice or ("fold_all" if "fold_all" in by_name else min(by_name))
    if name not in by_name:
        raise StudyError(
            f"[network] weights: {folder} holds no checkpoint in {name!r}. {allowed(name, by_name)} "
            "Choose one with FOLDER#fold_0."
        )
    return _beside_plans(next(p for c in CHECKPOINTS if (p := by_name[name] / c).is_file()), folder)


def _beside_plans(file: Path, folder: Path) -> Source:
    plans = folder / "plans.json"
    return Source(file, plans, folder.name.rpartition("__")[2]) if plans.is_file() else Source(file)


def read_source(source: Source) -> dict[str, Tensor]:
    """The tensors of the file, under the names that they have there.

    Raises:
        DataError: it cannot be read.
    """
    return read_checkpoint(source.file)


def _beginning(file: Path) -> str:
    """The first text in a file; nothing where there is none."""
    try:
        with file.open("rb") as there:
            return there.read(1 << 12).decode(errors="replace").replace("\r", "")
    except OSError:
        return ""


def _names_beside(
    source: Source, configuration: str, known: Callable[..., Mapping[str, str]]
) -> Mapping[str, str] | None:
    """Names by the plan that the weights were trained by: with another depth, nnU-Net's names mean other levels."""
    if source.plans is None:
        return None
    for name in (source.configuration, configuration):
        try:
            text = source.plans.read_text(encoding="utf-8")
            return known(plan=open_plan(text, name).architecture)
        except Exception:  # a plan of another version, or a stranger's: the study's own will do, and what fits is told
            continue
    return None


def _changed(path: Path, table: Mapping[str, Any]) -> tuple[str, ...]:
    """A warning where the source is not any more what the run began with; where it is gone there is nothing to compare."""
    try:
        source = find_source(path)
        same = source.sha256 == table["sha256"]
    except (ConciliumError, OSError):
        return ()
    return () if same else (f"{source.file} has changed since the run began. It goes on with what it began with.",)
