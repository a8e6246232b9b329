"""What was computed once: tensors by the content they were computed from.

    <folder>/index.json                 what they were computed with: another model is refused
    <folder>/0f3a….safetensors          some tensors each; the file's header says which

A file appears whole, under a name nobody else has, and is never changed, so any number of processes and runs may read
and fill one folder at once. Where two made the same tensor, both are right. A kill loses what was not written yet.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from imgdit.io.atomic import check_index, write_tensors
from imgdit.io.lock import one_at_a_time

FORMAT = "imgdit-tensor-cache-1"


class TensorCache:
    """Tensors by key.

    Args:
        folder: made if it is not there.
        made_by: hashes and settings of what computes the tensors.
        shard_bytes: after how many bytes the tensors that were added are written.

    Raises:
        ValueError: the folder holds tensors of something else, or a damaged file.
    """

    def __init__(self, folder: str | Path, origin: Mapping[str, str], shard_bytes: int = 64 << 20):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        check_index(self.folder, {"format": FORMAT, **origin}, "model")
        self._places: dict[str, str] = {}
        self._known: set[str] = set()
        self._open: dict[str, Any] = {}
        self._added: dict[str, torch.Tensor] = {}
        self._waiting = 0  # bytes that were added
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to worker processes

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._added

    def __len__(self) -> int:
        return len(self._places.keys() | self._added.keys())

    def read(self, key: str) -> torch.Tensor:
        """The tensor.

        Raises:
            KeyError: it is not there.
        """
        if key in self._added:
            return self._added[key]
        return self._file(self._places[key]).get_tensor(key)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor; it is on the disk after `flush`, or when enough came together."""
        self._added[key] = tensor.detach().cpu().contiguous().clone()
        self._waiting += self._added[key].nbytes
        if self._waiting >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added.

        Raises:
            ValueError: the disk is full; what was written before stays.
        """
        if self._added:
            name = f"{uuid.uuid4().hex}.safetensors"
            write_tensors(self.folder / name, self._added)
            self._places |= dict.fromkeys(self._added, name)
            self._known.add(name)
            self._added, self._waiting = {}, 0

    def refresh(self) -> None:
        """See what other processes have written."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._known:
                self._places |= dict.fromkeys(self._file(path.name).keys(), path.name)
                self._known.add(path.name)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """One process of the machine at a time: what another has just made is seen and not made again."""
        with one_at_a_time(self.folder):
            self.refresh()
            try:
                yield
            finally:
                self.flush()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is damaged or gone ({error}); delete it if it is there, what it held is made again"
                ) from error
        return self._open[name]


def tensor_key(*parts: Any) -> str:
    """A key from everything that decides the tensor, but for what the cache is made by."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
