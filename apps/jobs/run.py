"""From jobs to PNG files: what is there already is kept, what is missing is generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin

from imgdit.apps.jobs.plan import Job, answers, first_free
from imgdit.apps.jobs.png import Origin, write_png
from imgdit.apps.jobs.request import Request
from imgdit.images import open_image
from imgdit.images.sheet import contact_sheet

SHEET = "imgdit-sheet"
"""Text chunk that marks a PNG as a contact sheet, which may be replaced by another."""


class Result(NamedTuple):
    """A job whose files are there."""

    job: Job
    """With the request's defaults filled in where it was generated now."""
    seconds: float | None
    """That it took; `None`: the files were there already."""


def check_png(file: Path) -> None:
    """Refuse a file name that is no PNG's."""
    if file.suffix.lower() != ".png":
        raise ValueError(f"images are PNG files, which tell how they were made; got {file}, name it ….png")


def missing(jobs: Sequence[Job], model: str, overwrite: bool = False) -> list[Job]:
    """The jobs whose files are not all there yet.

    Raises:
        ValueError: a file is there and answers another request, or would be no PNG.
    """
    left = []
    for job in jobs:
        check_png(job.file)
        there = [file for file in job.files if file.exists()]
        for file in [] if overwrite else there:
            if not answers(file, job, model):
                raise ValueError(f"{file} is there and shows something else; take another --out, or --overwrite")
        if overwrite or len(there) < len(job.files):
            left.append(job)
    return left


def run(
    load: Callable[[], Any],
    model: str,
    jobs: Sequence[Job],
    *,
    overwrite: bool = False,
    before: Callable[[Sequence[Job]], None] = lambda left: None,
    watching: Callable[[Any, Request], Any] = lambda session, request: None,
    bar: Callable[[Sequence[Job]], Iterable[Job]] = iter,
) -> Iterator[Result]:
    """Generate what is missing, one request at a time, so that each repeats bit for bit alone; first the jobs whose
    files are there already, then the others as they are done.

    Args:
        load: gives the `Session`; not called if nothing is missing.
        model: its name, and how it is loaded where that was asked for; a hash of it is kept in the files.
        before: called with what is missing, if anything is, before the model is loaded.
        watching: called with the session and each request before it begins; gives its `Watch`, or `None`.
        bar: shows how the work goes on.
    """
    left = missing(jobs, model, overwrite)
    for job in jobs:
        if not any(job is one for one in left):
            yield Result(job, None)
    if not left:
        return
    before(left)
    session = load()
    for job in bar(left):
        watch = watching(session, job.request)
        start = time.perf_counter()
        images, request = session.generate(job.request, watch)
        origin = Origin(request, session.shelf.places, job.request.digest(model), 0, session.made_with)
        for i, (image, file) in enumerate(zip(images, job.files, strict=True)):
            write_png(image, file, replace(origin, output=i))
        yield Result(Job(request, job.file), time.perf_counter() - start)


def write_sheet(jobs: Sequence[Job], file: Path) -> Path:
    """All images over their prompts, those that steered them at their left; its file, which has a number where
    somebody else's is there."""
    tiles = []
    for job in sorted(jobs, key=lambda job: job.files):
        image = open_image(job.file)
        controls = [control.image.resize(image.size) for control in job.request.controls]
        tiles.append(([*controls, image], job.request.prompt))
    file = first_free(file, _may_be_sheet)
    mark = PngImagePlugin.PngInfo()
    mark.add_text(SHEET, "")
    contact_sheet(tiles).save(file, pnginfo=mark)
    return file


def _may_be_sheet(file: Path) -> bool:
    """Whether there is no such file, or a sheet of ours."""
    try:
        return not file.exists() or SHEET in open_image(file).info
    except ValueError:  # no image
        return False


def same_pixels(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images are the same bit for bit."""
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
