"""A file of weights as whoever has it reads it: the server, and each site that has a copy. Nothing in it is executed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from concilium.errors import DataError
from concilium.pth import read_pth
from concilium.wire import read_tensors


def sha256_of(file: Path) -> str:
    """Digest of the file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, under the names that they have there.

    Raises:
        DataError: it cannot be read.
    """
    if file.suffix != ".safetensors":
        return read_pth(file)
    try:
        return read_tensors(file)[0]
    except Exception as e:  # whatever a stranger's bytes provoke
        raise DataError(
            f"{file} cannot be used as weights ({type(e).__name__}). Expected a safetensors file. Copy it again."
        ) from e
