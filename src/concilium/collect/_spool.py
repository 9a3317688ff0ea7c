"""Updates that wait on disk until a rule has seen them all: memory holds a tensor of each at a time, not whole networks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from concilium.messages import Tensors


class Spool:
    """A folder for the updates of a round, which goes with the last of them.

    Args:
        folder: where it is made; of a run its engine's spool, which is cleared as the run begins, goes on and ends.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="updates-", dir=folder)
        self._count = 0

    def put(self, tensors: Tensors) -> Tensors:
        """The same tensors, read from disk when they are asked for."""
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        self._count += 1
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
        return _OnDisk(path, tuple(tensors), self)


class _OnDisk(Mapping[str, Tensor]):
    def __init__(self, path: Path, names: tuple[str, ...], owner: Spool) -> None:
        self._path, self._names, self._owner = path, names, owner

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
