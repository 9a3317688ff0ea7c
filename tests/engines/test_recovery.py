"""What a site that comes back is told, and in which order."""

from __future__ import annotations

from pathlib import Path

from concilium import wire
from concilium.engines._recovery import Recovery
from concilium.messages import Done, PlugIn, Prepare, Request, Restore, Share, Snapshot, Training


def prepare() -> Prepare:
    plain = PlugIn("plain")
    training = Training("sgd", 0.1, 0.0, 0.9, "float32", 0.3, False, "none", 12.0, False, 0, plain, plain)
    return Prepare("{}", "2d", plain, training, 5, 0, 1, 0.1)


def test_a_site_that_comes_back_prepares_then_shares_then_goes_back_to_its_models(tmp_path: Path) -> None:
    recovery = Recovery(tmp_path, ["north"])
    sent: list[Request] = [prepare(), Share(("a", "b")), Snapshot("federated", 3)]
    for request in sent:
        recovery.sending("north", request, wire.pack(request))
        recovery.settle("north", request, Done())
    recovery.lose({"north"}, told={"north"})
    told = [wire.unpack(path.read_bytes()) for path in recovery.due("north")]
    assert told == [sent[0], sent[1], Restore("federated", 3)]


def test_to_prepare_anew_forgets_what_was_shared(tmp_path: Path) -> None:
    recovery = Recovery(tmp_path, ["north"])
    for request in (prepare(), Share(("a",)), prepare()):
        recovery.sending("north", request, wire.pack(request))
    recovery.lose({"north"}, told={"north"})
    assert [type(wire.unpack(path.read_bytes())) for path in recovery.due("north")] == [Prepare]
