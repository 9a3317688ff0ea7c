"""Which requests an engine may send, and what came as a reply: the same on one machine and between hospitals."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from concilium import wire
from concilium.errors import ContractError
from concilium.messages import FAILURES, REPLIES, Failure, Reply, SiteError


def require_free(asked: Iterable[str], *, sites: Collection[str], pending: Collection[str]) -> None:
    """Raise ContractError where a site that is asked is not known, or has a request outstanding."""
    for site in asked:
        if site not in sites or site in pending:
            raise ContractError(
                f"A request for {site!r} cannot be sent. Expected one of {', '.join(sites)} with none outstanding."
            )


def open_reply(path: Path) -> tuple[Reply | Failure, int]:
    """The reply in a packed file, which is removed, and its size [bytes]; a failure where it is none."""
    content = path.read_bytes()
    path.unlink()
    try:
        reply: Reply | Failure = wire.unpack(content)
    except ContractError:
        return SiteError("ContractError", "damaged_reply", ""), len(content)
    if not isinstance(reply, REPLIES + FAILURES):
        return SiteError("ContractError", "wrong_reply", ""), len(content)
    return reply, len(content)
