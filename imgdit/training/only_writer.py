"""One process writes a run's folder at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
"""File of a run's folder that its writer holds, and that says who that is."""

# A POSIX lock belongs to the process: it never refuses its own holder, and closing the file anywhere in the process
# lets it go. So a process's own folders are known here, by its number because a fork takes the set along.
_held: set[tuple[int, Path]] = set()


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Write a run's folder alone, until the context ends.

    The kernel lets the lock go when the process ends, however it ends, so there are no stale ones; data workers, which
    may outlive a killed run by seconds, do not inherit it. It holds between machines where the file system has locks.

    Raises:
        ValueError: another process writes there, or this one already does.
    """
    folder = Path(folder).resolve()
    own = (os.getpid(), folder)
    if own in _held:
        raise _refusal(folder, "this process already")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            raise _refusal(folder, file.read().strip() or "another process") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held.add(own)
        try:
            yield
        finally:
            _held.remove(own)


def _refusal(folder: Path, writer: str) -> ValueError:
    return ValueError(
        f"{folder} is being written by {writer}; two runs would destroy each other's checkpoints. Wait until it is "
        "done or end it, or choose another run.folder"
    )
