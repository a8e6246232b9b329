"""From lists of requests to folders of pictures: read, plan, make what is missing."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin

from imgdit.apps.jobs.request import Control, Origin, Request, read_origin, write_png
from imgdit.images import open_image
from imgdit.images.sheet import contact_sheet
from imgdit.io.safe_json import as_object, inside, parse_json, parse_object
from imgdit.io.text import decode_text, read_text, split_lines
from imgdit.naming import check_name

PROMPTS = (
    "a photo of a red cube on a wooden floor",
    "a cartoon of a blue torus under a clear sky",
    "a green pyramid at night, neon style",
    "a mosaic of a yellow sphere left of a purple cone at sunset",
    "a pencil sketch of an orange cylinder on a checkered floor",
    "a pink octahedron left of a cyan capsule in a grey studio, photo style",
)
"""What `imgdit generate` shows if nothing is asked for."""
LINE_KEYS = (
    "prompt", "negative_prompt", "seed", "steps", "guidance", "height", "width", "control", "name", "num_images",
)  # fmt: skip
"""What a JSON line may say; without `prompt` nothing."""
LONGEST = 60
"""Letters of a file's name that is made of a sentence."""
SHEET = "imgdit-sheet"
"""Text chunk that marks a PNG as a contact sheet, which may be replaced by another."""
MOST = 100_000
"""Pictures of one line."""


class Line(NamedTuple):
    """What one sentence, or one line of a file, asks for."""

    request: Request
    name: str | None = None
    """Of its file, without the ending."""
    num_images: int | None = None
    own_seed: bool = False
    """Whether it says its seed."""


class Job(NamedTuple):
    """What is to be made, and the file of its first picture."""

    request: Request
    file: Path

    @property
    def files(self) -> list[Path]:
        """A file for each picture that the request makes."""
        return [output_file(self.file, i) for i in range(len(self.request.outputs))]


class Result(NamedTuple):
    """Files that answer a request."""

    files: list[Path]
    request: Request
    """With its defaults filled in."""
    seconds: float
    """That it took; 0 if it was there already."""
    made: bool
    """Whether it was made now."""


def read_lines(file: str | Path, base: Request) -> Iterator[Line]:
    """Lines of a file of sentences or of JSON objects.

    Args:
        file: one sentence or JSON object a line, told apart by each line's first letter, or one JSON array of objects;
            "-" for what is piped in. Empty lines are passed over. A file's lines name pictures in its folder; what is
            piped in may name any.
        base: what the lines do not say.

    Raises:
        ValueError: a line that says what no request has; its number is told.
    """
    if str(file) == "-":
        text, folder = decode_text(sys.stdin.buffer.read(), "what is piped in"), None
    else:
        text, folder = read_text(file), Path(file).parent
    if re.match(r"\s*\[\s*[{\n]", text):
        for number, values in enumerate(parse_json(text, str(file)), start=1):
            with _told(f"{file}, entry {number}"):
                yield _line(as_object(values, "the entry"), base, folder)
        return
    for number, line in enumerate(split_lines(text), start=1):
        if not line.strip():
            continue
        with _told(f"{file}, line {number}"):
            if line.lstrip().startswith("{"):
                yield _line(parse_object(line, "the line"), base, folder)
            else:
                yield Line(replace(base, prompt=line.strip()))


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Where an error is."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error


def _line(values: Mapping[str, Any], base: Request, folder: Path | None) -> Line:
    for key in values:
        check_name("key", key, LINE_KEYS)
    if not isinstance(values.get("prompt"), str):
        raise ValueError(f'expected "prompt": "a sentence", got {values.get("prompt")!r}')
    said = {key: value for key, value in values.items() if key not in ("control", "name", "num_images")}
    for key, value in said.items():
        expected: Any = str if key in ("prompt", "negative_prompt") else (int, float) if key == "guidance" else int
        if not isinstance(value, expected) or isinstance(value, bool):
            raise ValueError(f"{key} cannot be {value!r}")
    if "control" in values:
        said["controls"] = tuple(
            Control(kind, open_image(file if folder is None else inside(folder, file)))
            for kind, file in _controls(values["control"])
        )
    name, count = values.get("name"), values.get("num_images")
    if name is not None and not re.fullmatch(r"[\w][\w .-]*", str(name)):
        raise ValueError(f"name is a file name of letters, digits, spaces, dots and dashes, got {name!r}")
    if count is not None and (type(count) is not int or not 1 <= count <= MOST):
        raise ValueError(f"num_images must be a whole number from 1 to {MOST}, got {count!r}")
    return Line(replace(base, **said), name, count, "seed" in values)


def _controls(values: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(values, dict) or not all(isinstance(file, str) for file in values.values()):
        raise ValueError(f"control must name a file for each kind, as {{'depth': 'depth.png'}}; got {values!r:.80}")
    return values.items()


def plan(lines: Iterable[Line], out: Path, num_images: int = 1) -> tuple[list[Job], Path | None]:
    """Every picture and its file, and the file of the sheet of all; `None` for a single picture.

    Seeds count up over the pictures, or from a line's own seed over its pictures, so each can be made again alone.

    Args:
        out: a file for one picture, otherwise a folder.
        num_images: of each line that does not say.

    Raises:
        ValueError: two pictures of one name, or a file for several.
    """
    jobs: list[Job] = []
    for line in lines:
        count = line.num_images or num_images
        for k in range(count):
            stem = f"{len(jobs):03d}" if line.name is None else line.name if count == 1 else f"{line.name}-{k}"
            seed = line.request.seed + (k if line.own_seed else len(jobs))
            jobs.append(Job(replace(line.request, seed=seed), out / f"{stem}.png"))
    if not jobs:
        raise ValueError("there is no prompt to make an image of: the prompts are empty")
    names = [job.file.name for job in jobs]
    for name in names:
        if names.count(name) > 1 or name == "sheet.png":
            raise ValueError(f"two pictures would be called {name}; give each line a name of its own")
    if len(jobs) == 1 and out.suffix:
        return [Job(jobs[0].request, out)], None
    if out.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"{len(jobs)} pictures need a folder, got the file {out}; leave out {out.suffix}")
    return jobs, out / "sheet.png" if len(jobs) > 1 else None


def named(requests: Iterable[Request]) -> list[Line]:
    """Lines whose files are called by what they say."""
    lines: list[Line] = []
    for request in requests:
        stem = re.sub(r"\W+", "-", request.prompt.lower()).strip("-_")[:LONGEST].rstrip("-") or "picture"
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        lines.append(Line(request, next(name for name in names if all(line.name != name for line in lines))))
    return lines


def at_free_name(
    jobs_at: Callable[[Path], Sequence[Job]],
    out: Path,
    model: str,
    free: Callable[[Path], bool] = lambda file: True,
) -> list[Job]:
    """Jobs at a file, or at the first with a number behind its name where no file of theirs shows something else.

    Args:
        jobs_at: the jobs whose files are named after a file.
        out: the file without a number.
        model: see `run`.
        free: whether what else belongs to a file may be written.
    """

    def usable(file: Path) -> bool:
        return free(file) and all(_usable(one, job, model) for job in jobs_at(file) for one in job.files)

    return list(jobs_at(first_free(out, usable)))


def first_free(out: Path, free: Callable[[Path], bool]) -> Path:
    """A file, or the first with a number behind its name that is free."""
    return next(file for file in map(output_file, itertools.repeat(out), itertools.count()) if free(file))


def at_free_names(jobs: Sequence[Job], model: str) -> list[Job]:
    """The jobs, each at its first free name, see `at_free_name`."""
    found: list[Job] = []
    for job in jobs:
        taken = {file for one in found for file in one.files}
        request = job.request
        found += at_free_name(lambda file: [Job(request, file)], job.file, model, lambda file: file not in taken)  # noqa: B023
    return found


def _usable(file: Path, job: Job, model: str) -> bool:
    """Whether a file is not there yet, or answers the job already."""
    try:
        return not file.exists() or _answers(file, job, model)
    except ValueError:  # somebody else's, and damaged
        return False


def _answers(file: Path, job: Job, model: str) -> bool:
    origin = read_origin(file)
    return origin is not None and origin.asked == job.request.digest(model)


def check_png(file: Path) -> None:
    """Refuse a file name that is no PNG's."""
    if file.suffix.lower() != ".png":
        raise ValueError(f"pictures are PNG files, which tell how they were made; got {file}, name it ….png")


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
            if not _answers(file, job, model):
                raise ValueError(f"{file} is there and shows something else; take another --out, or --overwrite")
        if overwrite or len(there) < len(job.files):
            left.append(job)
    return left


def run(
    studio: Callable[[], Any],
    model: str,
    jobs: Sequence[Job],
    *,
    overwrite: bool = False,
    before: Callable[[Sequence[Job]], None] = lambda left: None,
    watching: Callable[[Any, Request], Any] = lambda studio, request: None,
    bar: Callable[[Sequence[Job]], Iterable[Job]] = iter,
) -> Iterator[Result]:
    """Make what is missing, one picture at a time, so that each repeats bit for bit alone; results in order of the
    jobs that are there already, then as they are made.

    Args:
        studio: gives the `Studio`; not called if nothing is missing.
        model: its name, and how it is loaded where that was asked for; a hash of it is kept in the files.
        before: called with what is missing, if anything is, before the model is loaded.
        watching: called with the studio and each request before it is made; gives its `Watch`, or `None`.
        bar: shows how the work goes on.
    """
    left = missing(jobs, model, overwrite)
    for job in jobs:
        if not any(job is one for one in left):
            yield Result(job.files, job.request, 0.0, False)
    if not left:
        return
    before(left)
    maker = studio()
    for job in bar(left):
        watch = watching(maker, job.request)
        start = time.perf_counter()
        made = maker.make(job.request, watch)
        origin = Origin(made.request, maker.places, job.request.digest(model), 0, maker.made_with)
        for i, (picture, file) in enumerate(zip(made.pictures, job.files, strict=True)):
            write_png(picture, file, replace(origin, output=i))
        yield Result(job.files, made.request, time.perf_counter() - start, True)


def output_file(file: Path, output: int) -> Path:
    """File of a request's first or further picture: `view.png`, `view-2.png`, …"""
    return file if output == 0 else file.with_name(f"{file.stem}-{output + 1}{file.suffix}")


def write_sheet(results: Sequence[Result], file: Path) -> Path:
    """All pictures over their sentences, those that steered them at their left; its file, which has a number where
    somebody else's is there."""
    tiles = []
    for result in sorted(results, key=lambda r: r.files):
        picture = open_image(result.files[0])
        given = [control.picture.resize(picture.size) for control in result.request.controls]
        tiles.append(([*given, picture], result.request.prompt))
    file = first_free(file, _may_be_sheet)
    mark = PngImagePlugin.PngInfo()
    mark.add_text(SHEET, "")
    contact_sheet(tiles).save(file, pnginfo=mark)
    return file


def _may_be_sheet(file: Path) -> bool:
    """Whether there is no such file, or a sheet of ours."""
    try:
        return not file.exists() or SHEET in open_image(file).info
    except ValueError:  # no picture
        return False


def same_pixels(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures are the same bit for bit."""
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
