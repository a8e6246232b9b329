"""One command that generates images: its model, its jobs, and what it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import typer
from PIL import Image
from tqdm import tqdm

from imgdit.apps.console import Steps, calm
from imgdit.apps.jobs.plan import Job, at_free_name
from imgdit.apps.jobs.request import Request
from imgdit.apps.jobs.run import Result, run, same_pixels
from imgdit.apps.jobs.shelf import Shelf
from imgdit.checkpoints import SCENES
from imgdit.images import open_image
from imgdit.pipelines.load_options import AUTO, LoadOptions

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
LISTED = 8
"""Files that are named each; of more, their number and folder."""


class ImageCommand:
    """A command's model, which is loaded when something has to be generated, and what the command prints.

    Args:
        model: folder or Hub id; the embedded model by default.
        loading: of the model.
        adapters, sae: folders, see `Shelf`.
        overwrite: generate again what is there already.
        as_json: print each file as a JSON object.
        show: open the first image in the system's viewer, or the folder of several.
    """

    def __init__(
        self,
        model: str | None,
        loading: LoadOptions = AUTO,
        *,
        adapters: Path | None = None,
        sae: Path | None = None,
        overwrite: bool = False,
        as_json: bool = False,
        show: bool = False,
    ):
        self.source, self.loading = model or str(SCENES), loading
        self.shelf = Shelf(self.source, adapters, sae)
        self.overwrite, self.as_json, self.show = overwrite, as_json, show
        self._warned: set[str] = set()

    @property
    def name(self) -> str:
        """What answers a request: the model, in the precision and bits that were asked for."""
        return " ".join([self.source, *self.loading.asked])

    @cached_property
    def session(self) -> Any:
        """The loaded model."""
        calm()
        from imgdit.apps.session import Session

        return Session(self.shelf, self.loading)

    def jobs(
        self,
        jobs_at: Callable[[Path], list[Job]],
        out: Path | None,
        default: Path,
        beside: Callable[[Path], Mapping[Path, Any]] = lambda file: {},
    ) -> list[Job]:
        """The jobs at the file that was asked for, or at the first free one with the default's name.

        Args:
            jobs_at: the jobs whose files are named after a file.
            out: what was asked for.
            default: what is taken otherwise.
            beside: kind and image of further files that are named after a file.

        Raises:
            ValueError: a further file is there and shows something else.
        """

        def taken(file: Path) -> Path | None:
            there = ((other, image) for other, (_, image) in beside(file).items() if other.exists())
            return next((other for other, image in there if not _shows(other, image)), None)

        if self.overwrite:
            return jobs_at(out or default)
        if out is None:
            return at_free_name(jobs_at, default, self.name, lambda file: taken(file) is None)
        if other := taken(out):
            raise ValueError(f"{other} is there and shows something else; take another --out, or --overwrite")
        return jobs_at(out)

    def run(self, jobs: Sequence[Job], beside: Mapping[Path, tuple[str, Image.Image]] = {}) -> list[Job]:
        """Generate what is missing and print each file; the jobs, with their defaults filled in.

        Args:
            beside: further files that are written if anything is generated, with their kind.
        """
        single = len(jobs) == 1

        def load() -> Any:
            self.session.quiet(None if single else True)
            return self.session

        def bar(left: Sequence[Job]) -> Any:
            return left if single else tqdm(left, desc="images", disable=None)

        def before(left: Sequence[Job]) -> None:
            self._before(left)
            for file, (_, image) in beside.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)

        results: list[Result] = []
        options: dict[str, Any] = {"before": before, "watching": self._watching, "bar": bar}
        try:
            for result in run(load, self.name, jobs, overwrite=self.overwrite, **options):
                results.append(result)
                if self.as_json:
                    self._print_json(result, dict(zip(result.job.files, result.job.request.outputs, strict=True)))
        except KeyboardInterrupt:
            typer.echo(_stopped(results, jobs), err=True)
            raise typer.Exit(INTERRUPTED) from None
        files = {file: result.seconds is not None for result in results for file in result.job.files}
        files |= {file: any(result.seconds is not None for result in results) for file in beside}
        if self.as_json:
            for file, (kind, _) in beside.items():
                self._print_json(Result(results[0].job, 0.0 if files[file] else None), {file: kind})
        else:
            self._print(files)
        if self.show:
            first = results[0].job.file
            typer.launch(str(first if single else first.parent))
        return [result.job for result in results]

    def name_sheet(self, file: Path) -> None:
        """Name a file that is no image of a request; where programs read those, beside them."""
        typer.echo(f"wrote {file}", err=self.as_json)

    def warn(self, message: str | None) -> None:
        """What should be known before something is generated, once for each command."""
        if message and message not in self._warned:
            self._warned.add(message)
            typer.echo(message, err=True)

    def _before(self, left: Sequence[Job]) -> None:
        for job in left:
            self.shelf.check(job.request)
        self.warn(self.shelf.about_words(job.request.prompt for job in left))

    def _watching(self, session: Any, request: Request) -> Steps | None:
        self.warn(session.about_size(request))
        return None if sys.stderr.isatty() else Steps()

    def _print_json(self, result: Result, kinds: Mapping[Path, str]) -> None:
        """Files of a result, and what each shows."""
        request = result.job.request
        for file, kind in kinds.items():
            values = {
                "file": str(file), "kind": kind, "prompt": request.prompt, "seed": request.seed,
                "seconds": round(result.seconds or 0.0, 3), "made": result.seconds is not None,
            }  # fmt: skip
            typer.echo(json.dumps(values))

    def _print(self, files: Mapping[Path, bool]) -> None:
        """Every file, or their number and folder; of each, whether it was generated now."""
        there = sum(not new for new in files.values())
        if there:
            typer.echo(f"{there} of {len(files)} were there already")
        if len(files) <= LISTED:
            for file, new in files.items():
                typer.echo(f"wrote {file}" if new else f"found {file}")
        elif there < len(files):
            folders = dict.fromkeys(str(file.parent) for file in files)
            typer.echo(f"wrote {len(files) - there} images to {', '.join(folders)}")


def _stopped(results: Sequence[Result], jobs: Sequence[Job]) -> str:
    """What there is after Ctrl-C, and how to go on."""
    if not results:
        return "stopped; nothing was written"
    folder = jobs[0].file.parent
    return f"stopped; {len(results)} of {len(jobs)} images are in {folder}. The same command goes on there"


def _shows(file: Path, image: Image.Image) -> bool:
    """Whether a file holds an image, pixel by pixel."""
    try:
        return same_pixels(open_image(file).convert("RGB"), image.convert("RGB"))
    except ValueError:  # no image
        return False
