"""The order of the data as a pure function, so that a run can go on at the exact sample.

A *position* counts the samples of a run from 0. Which sample stands at a position depends on the seed alone: not on
the batch size, the number of ranks, the number of workers, or where the run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader


class MapDataset(Protocol):
    """What can be trained on. `__len__` is left out by an endless data set."""

    def __getitem__(self, index: int) -> Any:
        """The sample of this number; the same for the same number."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A data set that can be another one when a run goes on, such as a folder of people's images."""

    def fingerprint(self) -> torch.Tensor:
        """(N, 2) int64: hashes of each row's name and of its content, in the order of the rows."""


def row_hash(*parts: Any) -> int:
    """60 bits of a hash of plain values, as fingerprints hold them."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:15], 16)


def text_rows(texts: Sequence[str]) -> torch.Tensor:
    """The fingerprint (N, 2) of a list of texts, whose names they are themselves; one that comes again is numbered."""
    seen: Counter[str] = Counter()
    rows = []
    for text in texts:
        rows.append((row_hash(text, seen[text]), 0))
        seen[text] += 1
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def compare_rows(before: torch.Tensor, now: torch.Tensor) -> str | None:
    """How the rows of a data set differ from those of an earlier fingerprint; `None`: not at all.

    Args:
        before, now: see `Fingerprinted`.
    """
    if torch.equal(before, now):
        return None
    old, new = (dict(rows.tolist()) for rows in (before, now))
    added, gone = len(new.keys() - old.keys()), len(old.keys() - new.keys())
    changed = sum(content != new[name] for name, content in old.items() if name in new)
    if not (added or gone or changed):
        return f"the same {len(now):,} rows in another order"
    return f"{added:,} added, {gone:,} gone, {changed:,} changed; {len(before):,} rows then, {len(now):,} rows now"


class DataOrder:
    """Position -> index of the sample."""

    def __init__(self, length: int | None, seed: int, shuffle: bool = True) -> None:
        """
        Args:
            length: samples of the data set; `None`: endless, and the index is the position.
            seed: decides the permutation of each epoch.
            shuffle: `False`: every epoch in the order of the data set.
        """
        if length is not None and length < 1:
            raise ValueError("the data set has no sample")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self._epoch: tuple[int, torch.Tensor] | None = None

    def __getitem__(self, position: int) -> int:
        if self.length is None:
            return position
        epoch, place = divmod(position, self.length)
        if not self.shuffle:
            return place
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            self._epoch = (epoch, torch.randperm(self.length, generator=generator))
        return int(self._epoch[1][place])


def positions(start: int, size: int, rank: int, ranks: int) -> Iterator[range]:
    """Positions of this rank's micro-batches, from position `start` on without end.

    Micro-batch k of rank r is number `k * ranks + r` of the run: two ranks with one micro-batch per step see what one
    rank with two sees.
    """
    first = start + rank * size
    while True:
        yield range(first, first + size)
        first += ranks * size


class MicroBatch(NamedTuple):
    """What a rank computes on at once."""

    batch: Any
    """What the collate function made."""
    indices: list[int]
    """Numbers of its samples in the data set."""


class Batches:
    """A data set, its order and how its samples become a batch."""

    def __init__(
        self,
        dataset: MapDataset,
        collate: Callable[[list[Any]], Any],
        *,
        seed: int,
        shuffle: bool = True,
        workers: int = 0,
        whole: bool = False,
    ) -> None:
        """
        Args:
            dataset: map-style; without `__len__` it is endless.
            collate: samples -> batch, which has `to(device)`. All samples of a batch must fit one layout: where
                they do not, let each sample of the data set be a whole batch and collate take the only one.
            seed: of the order.
            shuffle: see `DataOrder`.
            workers: processes that prepare samples.
            whole: each sample of the data set is a batch already, whose samples are counted by its `tokens`.
        """
        self.dataset, self.collate, self.workers, self.whole = dataset, collate, workers, whole
        length = len(dataset) if isinstance(dataset, Sized) else None
        self.order = DataOrder(length, seed, shuffle)

    def stream(self, start: int, size: int, rank: int = 0, ranks: int = 1) -> Iterator[MicroBatch]:
        """Micro-batches of `size` samples from position `start` on, without end."""
        numbers = ([self.order[p] for p in chunk] for chunk in positions(start, size, rank, ranks))
        loader: DataLoader = DataLoader(
            _Indexed(self.dataset),  # type: ignore[arg-type]
            batch_sampler=numbers,
            collate_fn=_Collate(self.collate),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            # A loader without its own generator draws its workers' seed from the global one, which a resume would
            # then find one draw further.
            generator=torch.Generator().manual_seed(mixed_seed(self.order.seed, start)),
        )
        return iter(loader)


@contextmanager
def lost_worker() -> Iterator[None]:
    """Say what to do when a process that prepares samples dies. torch raises that from a signal handler, so it can
    come anywhere in the training process.

    Raises:
        RuntimeError: a worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise RuntimeError(
            f"a data worker is gone: {error}. The checkpoints are whole: resume goes on from the latest. If the "
            "machine ran out of memory, lower data.workers or run.batch_size"
        ) from error


class _Indexed:
    """Samples with their numbers. A class, because worker processes receive it by pickle."""

    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[tuple[int, Any]]) -> MicroBatch:
        return MicroBatch(self.collate([sample for _, sample in samples]), [index for index, _ in samples])


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such that (1, 2) and (2, 1) or (0, 3) are unrelated (splitmix64)."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
