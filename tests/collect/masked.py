"""Sites that take part in rounds of masked updates: all but the training is the real thing, packed as on a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from concilium import wire
from concilium.answers import Settings
from concilium.answers.failing import failure_of
from concilium.answers.secure import Secret, Secure
from concilium.messages import Failure, Hold, PlugIn, Reply, Request, SiteLost, Train, Trained
from concilium.sealing import Identity


class Learner:
    """What a site would have trained."""

    job = SimpleNamespace(training=SimpleNamespace(local_update=PlugIn("plain")))
    draws = None
    """Of a local update that keeps an account, which `plain` does not."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    def train(self, request: Train, *, site: str, cancelled: Callable[[], bool]) -> Trained:
        assert request.send_weights
        return self.trained


@dataclass
class MaskedSites:
    """`trained`: site -> what it trained, or what it answers instead. `lost`: site -> the first request it does not answer."""

    folder: Path
    trained: Mapping[str, Any]
    lost: Mapping[str, type] = field(default_factory=dict)
    after: bool = False
    """Whether a lost site does what it is asked, and only its answer is lost."""
    identities: Mapping[str, Identity] = field(default_factory=dict)
    change: Callable[[str, Request], Request] = lambda site, request: request
    """What the server tells a site in place of a request."""

    def __post_init__(self) -> None:
        self.sites = {name: self.started(name) for name in self.trained}
        self.asked: list[tuple[str, Request]] = []
        self.told: list[tuple[str, Any]] = []
        self.gone: set[str] = set()

    def started(self, name: str) -> Secure:
        """A site in a new life."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        identity = self.identities.get(name)
        settings = Settings(
            name, "site", {}, None, self.folder / name, self.folder, threads=1, device="cpu", identity=identity
        )
        return Secure(settings, run="run")

    def answer(self, site: str, request: Request) -> Any:
        """What a site answers; what it raises is seen."""
        if isinstance(request, Hold):
            trained = self.trained[site]
            if not isinstance(trained, Trained):
                return trained
            return self.sites[site].hold(cast(Any, Learner(trained)), request, lambda: False)
        return self.sites[site].answer(cast(Secret, request))

    def ask(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply | Failure]]:
        """As an engine does."""
        for site, sent in requests.items():
            request = wire.unpack(wire.pack(self.change(site, sent)))
            self.asked.append((site, request))
            if site in self.gone or (isinstance(request, self.lost.get(site, ())) and not self.after):
                self.gone.add(site)
                yield site, SiteLost()
                continue
            try:
                reply = wire.unpack(wire.pack(self.answer(site, request)))
            except Exception as e:
                reply = failure_of(e, f"{site}-0")
            self.told.append((site, reply))
            if isinstance(request, self.lost.get(site, ())):
                self.gone.add(site)
                reply = SiteLost()
            yield site, reply
