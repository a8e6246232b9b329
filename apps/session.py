"""One command that makes pictures: its model, what is made, and what is told of it."""

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
from imgdit.apps.jobs.generate import Job, Result, at_free_name, run, same_pixels
from imgdit.apps.jobs.request import Request
from imgdit.apps.jobs.shelf import Shelf
from imgdit.checkpoints import SCENES
from imgdit.images import open_image
from imgdit.pipelines.load_options import AUTO, LoadOptions

LISTED = 8
"""Files that are named each; of more, their number and folder."""


class Session:
    """A command's model, which is loaded when something has to be made, and how the command talks.

    Args:
        model: folder or Hub id; the embedded model by default.
        loading: of the model.
        adapters, sae: folders, see `Shelf`.
        overwrite: make anew what is there already.
        as_json: tell each file as a JSON object.
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
    ):
        self.source, self.loading = model or str(SCENES), loading
        self.shelf = Shelf(self.source, adapters, sae)
        self.overwrite, self.as_json = overwrite, as_json
        self._told: set[str] = set()
        self._folders = (adapters, sae)

    @property
    def name(self) -> str:
        """What answers a request: the model, in the precision and bits that were asked for."""
        return " ".join([self.source, *self.loading.asked])

    @cached_property
    def studio(self) -> Any:
        """The loaded model."""
        calm()
        from imgdit.apps.studio import Studio

        adapters, sae = self._folders
        return Studio(self.source, adapters=adapters, sae=sae, loading=self.loading)

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
            beside: kind and picture of further files that are named after a file.

        Raises:
            ValueError: a further file is there and shows something else.
        """

        def taken(file: Path) -> Path | None:
            there = ((other, picture) for other, (_, picture) in beside(file).items() if other.exists())
            return next((other for other, picture in there if not _shows(other, picture)), None)

        if self.overwrite:
            return jobs_at(out or default)
        if out is None:
            return at_free_name(jobs_at, default, self.name, lambda file: taken(file) is None)
        if other := taken(out):
            raise ValueError(f"{other} is there and shows something else; take another --out, or --overwrite")
        return jobs_at(out)

    def run(self, jobs: Sequence[Job], beside: Mapping[Path, tuple[str, Image.Image]] = {}) -> list[Result]:
        """Make the pictures and tell each file.

        Args:
            beside: further files that are written if anything is made, with their kind.
        """
        single = len(jobs) == 1

        def load() -> Any:
            self.studio.quiet(None if single else True)
            return self.studio

        def bar(left: Sequence[Job]) -> Any:
            return left if single else tqdm(left, desc="pictures", disable=None)

        def before(left: Sequence[Job]) -> None:
            self._before(left)
            for file, (_, picture) in beside.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)

        made = run(load, self.name, jobs, overwrite=self.overwrite, before=before, watching=self._watching, bar=bar)
        results = []
        for result in made:
            results.append(result)
            if self.as_json:
                self._tell_json(result, result.request.outputs)
        files = {file: result.made for result in results for file in result.files}
        files |= {file: any(result.made for result in results) for file in beside}
        if self.as_json:
            for file, (kind, _) in beside.items():
                self._tell_json(results[0]._replace(files=[file], made=files[file], seconds=0.0), (kind,))
        else:
            self._tell(files)
        return results

    def tell_sheet(self, file: Path) -> None:
        """Name a file that is no picture of a request; where programs read those, beside them."""
        typer.echo(f"wrote {file}", err=self.as_json)

    def warn(self, said: str | None) -> None:
        """What should be known before something is made, once for each command."""
        if said and said not in self._told:
            self._told.add(said)
            typer.echo(said, err=True)

    def _before(self, left: Sequence[Job]) -> None:
        for job in left:
            self.shelf.check(job.request)
        self.warn(self.shelf.about_words(job.request.prompt for job in left))

    def _watching(self, studio: Any, request: Request) -> Steps | None:
        self.warn(studio.about_size(request))
        return None if sys.stderr.isatty() else Steps()

    def _tell_json(self, result: Result, kinds: Sequence[str]) -> None:
        for file, kind in zip(result.files, kinds, strict=True):
            values = {
                "file": str(file), "kind": kind, "prompt": result.request.prompt, "seed": result.request.seed,
                "seconds": round(result.seconds, 3), "made": result.made,
            }  # fmt: skip
            typer.echo(json.dumps(values))

    def _tell(self, files: Mapping[Path, bool]) -> None:
        """Every file, or their number and folder."""
        there = sum(not made for made in files.values())
        if there:
            typer.echo(f"{there} of {len(files)} were there already")
        if len(files) <= LISTED:
            for file, made in files.items():
                typer.echo(f"wrote {file}" if made else f"found {file}")
        elif there < len(files):
            folders = dict.fromkeys(str(file.parent) for file in files)
            typer.echo(f"wrote {len(files) - there} pictures to {', '.join(folders)}")


def _shows(file: Path, picture: Image.Image) -> bool:
    """Whether a file holds a picture, pixel by pixel."""
    try:
        return same_pixels(open_image(file).convert("RGB"), picture.convert("RGB"))
    except ValueError:  # no picture
        return False
