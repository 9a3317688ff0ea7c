"""Kits: what each machine of a federation gets, what it may do, and what its owner decides."""

from __future__ import annotations

import contextlib
import json
import ssl
import stat
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from concilium import wire
from concilium.answers import Policy, Settings
from concilium.cli import app
from concilium.data.matching import Names
from concilium.deployment import ALLOWED
from concilium.deployment import join as joining
from concilium.deployment.kits import (
    About,
    certificates,
    locked,
    read_about,
    read_settings,
    settings_of_run,
    write_settings,
)
from concilium.deployment.provision import ADMINISTRATOR, provision
from concilium.deployment.serve import serve
from concilium.engines._frames import peer_name, tls
from concilium.errors import StudyError
from concilium.messages import Evaluate, Front, Keep, PlugIn, SiteRefused, Train
from concilium.site import Site
from concilium.study import parse_study
from concilium.wire import Envelope

SITES = ("north", "south", "west")
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only."""
    folder = tmp_path_factory.mktemp("kits") / "out"
    return provision("small", SITES, folder, hosts=[HOST, "concilium.example"], port=18002, message_port=18003)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A site's kit without certificates, to write settings into."""
    (tmp_path / "kit" / "local").mkdir(parents=True)
    about = {"name": "north", "host": HOST, "port": 1, "message_port": 2, "sites": ["north"]}
    (tmp_path / "kit" / "local" / "concilium.json").write_text(json.dumps(about))
    return tmp_path / "kit"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def strings(value: Any) -> list[str]:
    """Every string in a JSON document."""
    match value:
        case dict():
            return [s for v in value.values() for s in strings(v)]
        case list():
            return [s for v in value for s in strings(v)]
    return [str(value)]


# ---------------------------------------------------------------------------------------------------------- provisioning


def test_there_is_a_kit_for_the_server_and_for_each_site(kits: dict[str, Path]) -> None:
    assert set(kits) == {"server", *SITES}
    out = kits["server"].parent
    assert {path.name for path in out.iterdir()} == {*kits, "authority"}
    for name, kit in kits.items():
        assert read_about(kit) == About(name, HOST, 18002, 18003, SITES)
    # who submits is part of the server's kit, and of no other
    assert (kits["server"] / "admin" / "startup" / "client.key").is_file()
    assert not any((kits[site] / "admin").exists() for site in SITES)


def test_flare_may_build_two_classes_and_take_no_code(kits: dict[str, Path]) -> None:
    assert len(ALLOWED) == 2
    for kit in kits.values():
        resources = read_json(kit / "local" / "resources.json")
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["class_allow_list"] == list(ALLOWED)
        rights = read_json(kit / "local" / "authorization.json")["permissions"]
        assert set(rights) == {"project_admin"}
        for right in ("byoc", "shell_commands", "download_job", "clone_job"):
            assert rights["project_admin"][right] == "none"
        assert not list(kit.rglob("custom"))
    for site in SITES:
        assert read_json(kits[site] / "local" / "resources.json")["allow_log_streaming"] is False
        assert "site_log_streamer" not in (kits[site] / "local" / "resources.json").read_text()


def test_no_kit_says_where_data_lie_or_opens_a_port_at_a_site(kits: dict[str, Path]) -> None:
    for site in SITES:
        assert not (kits[site] / "local" / "site.toml").exists()
        said = strings(read_json(kits[site] / "startup" / "fed_client.json"))
        assert any(f"{HOST}:18002" in text for text in said)


def test_all_certificates_are_of_one_authority_and_bear_the_kits_names(kits: dict[str, Path]) -> None:
    authorities = {(kit / "startup" / "rootCA.pem").read_bytes() for kit in kits.values()}
    (root,) = map(x509.load_pem_x509_certificate, authorities)
    named = {name: certificates(kit, server=name == "server").certificate for name, kit in kits.items()}
    named[ADMINISTRATOR] = kits["server"] / "admin" / "startup" / "client.crt"
    keys = set()
    for name, path in named.items():
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(root)
        (common,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        assert common.value == name
        keys.add(certificate.public_key().public_numbers())
    assert len(keys) == len(named)
    server = x509.load_pem_x509_certificate(named["server"].read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["concilium.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == [HOST]


def test_the_kits_certificates_make_a_connection(kits: dict[str, Path]) -> None:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls(certificates(kits["server"], server=True), server=True).wrap_bio(up, down, server_side=True)
    south = tls(certificates(kits["south"], server=False), server=False).wrap_bio(down, up, server_hostname=HOST)
    for _ in range(3):
        for end in (south, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert (peer_name(server), peer_name(south)) == ("south", "server")  # type: ignore[arg-type]
    assert server.version() == "TLSv1.3"


def test_private_keys_are_for_their_owner_only(kits: dict[str, Path]) -> None:
    out = kits["server"].parent
    private = [p for p in out.rglob("*") if p.is_file() and b"PRIVATE KEY" in p.read_bytes()]
    assert {p.relative_to(out).parts[0] for p in private} == {*kits, "authority"}
    for path in private:
        guarded = [path, *(parent for parent in path.parents if parent.is_relative_to(out))]
        assert any(not stat.S_IMODE(p.stat().st_mode) & 0o077 for p in guarded), path
    # the authority's key is in no kit
    state = read_json(out / "authority" / "cert.json")
    root_key = state["root_pri_key"].encode() if isinstance(state["root_pri_key"], str) else b""
    assert root_key
    assert not any(root_key in p.read_bytes() for kit in kits.values() for p in kit.rglob("*") if p.is_file())


def test_kits_are_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(StudyError, match=r"is not empty.*private keys"):
        provision("small", SITES, tmp_path, hosts=[HOST], port=1, message_port=2)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("name", "site", "host"),
    [
        ("small", "no rth", HOST),
        ("small", "north", "no host!"),
        ("../../small", "north", HOST),
        ("kleiné", "north", HOST),
    ],
)
def test_what_flare_does_not_take_is_refused_or_works(name: str, site: str, host: str, tmp_path: Path) -> None:
    """And nothing is written elsewhere, or left half done."""
    out = tmp_path / "deep" / "deeper" / "out"
    try:
        made = set(provision(name, [site], out, hosts=[host], port=1, message_port=2))
    except StudyError:
        made = set()
    assert {path.name for path in out.glob("*")} == (made | {"authority"} if made else set())
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} <= {out.parent, out.parent.parent}


@pytest.mark.parametrize("site", ["authority", "admin"])
def test_no_site_gets_what_is_not_its_own(site: str, tmp_path: Path) -> None:
    """Whatever a site is called, the authority's key and the submitter's are in no site's kit."""
    try:
        kits = provision("small", [site, "north"], tmp_path / "out", hosts=[HOST], port=1, message_port=2)
    except StudyError:
        return
    for name in (site, "north"):
        assert not list(kits[name].rglob("cert.json"))
        assert len(list(kits[name].rglob("*.key"))) == 1
    assert (tmp_path / "out" / "authority" / "cert.json").is_file()


# -------------------------------------------------------------------------------------------------------- site settings


def test_settings_that_are_given_are_kept(kit: Path, phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(phantom)
    settings = read_settings(kit, {"data": Path("north"), "threads": 2, "split": True, "test": None, "device": None})
    write_settings(kit, settings)
    written = tomllib.loads((kit / "local" / "site.toml").read_text())
    assert written["data"] == str((phantom / "north").resolve())
    assert (written["threads"], written["split"], written["labels"]) == (2, True, False)
    monkeypatch.chdir("/")
    assert read_settings(kit) == settings.__class__(**vars(settings) | {"data": (phantom / "north").resolve()})
    # what is given later replaces, what is not stays
    write_settings(kit, read_settings(kit, {"split": False, "data": None}))
    assert (read_settings(kit).split, read_settings(kit).threads) == (False, 2)


def test_by_default_nothing_beyond_updates_leaves_a_site(kit: Path, phantom: Path) -> None:
    write_settings(kit, read_settings(kit, {"data": phantom / "north"}))
    settings = settings_of_run(kit, read_about(kit), "0a1b")
    shut = dict.fromkeys(("split", "labels", "reveal", "case_scores", "shown", "kept", "new_patients"), False)
    assert settings.policy == Policy(plug_ins=(), least_summed=3, **shut)
    assert settings.identity is not None
    assert set(settings.identity.sites) >= {"north"}
    assert settings.sealing_key == kit / "startup" / "sealing.key"
    assert settings.folder == kit / "runs" / "0a1b"
    assert (settings.name, settings.role, settings.data) == ("north", "site", {"north": (phantom / "north").resolve()})


def test_a_site_may_have_its_own_words(kit: Path, phantom: Path) -> None:
    text = f"data = '{phantom / 'north'}'\nlabel_names = {{ ant = 'anterior' }}\nchannel_names = {{ T1w = 'T1' }}\n"
    (kit / "local" / "site.toml").write_text(text)
    write_settings(kit, read_settings(kit, {"threads": 2}))
    assert settings_of_run(kit, read_about(kit), "0a1b").micro_batch is None
    assert settings_of_run(kit, read_about(kit), "0a1b").names == {"north": Names({"ant": "anterior"}, {"T1w": "T1"})}


def test_a_site_says_how_much_it_holds(kit: Path, phantom: Path) -> None:
    (kit / "local" / "site.toml").write_text(f"data = '{phantom / 'north'}'\nmicro_batch = 2\n")
    write_settings(kit, read_settings(kit, {"threads": 2}))
    assert settings_of_run(kit, read_about(kit), "0a1b").micro_batch == 2
    assert settings_of_run(kit, read_about(kit), "0a1b").weights == ()
    (kit / "w.pth").touch()
    (kit / "local" / "site.toml").write_text(f"data = '{phantom / 'north'}'\nweights = '{kit / 'w.pth'}'\n")
    assert settings_of_run(kit, read_about(kit), "0a1b").weights == (kit / "w.pth",)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", r"does not say where this site's data lie.*--data"),
        ("data = '{phantom}/nowhere'", r"nowhere is no nnU-Net raw folder: it has no dataset.json"),
        ("data = '{phantom}/north'\ntest = '{phantom}'", r"is no nnU-Net raw folder"),
        ("data = '{phantom}/north'\nthread = 2", r"site.toml: thread is not known.*threads"),
        ("data = '{phantom}/north'\nthreads = 'two'", r"site.toml: threads = 'two' is not allowed"),
        ("data = '{phantom}/north'\nthreads = 0", r"threads = 0"),
        ("data = '{phantom}/north'\nmicro_batch = 0", r"micro_batch = 0 is not allowed. Allowed: 1 or more"),
        ("data = '{phantom}/north'\nmicro_batch = true", r"micro_batch = True is not allowed"),
        ("data = '{phantom}/north'\nweights = 'gone.pth'", r"weights = 'gone.pth' is no file"),
        ("data = '{phantom}/north'\nleast_summed = 1", r"least_summed = 1 is not allowed: a sum of one update"),
        ("data = '{phantom}/north'\nsplit = 'yes'", r"split = 'yes' is not allowed"),
        ("data = '{phantom}/north'\ndevice = 'tpu'", r"device = 'tpu'"),
        ("data = '{phantom}/north'\nplug_ins = 'a:b'", r"plug_ins = 'a:b' is not allowed"),
        ("data = '{phantom}/north'\nlabel_names = ['a']", r"label_names = \['a'\] is not allowed. Allowed: a table"),
        ("data = ", r"site.toml"),
        ("data = '{phantom}/north' # \udcff", r"site.toml"),
    ],
)
def test_wrong_settings_are_refused(written: str, message: str, kit: Path, phantom: Path) -> None:
    text = written.replace("{phantom}", str(phantom)).encode(errors="surrogateescape")
    (kit / "local" / "site.toml").write_bytes(text)
    with pytest.raises(StudyError, match=message):
        read_settings(kit)


def test_what_is_no_kit_is_refused(tmp_path: Path, kits: dict[str, Path], phantom: Path) -> None:
    with pytest.raises(StudyError, match=r"is no kit: it has no local/concilium.json.*concilium provision"):
        joining.join(tmp_path, {"data": phantom / "north"})
    with pytest.raises(StudyError, match=r"is the server's kit.*concilium serve"):
        joining.join(kits["server"], {"data": phantom / "north"})


def test_a_kit_in_use_is_not_used_again_and_keeps_its_settings(
    kit: Path, phantom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock is between processes, so another one holds it here."""
    monkeypatch.setattr(joining, "start", lambda *args: pytest.fail("it was started"))
    write_settings(kit, read_settings(kit, {"data": phantom / "north"}))
    before = (kit / "local" / "site.toml").read_text()
    hold = (
        "import fcntl,sys; f=open(sys.argv[1],'a'); fcntl.lockf(f,fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        ["python3", "-c", hold, str(kit / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StudyError, match="is in use by another process"):
            joining.join(kit, {"split": True})
        assert other.stdin is not None
        other.stdin.close()
    assert (kit / "local" / "site.toml").read_text() == before
    with locked(kit):
        pass


def test_a_kit_in_a_folder_with_a_space_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a kit"
    folder.mkdir()
    with pytest.raises(StudyError, match=r"has a space in its path.*Move the kit"), locked(folder):
        pytest.fail("locked")


# ------------------------------------------------------------------------------------------------------------- studies

Table = dict[str, Any]


@pytest.fixture
def study_of(phantom: Path) -> Callable[..., Table]:
    """`study_of("north", ...)`: a study, as its file's tables."""

    def make(*sites: str, **tables: Table) -> Table:
        return {
            "study": {"name": "small"},
            "sites": {site: {"data": str(phantom / site)} for site in sites},
            "protocol": {"rounds": 1, "steps": 1},
            "engine": {"name": "flare"},
        } | tables

    return make


def invoked(*arguments: object) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.output, result.exception


def test_run_refuses_the_engine_and_says_what_to_do(study_of: Any, phantom: Path, tmp_path: Path) -> None:
    import tomli_w

    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(study_of("north", "south")))
    _, error = invoked("run", path, "--out", tmp_path / "run")
    assert isinstance(error, StudyError)
    assert error.exit_code == 2
    assert "concilium serve" in str(error)
    assert "concilium join" in str(error)
    assert not (tmp_path / "run" / "study.toml").exists()  # or `serve --out` would take it for a run that began


@pytest.mark.parametrize(
    ("sites", "tables", "message"),
    [
        (("north", "east"), {}, r"The study has east, for which there is no kit. Kits exist for north, south, west"),
        (("north",), {"test": {"data": "test"}}, r"The study has test, for which there is no kit"),
        (
            ("north", "south"),
            {"protocol": {"rounds": 1, "steps": 1, "compare": ["centralized"]}},
            r"centralized.*not allowed between hospitals",
        ),
        (
            (),
            {"sites": {"north": {"data": "n", "shift": {"gamma": 2.0}}, "south": {"data": "s"}}, "engine": {}},
            r"\[sites.north.shift\] is not allowed between hospitals: only a simulation",
        ),
        (
            (),
            {"sites": {"north": {"data": "n", "labels": {"ant": "anterior"}}, "south": {"data": "s"}}, "engine": {}},
            r"\[sites.north\] labels is not read between hospitals.*label_names",
        ),
        (
            (),
            {"sites": {"north": {"data": "n", "micro_batch": 1}, "south": {"data": "s"}}, "engine": {}},
            r"\[sites.north\] micro_batch is not read between hospitals.*`micro_batch` in that site's site.toml",
        ),
    ],
)
def test_a_study_that_does_not_fit_is_refused(
    sites: tuple[str, ...], tables: Table, message: str, study_of: Any, kits: dict[str, Path], tmp_path: Path
) -> None:
    study = parse_study(study_of(*sites, **tables), folder=tmp_path, check_data=False)
    with pytest.raises(StudyError, match=message):
        serve(kits["server"], study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_kit_of_a_site_does_not_serve(kits: dict[str, Path], study_of: Any, tmp_path: Path) -> None:
    study = parse_study(study_of("north", "south"), folder=tmp_path)
    with pytest.raises(StudyError, match=r"is the kit of north. Expected the server's"):
        serve(kits["north"], study, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- policies

FRONT = Front("m", 1, ("down0", "up0"), False, 0, 1, 0, 1, {}, ())


@pytest.fixture
def handled(kit: Path, phantom: Path) -> Callable[..., Any]:
    """`handled(request, split=True)`: the reply of a site with these settings, and with nothing prepared."""

    def handle(request: Any, **given: Any) -> Any:
        write_settings(kit, read_settings(kit, {"data": phantom / "north", "device": "cpu"} | given))
        settings: Settings = settings_of_run(kit, read_about(kit), "0a1b")
        site = Site(settings, run="0a1b", epoch=1)
        return wire.unpack(site.handle(wire.pack(request), Envelope("0a1b", 1, 1), lambda: False))

    return handle


def test_activations_leave_only_where_the_site_says_so(handled: Any) -> None:
    assert handled(FRONT) == SiteRefused("split")
    allowed = handled(FRONT, split=True)
    assert (type(allowed).__name__, allowed.code) == (
        "SiteError",
        "contract",
    )  # it was not prepared, which is asked next


def test_labels_can_be_computed_only_where_the_site_says_so(handled: Any) -> None:
    from dataclasses import replace

    assert handled(replace(FRONT, reveal_labels=True), split=True) == SiteRefused("labels")
    assert handled(replace(FRONT, reveal_labels=True), split=True, labels=True).code == "contract"


def test_code_from_outside_runs_only_where_the_site_says_so(
    handled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "intruder.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef metric(*a, **k):\n    return 0.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    request = Evaluate("m", "validation", (PlugIn("dice"), PlugIn("intruder:metric")))
    assert handled(request) == SiteRefused("plug_ins")
    assert handled(request, plug_ins=("other:metric",)) == SiteRefused("plug_ins")
    assert not (tmp_path / "ran").exists()
    assert handled(request, plug_ins=("intruder:metric",)).code == "contract"  # it was not prepared


@pytest.mark.parametrize("model", ["../../outside", "/tmp/outside", "", ".", "a b"])
def test_no_request_names_a_file_outside_the_sites_folder(model: str, handled: Any, kit: Path) -> None:
    before = {path for path in kit.parent.rglob("*") if "runs" not in path.parts}
    assert handled(Keep(model, {"w": torch.ones(1)})).code == "contract"
    assert handled(Train(model, 1, 0, 1, 1, {}, True)).code == "contract"
    assert {path for path in kit.parent.rglob("*") if "runs" not in path.parts} - before <= {
        kit / "local" / "site.toml"
    }
