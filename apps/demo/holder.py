"""The demo's model: loaded once, used by one request at a time, in turns, stopped by whoever asked for it."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from imgdit.apps.demo.examples import of_scenes
from imgdit.apps.demo.limits import LIMITS, as_sentence
from imgdit.apps.demo.turns import Place, Turns
from imgdit.apps.jobs.plan import output_file
from imgdit.apps.jobs.png import Origin, write_png
from imgdit.apps.jobs.request import Request
from imgdit.apps.session import Generated, Session, Stopped
from imgdit.images import to_image
from imgdit.scenes.render import render
from imgdit.scenes.world import Scene

DEVICE: dict[str, Any] = {
    "concurrency_id": "device",
    "concurrency_limit": LIMITS.queue,
    "show_progress": "hidden",
}
"""Of every event that computes. The status tells how far it is, and what went wrong: gradio's own progress would lie
over the images. Gradio would serve who came first, however much they ask for; so it lets all in that may wait, and
`Turns` says whose turn it is."""
QUICK: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
"""Of what the page does to itself."""
WAKE = 1.0
"""Seconds after which who waits is told how many go before; a window that was closed is noticed then."""
PREVIEWS = 8
"""Images shown while one is generated."""
EXAMPLES = 4
"""Images to try the tabs with."""


@dataclass
class Shown:
    """What a person sees while requests are worked on."""

    status: str
    preview: str | None = None
    """File of the latest of the image that is generated now. Each preview has a file of its own, which is never
    written again: gradio writes an image that it gets as such to the same file each time, also while that is sent."""
    files: list[str] = field(default_factory=list)
    """Finished images."""
    over: bool = False
    """Whether this is the last of it."""


class Holder:
    """The loaded model of the demo.

    Args:
        session: the model.
        folder: where results are written; a temporary one by default. Nothing outside it is written.
    """

    def __init__(self, session: Session, folder: Path | None = None):
        self.session = session
        self.folder = folder or Path(tempfile.mkdtemp(prefix="imgdit-demo-"))
        self.turns = Turns(LIMITS.queue)
        self._asked: dict[str, list[threading.Event]] = {}
        self._asking = threading.Lock()
        session.quiet()

    def close(self) -> None:
        """Delete what was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self, request: gr.Request) -> Any:
        """End what a person's window has running or waiting. That says itself when it has ended: a word from here
        could reach the page later and stay."""
        with self._asking:
            events = self._asked.get(str(request.session_hash), [])
            for event in events:
                event.set()
        return gr.skip() if events else "Nothing of yours is running."

    @contextmanager
    def busy(self, request: gr.Request | None) -> Iterator[None]:
        """Hold the device.

        Raises:
            Full: too many wait.
        """
        with self._line(request) as (place, _):
            self.turns.ahead(place)
            yield

    @contextmanager
    def _line(self, request: gr.Request | None) -> Iterator[tuple[Place, threading.Event]]:
        """Stand in line for the device; the event is set when the person asks to stop."""
        session, event = str(getattr(request, "session_hash", None)), threading.Event()
        with self.turns.line(session) as place:
            with self._asking:
                self._asked.setdefault(session, []).append(event)
            try:
                yield place, event
            finally:
                with self._asking:
                    self._asked[session].remove(event)
                    if not self._asked[session]:
                        del self._asked[session]

    def make(
        self, requests: Sequence[Request], person: gr.Request | None, remarks: Sequence[str] = ()
    ) -> Iterator[Shown]:
        """Work through requests, and show how far they are; the last thing shown has all files. Words and sizes that
        the model was never taught are told by a notice before, and at the end.

        Args:
            requests: in their order.
            person: who asks.
            remarks: what there is to say of what was generated, in messages.
        """
        files: list[str] = []
        previews: list[str] = []
        with self._line(person) as (place, stop), _deleting(previews):
            while ahead := self.turns.ahead(place, WAKE):
                if stop.is_set():
                    yield Shown("Stopped.", None, files, over=True)
                    return
                yield Shown(f"{ahead} before you", None, files)
            remarks_before = [remark for request in requests for remark in self.session.remarks(request)]
            for remark in dict.fromkeys(map(as_sentence, remarks_before)):
                gr.Warning(remark)
            for i, request in enumerate(requests):
                label = f"image {i + 1} of {len(requests)}, " if len(requests) > 1 else ""
                latest = None
                for event in self._stream(request, stop):
                    if isinstance(event, Generated):
                        files += self._save(event, request)
                        break
                    step, steps, preview = event
                    if preview is not None:
                        latest = self.keep(preview)
                        previews.append(latest)
                    yield Shown(f"{label}step {step} of {steps}", latest, list(files))
                else:
                    yield Shown("Stopped.", None, files, over=True)
                    return
        yield Shown(" ".join(["Done.", *remarks, *self._untaught(requests)]), None, files, over=True)

    def _untaught(self, requests: Sequence[Request]) -> list[str]:
        """Messages on words and sizes that the model was never taught."""
        words = self.session.shelf.about_words([request.prompt for request in requests])
        sizes = dict.fromkeys(self.session.about_size(request, timed=False) for request in requests)
        return [as_sentence(remark) for remark in (words, *sizes) if remark]

    def _stream(self, request: Request, stop: threading.Event) -> Iterator[Any]:
        """(step, steps, image or `None`) after each step, then `Generated`; nothing more after a stop.

        The work is done in a thread of its own, because a pipeline calls back and a web page is fed from a loop.
        """
        events: queue.Queue[Any] = queue.Queue()
        left = threading.Event()  # nobody listens any more

        def watch(step: int, steps: int, draw: Any) -> bool:
            every = max(1, steps // PREVIEWS)
            events.put((step, steps, draw() if draw is not None and step % every == 0 and step < steps else None))
            return not (stop.is_set() or left.is_set())

        def work() -> None:
            try:
                events.put(self.session.generate(request, watch))
            except Stopped:
                events.put(None)
            except Exception as error:
                events.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Generated):
                    return
        finally:  # also when the window was closed: the next request must find the device free
            left.set()
            worker.join()

    def _save(self, generated: Generated, asked: Request) -> list[str]:
        """Files of the images, each able to be generated again by `imgdit generate --like`."""
        file = self.new_file()
        session = self.session
        places = session.shelf.places
        origin = Origin(generated.request, places, asked.digest(str(places["model"])), 0, session.made_with)
        files = [output_file(file, i) for i in range(len(generated.images))]
        for i, image in enumerate(generated.images):
            write_png(image, files[i], replace(origin, output=i))
        return [str(file) for file in files]

    def new_file(self) -> Path:
        """Where the next file goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{uuid.uuid4().hex}.png"

    @cached_property
    def examples(self) -> list[str]:
        """Files of images to try the tabs with: scenes that were held out of training; none for other models."""
        files: list[str] = []
        if not of_scenes(self.session):
            return files
        for i in range(EXAMPLES):
            scene = render([Scene.sample(i, "heldout")], self.session.default_size or 512)
            files.append(self.keep(to_image(scene.rgb[0])))
        return files

    @cached_property
    def sae_place(self) -> str:
        """Where the sparse autoencoders are looked for, as strangers may know it."""
        return "/".join(self.session.shelf.sae_folder.parts[-2:])

    @property
    def sides(self) -> tuple[int, int, int]:
        """Smallest and largest side in pixels of an image that may be asked for, and what it is a multiple of."""
        side, step = self.session.default_size or 512, self.session.cell
        step = step if step >= 8 else 16
        return 4 * step, max(LIMITS.side, side), step

    def keep(self, image: Image.Image) -> str:
        """File of an image that is no answer to a request: a preview, a condition, a heat map."""
        file = self.new_file()
        image.save(file)
        return str(file)


@contextmanager
def _deleting(files: Sequence[str]) -> Iterator[None]:
    """Delete files at the end of the context; the page has copies of those that it shows.

    Args:
        files: may grow while the context is open.
    """
    try:
        yield
    finally:
        for file in files:
            Path(file).unlink(missing_ok=True)
