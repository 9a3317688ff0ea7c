"""Tensors that are made once and read from then on, each list of them a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def kept(folder: Path | None, key: Sequence[str | int], make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What `make` makes, which is a function of the key alone; without a folder made every time.

    Several processes may make the same: whichever is first, the file is whole.
    """
    if folder is None:
        return list(make())
    file = folder / f"{blake2b(json.dumps(list(key)).encode(), digest_size=16).hexdigest()}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({f"{i:03d}": t.contiguous() for i, t in enumerate(make())}, unfinished)
        unfinished.replace(file)
    return [t for _, t in sorted(load_file(file).items())]
