"""What a command generates, and into which files: seeds count up, and every image has a name of its own."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from imgdit.apps.jobs.png import read_origin
from imgdit.apps.jobs.request import Control, Request
from imgdit.images import open_image
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
"""Letters of a file's name that is made of a prompt."""
MOST = 100_000
"""Images of one line."""


class Job(NamedTuple):
    """A request, and the file of its first image."""

    request: Request
    file: Path

    @property
    def files(self) -> list[Path]:
        """A file for each image that the request generates."""
        return [output_file(self.file, i) for i in range(len(self.request.outputs))]


def output_file(file: Path, output: int) -> Path:
    """File of a request's first or further image: `view.png`, `view-2.png`, …"""
    return file if output == 0 else file.with_name(f"{file.stem}-{output + 1}{file.suffix}")


class Plan:
    """The jobs of a command.

    Args:
        num_images: of each request that does not say.
    """

    def __init__(self, num_images: int = 1):
        self.num_images = num_images
        self.jobs: list[Job] = []
        """Their files are named within a folder."""

    def add(
        self, request: Request, name: str | None = None, num_images: int | None = None, own_seed: bool = False
    ) -> None:
        """Add the images of a request. Seeds count up over all images, or from the request's own seed over its images,
        so that each can be generated again alone.

        Args:
            request: its seed is that of the plan's first image, unless it is its own.
            name: of the file, without the ending; a number by default.
            num_images: of this request.
            own_seed: whether the seed is the request's own.
        """
        count = num_images or self.num_images
        for k in range(count):
            number = len(self.jobs)
            stem = f"{number:03d}" if name is None else name if count == 1 else f"{name}-{k}"
            seed = request.seed + (k if own_seed else number)
            self.jobs.append(Job(replace(request, seed=seed), Path(f"{stem}.png")))

    def add_named(self, requests: Iterable[Request]) -> None:
        """Add requests whose files are named after their prompts."""
        names: list[str] = []
        for request in requests:
            stem = re.sub(r"\W+", "-", request.prompt.lower()).strip("-_")[:LONGEST].rstrip("-") or "picture"
            numbered = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
            names.append(next(name for name in numbered if name not in names))
            self.add(request, names[-1])

    def read(self, file: str | Path, base: Request) -> None:
        """Add the lines of a file of prompts or of JSON objects.

        Args:
            file: one prompt or JSON object a line, told apart by each line's first letter, or one JSON array of
                objects; "-" for what is piped in. Empty lines are passed over. A file's lines name images in its
                folder; what is piped in may name any.
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
                with _naming(f"{file}, entry {number}"):
                    self._add_values(as_object(values, "the entry"), base, folder)
            return
        for number, line in enumerate(split_lines(text), start=1):
            if not line.strip():
                continue
            with _naming(f"{file}, line {number}"):
                if line.lstrip().startswith("{"):
                    self._add_values(parse_object(line, "the line"), base, folder)
                else:
                    self.add(replace(base, prompt=line.strip()))

    def _add_values(self, values: Mapping[str, Any], base: Request, folder: Path | None) -> None:
        for key in values:
            check_name("key", key, LINE_KEYS)
        if not isinstance(values.get("prompt"), str):
            raise ValueError(f'expected "prompt": "a prompt", got {values.get("prompt")!r}')
        fields = {key: value for key, value in values.items() if key not in ("control", "name", "num_images")}
        for key, value in fields.items():
            expected: Any = str if key in ("prompt", "negative_prompt") else (int, float) if key == "guidance" else int
            if not isinstance(value, expected) or isinstance(value, bool):
                raise ValueError(f"{key} cannot be {value!r}")
        if "control" in values:
            fields["controls"] = tuple(
                Control(kind, open_image(file if folder is None else inside(folder, file)))
                for kind, file in _controls(values["control"])
            )
        name, count = values.get("name"), values.get("num_images")
        if name is not None and not re.fullmatch(r"[\w][\w .-]*", str(name)):
            raise ValueError(f"name is a file name of letters, digits, spaces, dots and dashes, got {name!r}")
        if count is not None and (type(count) is not int or not 1 <= count <= MOST):
            raise ValueError(f"num_images must be a whole number from 1 to {MOST}, got {count!r}")
        self.add(replace(base, **fields), name, count, "seed" in values)

    def at(self, out: Path) -> tuple[list[Job], Path | None]:
        """The jobs in a folder, and the file of the sheet of all images; a single image may have a file, and has no
        sheet.

        Raises:
            ValueError: no prompt, two images of one name, or a file for several.
        """
        if not self.jobs:
            raise ValueError("there is no prompt to generate an image of: the prompts are empty")
        names = [job.file.name for job in self.jobs]
        for name in names:
            if names.count(name) > 1 or name == "sheet.png":
                raise ValueError(f"two images would be called {name}; give each line a name of its own")
        if len(self.jobs) == 1 and out.suffix:
            return [Job(self.jobs[0].request, out)], None
        if out.suffix.lower() in Image.registered_extensions():
            raise ValueError(f"{len(names)} images need a folder, got the file {out}; leave out {out.suffix}")
        return [Job(job.request, out / job.file) for job in self.jobs], out / "sheet.png" if len(names) > 1 else None


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Where an error is."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error


def _controls(values: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(values, dict) or not all(isinstance(file, str) for file in values.values()):
        raise ValueError(f"control must name a file for each kind, as {{'depth': 'depth.png'}}; got {values!r:.80}")
    return values.items()


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
        model: see `imgdit.apps.jobs.run.run`.
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
        return not file.exists() or answers(file, job, model)
    except ValueError:  # somebody else's, and damaged
        return False


def answers(file: Path, job: Job, model: str) -> bool:
    """Whether a file holds what a job asks of a model."""
    origin = read_origin(file)
    return origin is not None and origin.asked == job.request.digest(model)
