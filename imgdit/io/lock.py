"""Locks between processes, by `filelock`: the kernel lets them go when a process ends, however it ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, WRITER = ".lock", ".writer"
"""Files of a folder: what its user locks, and what says who its writer is. Two, because Windows lets nobody read a
locked file."""

# A lock never refuses the process that holds it on some systems, and waits for itself on others. So a process's own
# folders are known here, by its number because a fork takes the set along.
_locked: set[tuple[int, Path]] = set()


@contextmanager
def one_at_a_time(folder: str | Path) -> Iterator[None]:
    """One process of the machine after the other; the others wait."""
    with FileLock(Path(folder) / LOCK):
        yield


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Write a run's folder alone, until the context ends.

    There are no stale locks. Data workers, which may outlive a killed run by seconds, do not inherit it. It holds
    between machines where the file system has locks.

    Raises:
        ValueError: another process writes there, or this one already does.
    """
    folder = Path(folder).resolve()
    own = (os.getpid(), folder)
    if own in _locked:
        raise _refusal(folder, "this process already")
    folder.mkdir(parents=True, exist_ok=True)
    writer = folder / WRITER
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        named = writer.read_text(encoding="utf-8").strip() if writer.is_file() else ""
        raise _refusal(folder, named or "another process") from error
    try:
        writer.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        _locked.add(own)
        yield
    finally:
        _locked.discard(own)
        lock.release()


def _refusal(folder: Path, writer: str) -> ValueError:
    return ValueError(
        f"{folder} is being written by {writer}; two runs would destroy each other's checkpoints. Wait until it is "
        "done or end it, or choose another run.folder"
    )
