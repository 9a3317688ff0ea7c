"""The server's end and a site's end of the connections, over real TLS: who is let in, and what survives a broken wire."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from concilium.engines import _dial, _frames, _hub
from concilium.engines._dial import Dialler
from concilium.engines._frames import HEAD, VERSION, Certificates, Kind, Line, tls
from concilium.engines._hub import Hub, News
from concilium.errors import ContractError, EngineError

MB = 1_000_000
LONG_S = 30.0
"""Only against hanging: the machine may be busy."""
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),  # such as of a socket left open
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]
MakeHub = Callable[..., Hub]


@pytest.fixture
def listen(authority: Any, tmp_path: Path) -> Iterator[MakeHub]:
    """`listen("north", ...)`: a hub with places for these sites; closed with the test."""
    hubs: list[Hub] = []

    def make(*sites: str, name: str = "server", run: str = "run1", **limits: float) -> Hub:
        limits = {"absence_s": LONG_S, "silence_s": LONG_S} | limits
        spool = tmp_path / f"spool{len(hubs)}"
        hubs.append(Hub(authority.issue(name), ("127.0.0.1", 0), sites, run=run, spool=spool, **limits))
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.close()


def next_news(hub: Hub, event: str) -> News:
    """The next news of this kind; there may be no others before."""
    news = hub.news.get(timeout=LONG_S)
    assert news.event == event, news
    return news


def ask(hub: Hub, site: str, sequence: int, body: bytes) -> bytes:
    """Send a request; the reply, which comes next, except for connections made anew and replies that were given twice."""
    hub.send(site, sequence, {"run": "run1", "epoch": hub.epoch(site)}, body)
    until = time.monotonic() + LONG_S
    while (news := hub.news.get(timeout=max(0.0, until - time.monotonic()))).reply is None:
        assert (news.event, news.sequence) != ("reply", sequence)
        assert news.event != "gone"
    assert (news.event, news.site, news.sequence) == ("reply", site, sequence)
    assert news.reply is not None
    content = news.reply.read_bytes()
    news.reply.unlink()
    return content


def quiet(hub: Hub, seconds: float = 0.3) -> bool:
    """Whether no reply and no loss is reported for a while."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        try:
            news = hub.news.get(timeout=left)
            if news.event == "gone" or news.reply is not None:
                return False
        except queue.Empty:
            return True
    return True


# ---------------------------------------------------------------------------------------------------------- the plain way


@pytest.mark.parametrize("size", [1, MB, 20 * MB], ids=["1B", "1MB", "20MB"])
def test_a_request_is_answered_by_the_site_that_the_certificate_names(size: int, listen: MakeHub, join: Any) -> None:
    hub = listen("north", "south")
    north = join("north", hub.port, lambda packed, *_: b"north:" + packed[::-1])
    join("south", hub.port, lambda packed, *_: b"south:" + packed[::-1])
    assert {next_news(hub, "here").site for _ in range(2)} == {"north", "south"}
    body = random.Random(size).randbytes(size)
    assert ask(hub, "north", 1, body) == b"north:" + body[::-1]
    assert ask(hub, "south", 2, body) == b"south:" + body[::-1]
    assert north.lives == [("run1", hub.epoch("north"))]
    assert hub.refused == []


def test_a_handler_sees_the_heading_and_the_cancellation(listen: MakeHub, join: Any, soon: Any) -> None:
    headings: list[dict[str, Any]] = []

    def until_cancelled(packed: bytes, heading: dict[str, Any], cancelled: Callable[[], bool]) -> bytes:
        headings.append(heading)
        soon(cancelled)
        return b"gave up"

    hub = listen("north")
    join("north", hub.port, until_cancelled)
    next_news(hub, "here")
    hub.send("north", 5, {"run": "run1", "deadline_s": 2.5}, b"x")
    soon(lambda: headings)
    hub.cancel("north", 5, forget=False)
    news = next_news(hub, "reply")
    assert news.reply is not None
    assert news.reply.read_bytes() == b"gave up"
    assert headings == [{"run": "run1", "deadline_s": 2.5, "sequence": 5}]

    hub.send("north", 6, {}, b"x")
    soon(lambda: len(headings) == 2)
    hub.cancel("north", 6, forget=True)  # its reply is read and thrown away
    news = next_news(hub, "reply")
    assert (news.sequence, news.reply) == (6, None)


def test_the_end_of_the_run_ends_the_sites(listen: MakeHub, join: Any, soon: Any) -> None:
    hub = listen("north", "south")
    sites = [join(name, hub.port) for name in ("north", "south")]
    for _ in sites:
        next_news(hub, "here")
    hub.close()
    soon(lambda: all(site.ended for site in sites))
    assert [site.error for site in sites] == [None, None]


def test_the_end_of_the_run_cancels_what_a_site_is_at(listen: MakeHub, join: Any, soon: Any) -> None:
    seen: list[str] = []

    def works(packed: bytes, heading: dict[str, Any], cancelled: Callable[[], bool]) -> bytes:
        seen.append("began")
        until = time.monotonic() + 10
        while time.monotonic() < until:
            if cancelled():
                seen.append("cancelled")
                break
            time.sleep(0.01)
        return b""

    hub = listen("north")
    site = join("north", hub.port, works)
    next_news(hub, "here")
    hub.send("north", 1, {}, b"x")
    soon(lambda: seen)
    hub.close()
    soon(lambda: site.ended)
    assert seen == ["began", "cancelled"]


# ------------------------------------------------------------------------------------------------------------ strangers


def connected(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=LONG_S)
    try:
        return context.wrap_socket(raw, server_hostname="127.0.0.1")
    except BaseException:
        raw.close()
        raise


def context_of(files: Certificates, *, certificate: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files.authority))
    if certificate:
        context.load_cert_chain(files.certificate, files.key)
    return context


def hears_nothing(connection: socket.socket) -> bool:
    """Whether the other end hangs up without a word of the protocol."""
    try:
        return connection.recv(1) == b""
    except (ssl.SSLError, ConnectionError):
        return True


def frame(kind: int, heading: bytes = b"", size: int = 0) -> bytes:
    return HEAD.pack(kind, len(heading), size) + heading


def hello(version: int = VERSION, **heading: Any) -> bytes:
    return frame(Kind.HELLO, json.dumps({"version": version, "epoch": 1, "way": "up"} | heading).encode())


def no_certificate(port: int, ours: Any, theirs: Any) -> ssl.SSLSocket:
    return connected(port, context_of(ours.issue("west"), certificate=False))


def foreign_certificate(port: int, ours: Any, theirs: Any) -> ssl.SSLSocket:
    context = context_of(ours.issue("west"), certificate=False)
    foreign = theirs.issue("west")
    context.load_cert_chain(foreign.certificate, foreign.key)
    return connected(port, context)


def no_place(port: int, ours: Any, theirs: Any) -> ssl.SSLSocket:
    connection = connected(port, context_of(ours.issue("elsewhere")))
    connection.sendall(hello())
    return connection


def old_tls(port: int, ours: Any, theirs: Any) -> ssl.SSLSocket:
    context = context_of(ours.issue("west"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return connected(port, context)


def plain(port: int, ours: Any, theirs: Any) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=LONG_S)
    raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
    return raw


def silent(port: int, ours: Any, theirs: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LONG_S)


def says(content: bytes) -> Callable[[int, Any, Any], ssl.SSLSocket]:
    """A stranger with a site's certificate who says this after the handshake."""

    def dial(port: int, ours: Any, theirs: Any) -> ssl.SSLSocket:
        connection = connected(port, context_of(ours.issue("west")))
        connection.sendall(content)
        return connection

    return dial


STRANGERS = {
    "without a certificate": (no_certificate, "peer did not return a certificate"),
    "with one of another authority": (foreign_certificate, "certificate verify failed"),
    "without a place in the study": (no_place, "'elsewhere' has a certificate"),
    "over TLS 1.2": (old_tls, "unsupported protocol"),
    "without TLS": (plain, "SSLError"),
    "who says nothing": (silent, "timed out"),
    "who says garbage": (says(b"\xff" * 100), "A frame of kind 255"),
    "who says HTTP": (says(b"GET / HTTP/1.0\r\n\r\n"), "A frame of kind 71"),
    "of another version": (says(hello(VERSION + 1)), "Expected HELLO of version"),
    "who does not introduce itself": (says(frame(Kind.BEAT)), "Expected HELLO of version"),
    "without an epoch": (says(hello(epoch=None)), "Expected HELLO of version"),
    "with a negative epoch": (says(hello(epoch=-1)), "Expected HELLO of version"),
    "on no known way": (says(hello(way="sideways")), "Expected HELLO of version"),
    "with a heading that is no JSON": (says(frame(Kind.HELLO, b"{'")), "heading is no JSON"),
    "with a heading that is no text": (says(frame(Kind.HELLO, b"\xff\xfe\x00")), "heading is no JSON"),
    "with a heading that is no table": (says(frame(Kind.HELLO, b"[1]")), "heading is no table"),
    "with a heading without end": (says(frame(Kind.HELLO, b"[" * 60_000)), "heading is no JSON"),
    "with too long a heading": (says(HEAD.pack(Kind.HELLO, 1 << 20, 0)), "frame of kind 1 with 1048576"),
    "who greets with a body": (says(frame(Kind.HELLO, b"{}", 1)), r"frame of kind 1 with 2 \+ 1 bytes"),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_refused_and_disturbs_nobody(
    who: str, listen: MakeHub, join: Any, authority: Any, stranger: Any, soon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dial, reason = STRANGERS[who]
    monkeypatch.setattr(_hub, "HANDSHAKE_S", 0.5 if dial is silent else LONG_S)
    hub = listen("north", "west")
    north = join("north", hub.port)
    next_news(hub, "here")
    try:
        connection = dial(hub.port, authority, stranger)
    except (ssl.SSLError, ConnectionError):
        pass  # refused in the handshake
    else:
        with connection:
            assert ask(hub, "north", 1, b"abc") == b"cba"  # while the stranger is there
            assert hears_nothing(connection)
    line = soon(lambda: hub.refused)[0]
    assert re.search(reason, line), line
    assert ask(hub, "north", 2, b"abc") == b"cba"
    assert len(hub.refused) == 1
    assert (hub.epoch("west"), hub.present("west")) == (-1, False)
    assert north.said == []


def test_a_site_that_sends_a_reply_above_the_limit_is_cut_off(listen: MakeHub, authority: Any, soon: Any) -> None:
    hub = listen("west")
    with connected(hub.port, context_of(authority.issue("west"))) as connection:
        connection.sendall(hello())
        assert connection.recv(HEAD.size)[0] == Kind.WELCOME
        connection.sendall(frame(Kind.REPLY, b'{"sequence": 1}', 2**40))
        assert "with 15 + 1099511627776 bytes" in soon(lambda: hub.refused)[0]


@pytest.mark.parametrize(
    ("server", "host", "trusts", "reason"),
    [
        ("south", "127.0.0.1", "authority", "'south' answered. Expected 'server'"),
        ("server", "localhost", "authority", "Hostname mismatch"),
        ("server", "127.0.0.1", "stranger", "certificate verify failed"),
    ],
    ids=["another site", "another host", "another authority"],
)
def test_a_site_is_not_taken_in_by_a_server_that_is_none(
    server: str, host: str, trusts: str, reason: str, listen: MakeHub, soon: Any, request: pytest.FixtureRequest
) -> None:
    hub = listen("north", name=server)
    files = request.getfixturevalue(trusts).issue("north")
    said: list[str] = []
    dialler = Dialler(files, (host, hub.port), patience_s=0.0, say=said.append)
    with pytest.raises(EngineError, match=rf"The server at {host}:{hub.port} could not be reached.*Check that it runs"):
        dialler.serve(lambda run, epoch: pytest.fail("it began"))
    assert reason in said[0]
    assert not hub.present("north")


# --------------------------------------------------------------------------------------------------------- broken wires

CUTS = {"both": (), "the way up": (0,), "the way down": (1,)}


@pytest.mark.parametrize("which", CUTS)
def test_a_wire_that_breaks_between_request_and_reply(
    which: str, listen: MakeHub, join: Any, wire_to: Any, soon: Any
) -> None:
    hub = listen("north")
    wire = wire_to(hub.port)
    at_work, go_on = threading.Event(), threading.Event()

    def works(packed: bytes, *_: Any) -> bytes:
        at_work.set()
        assert go_on.wait(LONG_S)
        return packed[::-1]

    north = join("north", wire.port, works)
    next_news(hub, "here")
    epoch = hub.epoch("north")
    hub.send("north", 1, {}, b"abc")
    assert at_work.wait(LONG_S)
    wire.cut(*CUTS[which])
    next_news(hub, "here")  # it has dialled again
    go_on.set()
    news = next_news(hub, "reply")
    assert news.reply is not None
    assert news.reply.read_bytes() == b"cba"
    assert ask(hub, "north", 2, b"de") == b"ed"
    assert quiet(hub)
    assert north.effects == {1: 1, 2: 1}
    assert (len(north.lives), hub.epoch("north")) == (1, epoch)


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_wire_that_breaks_in_the_middle_of_a_message(
    way: str, listen: MakeHub, join: Any, wire_to: Any, tmp_path: Path
) -> None:
    body = random.Random(1).randbytes(20 * MB)
    hub = listen("north")
    wire = wire_to(hub.port)
    north = join("north", wire.port, lambda packed, *_: packed[:10] if way == "down" else body)
    next_news(hub, "here")
    epoch = hub.epoch("north")
    wire.cut_after(way, 7 * MB)
    assert ask(hub, "north", 1, body if way == "down" else b"x") == (body[:10] if way == "down" else body)
    assert wire.n_cuts_due == 0
    assert quiet(hub)
    assert north.effects == {1: 1}
    assert (len(north.lives), hub.epoch("north")) == (1, epoch)


def test_a_wire_that_breaks_between_the_two_connections(
    listen: MakeHub, join: Any, wire_to: Any, soon: Any, quick_beats: None
) -> None:
    """The way up breaks, and the server has noticed, before the way down stands: the site must not go on with that alone."""
    hub = listen("north")
    wire = wire_to(hub.port)
    north = join("north", wire.port)
    next_news(hub, "here")
    dialled: list[float] = []

    def cut_the_first() -> None:
        dialled.append(time.monotonic())
        if len(dialled) == 2:
            wire.cut()
            soon(lambda: len(hub.refused) >= n_refused + 1, "the server noticed")
            time.sleep(0.2)

    n_refused = len(hub.refused) + 1
    wire.on_dialled = cut_the_first
    wire.cut()
    assert ask(hub, "north", 1, b"abc") == b"cba"
    assert len(dialled) >= 4
    assert (len(north.lives), north.effects) == (1, {1: 1})


def test_a_wire_that_breaks_again_and_again(listen: MakeHub, join: Any, wire_to: Any, quick_beats: None) -> None:
    rng = random.Random(2)
    hub = listen("north", "south")
    wire = wire_to(hub.port)
    sites = [join(name, wire.port) for name in ("north", "south")]
    for _ in sites:
        next_news(hub, "here")
    for number in range(12):
        site = ("north", "south")[number % 2]
        wire.cut_after(rng.choice(["up", "down"]), rng.randrange(400_000))
        body = rng.randbytes(200_000)
        assert ask(hub, site, number, body) == body[::-1]
    assert all(set(site.effects.values()) == {1} for site in sites)
    assert [len(site.lives) for site in sites] == [1, 1]


def test_a_site_without_a_connection_is_lost_and_begins_a_new_life(
    listen: MakeHub, join: Any, wire_to: Any, soon: Any, quick_beats: None
) -> None:
    hub = listen("north", "south", absence_s=0.5)
    wire = wire_to(hub.port)
    north = join("north", wire.port)
    join("south", hub.port)
    for _ in range(2):
        next_news(hub, "here")
    epoch = hub.epoch("north")
    assert ask(hub, "north", 1, b"abc") == b"cba"
    wire.refusing = True
    wire.cut()
    assert next_news(hub, "gone").site == "north"
    assert (hub.present("north"), hub.present("south")) == (False, True)
    wire.refusing = False
    assert next_news(hub, "here").site == "north"
    assert hub.present("north")
    assert hub.epoch("north") != epoch
    assert ask(hub, "north", 2, b"de") == b"ed"
    assert north.lives == [("run1", epoch), ("run1", hub.epoch("north"))]
    assert any("taken this site to be lost" in text for text in north.said)


def test_a_new_life_is_not_asked_what_the_old_one_was(listen: MakeHub, join: Any, wire_to: Any, soon: Any) -> None:
    hub = listen("north")
    wire = wire_to(hub.port)
    go_on = threading.Event()
    first = join("north", wire.port, lambda *_: bytes(go_on.wait(LONG_S)))
    next_news(hub, "here")
    hub.send("north", 1, {}, b"of the first life")
    soon(lambda: first.effects)
    wire.refusing = True  # the machine is gone, and comes back
    wire.cut()
    second = join("north", hub.port)
    next_news(hub, "here")
    assert hub.epoch("north") != first.lives[0][1]
    assert quiet(hub)
    assert not second.effects
    assert ask(hub, "north", 2, b"abc") == b"cba"
    assert second.effects == {2: 1}
    go_on.set()


def test_a_silent_site_is_lost_and_the_others_are_not(
    listen: MakeHub, join: Any, wire_to: Any, quick_beats: None
) -> None:
    hub = listen("north", "south", silence_s=1.5)
    wire = wire_to(hub.port)
    north = join("north", wire.port)
    join("south", hub.port)
    for _ in range(2):
        next_news(hub, "here")
    epoch, began = hub.epoch("north"), time.monotonic()
    wire.flowing.clear()
    assert next_news(hub, "gone").site == "north"
    assert time.monotonic() - began >= 1.25
    assert hub.present("south")
    wire.flowing.set()
    assert next_news(hub, "here").site == "north"  # it was only cut off for a while: it dials, in a new life
    assert hub.epoch("north") != epoch
    assert ask(hub, "north", 1, b"abc") == b"cba"
    assert [epoch for _, epoch in north.lives] == [epoch, hub.epoch("north")]


def test_absence_counts_from_the_end_of_the_connection(
    listen: MakeHub, join: Any, wire_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that computed in silence, as it may, has the whole `absence_s` to dial again."""
    monkeypatch.setattr(_dial, "BEAT_S", LONG_S)
    hub = listen("north", absence_s=2.0)
    wire = wire_to(hub.port)
    north = join("north", wire.port)
    next_news(hub, "here")
    epoch = hub.epoch("north")
    time.sleep(2.3)
    wire.refusing = True
    wire.cut()
    time.sleep(0.5)
    wire.refusing = False
    next_news(hub, "here")
    assert (hub.epoch("north"), len(north.lives)) == (epoch, 1)


def test_a_server_that_is_silent_is_dialled_again(
    listen: MakeHub, join: Any, soon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dial, "BEAT_S", 0.2)
    monkeypatch.setattr(_dial, "DEAF_S", 0.5)
    hub = listen("north")  # beats every two seconds only
    north = join("north", hub.port)
    for _ in range(3):
        next_news(hub, "here")
    assert ask(hub, "north", 1, b"abc") == b"cba"
    assert len(north.lives) == 1


def test_a_server_that_began_another_run_ends_the_site(listen: MakeHub, join: Any, wire_to: Any, soon: Any) -> None:
    hub, other = listen("north"), listen("north", run="run2")
    wire = wire_to(hub.port)
    north = join("north", wire.port)
    soon(lambda: north.lives)
    wire.target = other.port
    wire.cut()
    soon(lambda: north.ended)
    assert isinstance(north.error, EngineError)
    assert "another run than run1" in str(north.error)


@pytest.mark.parametrize("listening", [False, True], ids=["nobody there", "nobody answers"])
def test_a_server_that_never_answers_is_given_up(
    listening: bool, authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dial, "DIAL_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listening:
            server.close()
        said: list[str] = []
        dialler = Dialler(authority.issue("north"), ("127.0.0.1", port), patience_s=1.0, say=said.append)
        began = time.monotonic()
        with pytest.raises(EngineError, match=rf"127.0.0.1:{port} could not be reached for 1 s"):
            dialler.serve(lambda run, epoch: pytest.fail("it began"))
        assert 1.0 <= time.monotonic() - began < 20
        assert len(said) > 1


def test_a_site_that_is_told_to_stop_stops(listen: MakeHub, join: Any, soon: Any) -> None:
    hub = listen("north", absence_s=0.5)
    north = join("north", hub.port)
    next_news(hub, "here")
    north.stop.set()
    soon(lambda: north.ended)
    assert north.error is None
    assert next_news(hub, "gone").site == "north"


def test_a_site_whose_handler_breaks_leaves(listen: MakeHub, join: Any, soon: Any, quick_beats: None) -> None:
    """A connection that goes on beating for a site that no longer answers would never be told lost."""

    def breaks(packed: bytes, *_: Any) -> bytes:
        raise ZeroDivisionError

    hub = listen("north", absence_s=1.0)
    north = join("north", hub.port, breaks)
    next_news(hub, "here")
    hub.send("north", 1, {}, b"x")
    soon(lambda: north.ended)
    assert isinstance(north.error, ZeroDivisionError)
    assert next_news(hub, "gone").site == "north"


def test_nothing_goes_out_in_plain_while_a_connection_is_closed(
    listen: MakeHub, authority: Any, wire_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's SSL sockets forget their encryption before they shut down; a thread that is writing must not notice."""
    hub = listen("west")
    wire = wire_to(hub.port)
    wire.watched = True
    line = Line(connected(wire.port, context_of(authority.issue("west"))))
    shut = socket.socket.shutdown

    def while_shutting(self: socket.socket, how: int) -> None:
        if isinstance(self, ssl.SSLSocket) and self.getpeername()[1] == wire.port:
            with contextlib.suppress(OSError):
                line.write(Kind.REPLY, {}, b"SECRET" * 1000)
            time.sleep(0.2)
        shut(self, how)

    monkeypatch.setattr(socket.socket, "shutdown", while_shutting)
    line.close()
    assert b"".join(wire.seen)
    assert b"SECRET" not in b"".join(wire.seen)


def test_a_frame_is_read_as_it_was_written(authority: Any) -> None:
    near, far = socket.socketpair()
    served: list[Line] = []
    server = threading.Thread(
        target=lambda: served.append(
            Line(tls(authority.issue("server"), server=True).wrap_socket(far, server_side=True))
        )
    )
    server.start()
    context = tls(authority.issue("north"), server=False)
    with context.wrap_socket(near, server_hostname="127.0.0.1") as client:
        server.join()
        (line,) = served
        here = Line(client)
        assert (_frames.peer_name(client), client.version()) == ("server", "TLSv1.3")
        here.write(Kind.REPLY, {"sequence": 3, "ä": "ü"}, b"body")
        here.beat()
        here.write(Kind.BYE)
        frames = []
        for _ in range(3):
            frames.append(line.read(limit=4))
            assert b"".join(line.pieces(frames[-1].size)) == (b"body" if frames[-1].size else b"")
        assert [f.kind for f in frames] == [Kind.REPLY, Kind.BEAT, Kind.BYE]
        assert frames[0].heading == {"sequence": 3, "ä": "ü"}
        here.write(Kind.REPLY, {}, b"12345")
        with pytest.raises(ContractError, match=r"A frame of kind 4 with 0 \+ 5 bytes"):
            line.read(limit=4)
        line.close()
