"""A kit: the folder that makes a machine the server, or one site, of a federation. Made by `provision`, carried there by hand.

`startup/` holds certificates and FLARE's own settings, signed; `local/` what the machine's owner decides, among it `site.toml`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from concilium.catalog import allowed, coerce
from concilium.engines import role_of
from concilium.engines._frames import Certificates
from concilium.errors import StudyError

if TYPE_CHECKING:
    from concilium.answers import Settings

ABOUT = "local/concilium.json"
SETTINGS = "local/site.toml"
ADMIN, AUTHORITY, TEST = "admin", "authority", "test"
"""Names in a federation with a meaning, beside `SERVER`; `test` is the site that holds the held-out set."""


@dataclass(frozen=True)
class About:
    """What every kit of a federation says of it."""

    name: str
    """Of the kit: `server`, or the site."""
    host: str
    port: int
    """FLARE's, where sites ask for permission and work."""
    message_port: int
    """Ours, where messages travel."""
    sites: tuple[str, ...]


@dataclass(frozen=True)
class SiteSettings:
    """`site.toml`: what a site's administrator decides, and no server can."""

    data: Path
    """nnU-Net raw folder."""
    test: Path | None = None
    """A copy of the held-out set, to score the site's own model on."""
    folder: Path | None = None
    """Where runs keep what is private to the site; omitted: `runs` in the kit."""
    threads: int = 1
    """Threads to compute with."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    split: bool = False
    """Whether activations, functions of each voxel, may leave: `splitfed` needs it."""
    labels: bool = False
    """Whether a study with `reveal_labels` may run here, from which the server can compute label maps."""
    plug_ins: tuple[str, ...] = ()
    """Code from outside Concilium, as `module:function`, that a study may name."""
    label_names: Mapping[str, str] | None = None
    """What this site calls its labels, where the study calls them otherwise -> the study's names."""
    channel_names: Mapping[str, str] | None = None
    """The same of channels."""
    annotated: tuple[str, ...] | None = None
    """The labels that were looked for at this site, in the study's words; omitted: as its dataset.json says, or all."""
    open_weights: bool = True
    """Whether weights may leave as they are, as `federated` needs it; otherwise only sealed for another site (`cyclic`) or masked
    (`secure_sum`)."""
    least_summed: int = 3
    """Masked updates (`secure_sum`) leave only where those of so many sites or more are added up."""
    reveal: bool = False
    """Whether the server may have the finished model of a study with `cyclic` and `reveal`; otherwise the sites alone have it."""
    case_scores: bool = False
    """Whether the scores of single cases may leave, under numbers. Otherwise averages do, over 5 patients or more."""
    shown: bool = False
    """Whether other sites may be sent this site's update as it is, to judge it (`[collect] name = "judged"`)."""
    new_patients: bool = False
    """Whether new patients (`imagesTs`) may be segmented together with the other parties (`vertical`): maps of them leave."""
    kept: bool = False
    """Whether tensors that a study keeps at its sites may leave once, to make a network for sites elsewhere."""
    pictures: bool = True
    """Whether a picture of each scored case is kept in the run's folder here."""
    micro_batch: int | Literal["auto"] | None = None
    """How many patches fit into this machine's memory at once; larger batches are trained in parts. `auto`: as many as the memory
    at hand allows when a study begins. Omitted: a batch fits."""
    weights: Path | None = None
    """This site's copy of the file that a study starts from, where some tensors of it do not train: those never travel."""


def read_about(kit: Path) -> About:
    """What the kit says of itself.

    Raises:
        StudyError: the folder is no kit.
    """
    path = kit / ABOUT
    if not path.is_file():
        raise StudyError(
            f"{kit} is no kit: it has no {ABOUT}. Expected a folder that `concilium provision` made. Give that folder."
        )
    raw = json.loads(path.read_text(encoding="utf-8"))
    return About(**raw | {"sites": tuple(raw["sites"])})


def write_about(kit: Path, about: About) -> None:
    """Write what the kit says of itself."""
    (kit / ABOUT).write_text(json.dumps(dataclasses.asdict(about), indent=1) + "\n", encoding="utf-8")


def certificates(kit: Path, *, server: bool) -> Certificates:
    """The kit's certificates."""
    startup, role = kit / "startup", "server" if server else "client"
    return Certificates(startup / "rootCA.pem", startup / f"{role}.crt", startup / f"{role}.key")


@contextmanager
def locked(kit: Path) -> Iterator[None]:
    """Hold the kit: two processes with one identity would take each other's place.

    Raises:
        StudyError: another process holds it, or FLARE could not work there.
    """
    if " " in str(kit.resolve()):
        raise StudyError(f"{kit.resolve()} has a space in its path, with which FLARE starts nothing. Move the kit.")
    with (kit / "lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise StudyError(
                f"{kit} is in use by another process. One at a time may. Wait for it, or end it first."
            ) from e
        yield


def read_settings(kit: Path, given: dict[str, Any] | None = None) -> SiteSettings:
    """The site's settings, with what is `given` in place of what is written (and `None` for: as written).

    Raises:
        StudyError: they are incomplete, or a value is not allowed.
    """
    return read_site(kit / SETTINGS, given)


def read_site(path: Path, given: dict[str, Any] | None = None) -> SiteSettings:
    """The same of the file itself, wherever it lies.

    Raises:
        StudyError: they are incomplete, or a value is not allowed.
    """
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as e:  # no TOML, no UTF-8
        raise StudyError(f"{path} is not valid TOML ({e}). Correct it there.") from e
    raw |= {key: value for key, value in (given or {}).items() if value is not None}
    fields = {f.name: f for f in dataclasses.fields(SiteSettings)}
    hints: dict[str, Any] = {
        "data": Path,
        "test": Path | None,
        "folder": Path | None,
        "weights": Path | None,
        "threads": int,
        "micro_batch": int | Literal["auto"],
        "least_summed": int,
        "device": str,
        "split": bool,
    }
    hints |= dict.fromkeys(
        ("labels", "pictures", "case_scores", "shown", "kept", "open_weights", "reveal", "new_patients"), bool
    )
    hints |= dict.fromkeys(("plug_ins", "annotated"), tuple[str, ...])
    hints |= dict.fromkeys(("label_names", "channel_names"), Mapping[str, str])
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in fields:
            raise StudyError(f"{path}: {key} is not known. {allowed(key, fields)}")
        try:
            values[key] = coerce(str(value) if isinstance(value, Path) else value, hints[key])
        except ValueError as e:
            raise StudyError(f"{path}: {key} = {value!r} is not allowed. {e}") from e
    if "data" not in values:
        raise StudyError(f"{path} does not say where this site's data lie. Expected a folder. Give it with --data.")
    settings = SiteSettings(**values)
    for folder in (settings.data, settings.test):
        if folder is not None and not (folder / "dataset.json").is_file():
            raise StudyError(f"{folder} is no nnU-Net raw folder: it has no dataset.json. Correct the path.")
    if settings.threads < 1 or settings.device not in ("auto", "cpu", "cuda"):
        raise StudyError(
            f"threads = {settings.threads}, device = {settings.device!r} is not allowed. Allowed: 1 or more threads; auto, cpu "
            "or cuda. Correct them."
        )
    _check_numbers(settings, path)
    return settings


def _check_numbers(settings: SiteSettings, path: Path) -> None:
    if isinstance(settings.micro_batch, int) and settings.micro_batch < 1:
        raise StudyError(
            f"micro_batch = {settings.micro_batch} is not allowed. Allowed: 1 or more, or 'auto'. Correct it in {path}."
        )
    if settings.weights is not None and not settings.weights.is_file():
        raise StudyError(
            f"weights = '{settings.weights}' is no file. Expected a copy of the weights that a study starts from. Correct it in "
            f"{path}, or leave it out."
        )
    if settings.least_summed < 2:
        raise StudyError(
            f"least_summed = {settings.least_summed} is not allowed: a sum of one update is that update. Allowed: 2 or more. "
            f"Correct it in {path}."
        )


def write_settings(kit: Path, settings: SiteSettings) -> None:
    """Write the site's settings, paths made absolute."""
    values = {
        f.name: str(value.resolve()) if isinstance(value, Path) else value
        for f in dataclasses.fields(settings)
        if (value := getattr(settings, f.name)) is not None
    }
    (kit / SETTINGS).write_text(tomli_w.dumps(values), encoding="utf-8")


def settings_of_run(kit: Path, about: About, run: str) -> Settings:
    """What the site answers with in one run."""
    from concilium.answers import Policy, Settings  # and with them torch, which a site that waits does not need
    from concilium.data.matching import Names
    from concilium.sealing import Identity

    files = certificates(kit, server=False)
    s = read_settings(kit)
    folder = s.folder or kit / "runs"
    return Settings(
        about.name,
        role_of(about.name),
        {about.name: s.data},
        s.test,
        folder / run,
        folder / "cache",
        s.threads,
        s.device,
        Policy(
            plug_ins=s.plug_ins,
            split=s.split,
            labels=s.labels,
            open_weights=s.open_weights,
            least_summed=s.least_summed,
            reveal=s.reveal,
            case_scores=s.case_scores,
            shown=s.shown,
            new_patients=s.new_patients,
            kept=s.kept,
        ),
        names={about.name: Names(s.label_names or {}, s.channel_names or {}, s.annotated)},
        pictures=s.pictures,
        identity=Identity(files.authority, files.certificate, files.key, about.sites),
        sealing_key=files.key.with_name("sealing.key"),  # beside the certificate's
        micro_batch=s.micro_batch,
        weights=() if s.weights is None else (s.weights,),
        secret=folder / run / "secret",
    )
