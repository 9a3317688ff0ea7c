"""What a site that was lost must be told again when it is back: how to prepare, what it shares, and each model's last snapshot.

A site that was lost after it had trained, and before its snapshot, has lost what it had learnt. Whoever asked it then is told so
at once; if nobody did, its next reply is replaced by the news, since the protocol would take it for a site that goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from concilium import wire
from concilium.messages import (
    Done,
    Failure,
    Finish,
    Forget,
    Front,
    Held,
    Hold,
    Maps,
    Pass,
    Passed,
    Prepare,
    Reply,
    Request,
    Restore,
    Share,
    SiteLost,
    Snapshot,
    Train,
    Trained,
)

SHARED = ".share"
"""Where what a site shares stands among the requests that it must be told again. No model is called so."""


class Recovery:
    """Keeps packed requests in a folder, and which sites were lost."""

    def __init__(self, folder: Path, sites: Iterable[str]) -> None:
        self._folder = folder
        self._kept: dict[str, dict[str, Path]] = {site: {} for site in sites}
        """Site -> model -> request that restores it; that which prepares the site has no model and comes first."""
        self._lost: set[str] = set()
        self._ahead: set[tuple[str, str]] = set()
        """Sites that trained a model since their last snapshot of it."""
        self._lapsed: set[str] = set()
        """Those of them that were lost then, which nobody was told yet."""

    def sending(self, site: str, request: Request, packed: bytes) -> None:
        """Note a request on its way."""
        if isinstance(request, Prepare):
            self._kept[site] = {"": self._keep(f"{site}.prepare", packed)}
        if isinstance(request, Share):
            self._kept[site][SHARED] = self._keep(f"{site}.share", packed)

    def settle(self, site: str, request: Request, reply: Reply | Failure) -> Reply | Failure:
        """Note what was answered. The reply, or that the site has lost what it had learnt."""
        match request, reply:
            case ((Snapshot(model, number) | Restore(model, number)), Done()):
                self._kept[site][model] = self._keep(f"{site}.{model}.restore", wire.pack(Restore(model, number)))
                self._ahead.discard((site, model))
            case Forget(model), Done():
                self._kept[site].pop(model, None)
            case ((Train(model) | Front(model) | Finish(model)), (Trained() | Maps())):
                self._ahead.add((site, model))
            case ((Pass() | Hold()), (Passed() | Held())):
                self._ahead.add((site, request.model))
        if site in self._lapsed:
            self._lapsed.discard(site)
            return SiteLost()
        return reply

    def lose(self, sites: set[str], *, told: set[str]) -> None:
        """These sites are gone; of those `told` somebody is told at once."""
        self._lapsed |= {site for site, _ in self._ahead if site in sites} - told
        self._ahead = {(site, model) for site, model in self._ahead if site not in sites}
        self._lost |= sites

    def due(self, site: str) -> list[Path]:
        """The packed requests with which a site that was lost goes on; none for one that was not."""
        if site not in self._lost:
            return []
        self._lost.discard(site)
        return list(self._kept[site].values())

    def keeps(self, path: Path) -> bool:
        """Whether the file is one of those kept."""
        return any(path in kept.values() for kept in self._kept.values())

    def _keep(self, name: str, packed: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(packed)
        return path
