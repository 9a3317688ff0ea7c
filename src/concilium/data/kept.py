"""Files that are whole or not there, whoever writes them; and tensors that are made once and read from then on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


@contextmanager
def whole(path: Path) -> Iterator[str]:
    """Another name to write a file under, in the same folder; the file gets its own when the block is through.

    Several processes may write the same file. Where a block fails there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:8]}-", suffix=".tmp")
    try:
        os.close(handle)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def kept(folder: Path | None, key: Sequence[str | int], make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What `make` makes, which is a function of the key alone; without a folder made every time. Each list is a file."""
    if folder is None:
        return list(make())
    file = folder / f"{blake2b(json.dumps(list(key)).encode(), digest_size=16).hexdigest()}.safetensors"
    if not file.is_file():
        made = {f"{i:03d}": t.contiguous() for i, t in enumerate(make())}
        with whole(file) as unfinished:
            save_file(made, unfinished)
    return [t for _, t in sorted(load_file(file).items())]
