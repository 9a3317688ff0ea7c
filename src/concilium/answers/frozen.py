"""The tensors of a network that do not train, as a site has them: drawn from the study's seed, or from its own copy of a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from concilium.answers import Settings
from concilium.checkpoints import read_checkpoint, sha256_of
from concilium.data.draws import drawn_from
from concilium.errors import ContractError, DataError
from concilium.freezing import digest_of, freezing, frozen_of
from concilium.matching import match
from concilium.messages import Prepare
from concilium.networks import Stages, beside_build
from concilium.wire import read_tensors, write_tensors

FOLDER = "frozen"
"""Of a site, where it keeps what it has read from a file, so that a run goes on when that is gone."""


def with_frozen(
    settings: Settings, request: Prepare, build: Callable[..., Stages]
) -> tuple[Callable[..., Stages], dict[str, Tensor]]:
    """What builds the network with what of it does not train, and that; raises what `frozen_part` does."""
    frozen = frozen_part(settings, request, build)
    return freezing(build, request.training.tensors, frozen or None), frozen


def frozen_part(settings: Settings, request: Prepare, build: Callable[..., Stages]) -> dict[str, Tensor]:
    """The frozen tensors of the network that `build` makes, which are to the bit those that the server has.

    Raises:
        StudyError: what is to train is not in the network.
        DataError: the site has no copy of the file that they are in, or they come out otherwise than at the server.
        ContractError: the server does not say what they are.
    """
    told = request.frozen
    with drawn_from(request.seed, "weights"):
        drawn = frozen_of(freezing(build, request.training.tensors)())
    if bool(drawn) != bool(told.digest) or not re.fullmatch(r"[0-9a-f]{64}|", told.digest):
        raise ContractError(
            f"{len(drawn)} tensors do not train here, and the server tells the digest {told.digest!r} of them. Expected SHA-256 "
            "where some do not. Use one version of Concilium everywhere."
        )
    if not drawn:
        return {}
    kept = settings.folder / FOLDER / f"{told.digest}.safetensors"
    if told.file and kept.is_file():
        found = read_tensors(kept)[0]
    else:
        found = {**drawn, **_from_file(settings, request, drawn)} if told.file else drawn
    if (own := digest_of(found)) != told.digest:
        source = f"the file with SHA-256 {told.file}" if told.file else f"seed {request.seed}"
        raise DataError(
            f"{len(found)} tensors that do not train come out otherwise here than at the server, from {source}: SHA-256 {own} "
            f"in place of {told.digest}. They must be the same, since what trains is averaged. Use one version of Concilium and "
            "torch everywhere, or a study with [network] weights, a copy of which each site has.",
            code="frozen_differs",
        )
    if told.file and not kept.is_file():
        write_tensors(kept, found, {"sha256": told.file})
    return found


def _from_file(settings: Settings, request: Prepare, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of these tensors is in the site's copy of the file, matched as the server does."""
    file = _copy_of(settings.weights, request.frozen.file)
    refit = beside_build(request.network, "refitted")
    return match(drawn, read_checkpoint(file), request.frozen.names, file, refit=refit).weights


def _copy_of(files: tuple[Path, ...], sha256: str) -> Path:
    found = {file: sha256_of(file) if file.is_file() else "no file" for file in files}
    for file, digest in found.items():
        if digest == sha256:
            return file
    has = ", ".join(f"{file} ({digest})" for file, digest in found.items()) or "none"
    raise DataError(
        f"Some tensors do not train, and so never travel. They are in the file of weights with SHA-256 {sha256}, of which this "
        f"site needs a copy; it has {has}. Get it from whoever runs the study, or where that got it, and name it in site.toml "
        "(weights = 'PATH'). In a simulation it is that of [network] weights.",
        code="no_weights",
    )
