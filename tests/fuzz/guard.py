"""What a loader may not do, watched by the interpreter itself: Python reports every file it opens, every process it
starts and every object that a pickle asks for before it happens (`sys.addaudithook`).

Files that Rust and C code open themselves are not reported; they open what Python named to them.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = 2 << 30
"""Bytes that loading one input may take on top of what the process had."""
SECONDS = 5
"""Of processor time for one input."""
STUCK = 90
"""Seconds on the clock: a machine may be busy, but something that waits for ever uses no processor time."""

FILES = {
    "open": (0,),
    "os.listdir": (0,),
    "os.scandir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.mkdir": (0,),
}
FILES |= {"os.rmdir": (0,), "os.symlink": (1,), "os.link": (0, 1), "os.truncate": (0,), "os.chmod": (0,)}
FILES |= {"shutil.rmtree": (0,), "shutil.copyfile": (0, 1), "shutil.move": (0, 1), "shutil.unpack_archive": (0, 1)}
NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
NEVER += ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "webbrowser.open", "os.chdir")
SYSTEM = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc/", "/sys/", "/usr/", "/dev/null")
"""What Python itself reads: modules that are imported late, and facts about the machine."""


class Broken(BaseException):
    """Something that no input may cause. No loader catches it."""


class Guard:
    """Watches a process; cannot be taken off again."""

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self.watching = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)
        signal.signal(signal.SIGPROF, self._late)
        signal.signal(signal.SIGALRM, self._late)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Nothing outside, nothing run, no longer than allowed; whoever swallows the objection is found out."""
        self.seen.clear()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, STUCK)
        self.watching = True
        try:
            yield
        finally:
            self.watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self.seen:
                raise Broken(self.seen[0])

    def _late(self, number: int, frame: object) -> None:
        raise Broken(f"hangs: longer than {SECONDS if number == signal.SIGPROF else STUCK} s")

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.watching:
            return
        if event in NEVER:
            self._object(f"{event}{arguments[:2]!r}"[:200])
        for place in FILES.get(event, ()):
            path = arguments[place]
            if isinstance(path, int) or path is None:
                continue
            real = os.path.realpath(os.fsdecode(path))
            writes = event not in ("open", "os.listdir", "os.scandir") or (
                event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            )
            own = real == self.folder or real.startswith(self.folder + os.sep)
            pythons = real.startswith(SYSTEM) or real in map(os.path.realpath, sys.path)  # imports list these
            if not own and (writes or not pythons):
                self._object(f"{event} of {real}")

    def _object(self, what: str) -> None:
        self.seen.append(what)
        raise Broken(what)


def limit_memory() -> None:
    """Let this process have `MEMORY` more address space than it has; more is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
