"""The images that unlearning is judged by, in UnlearnCanvas' layout, and what classifiers see in them.

A folder holds `<style>_<object>_seed<number>.jpg` (or .png) for every style, object and seed (arXiv 2402.11846).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from imgdit.scenes.labels import LabelPrompt, draw_prompt
from imgdit.scenes.world import OBJECTS, STYLES

VALIDATION, TEST = 1_000, 188
"""First seeds; UnlearnCanvas' first is 188."""
ENDINGS = (".png", ".jpg")


class Cell(NamedTuple):
    """What an image should show, and its seed."""

    style: str
    object: str
    seed: int

    @property
    def name(self) -> str:
        """Its file's, without the ending."""
        return f"{self.style}_{self.object}_seed{self.seed}"

    @property
    def prompt(self) -> str:
        """A prompt about procedural scenes; colour and place are drawn by the cell, and told apart by classifiers of
        neither."""
        return self.attributes.prompt

    @property
    def attributes(self) -> LabelPrompt:
        """Its prompt, with the colour and the place that it asks for."""
        return draw_prompt(self.style, self.object, self._rng())

    @property
    def noise(self) -> int:
        """Seed of the starting noise: the same for all methods, another for each image."""
        return self._rng("noise").randrange(2**31)

    def _rng(self, what: str = "") -> Random:
        return Random(f"cell {self.name} {what}")

    def expected(self, domain: str) -> str:
        """Its label in the domain "style" or "object"."""
        return self.style if domain == "style" else self.object


def cells(seeds: Iterable[int], styles: Sequence[str] = STYLES, objects: Sequence[str] = OBJECTS) -> list[Cell]:
    """Every style and object with every seed, seeds last, so that a shorter list is a balanced beginning."""
    return [Cell(style, thing, seed) for seed in seeds for style in styles for thing in objects]


def scene_seeds(count: int, first: int = TEST) -> range:
    """Seeds of the images that methods are compared by, or tuned by (`VALIDATION`)."""
    return range(first, first + count)


def find_image(folder: Path, cell: Cell) -> Path | None:
    """The file of a cell."""
    return next((path for end in ENDINGS if (path := folder / f"{cell.name}{end}").is_file()), None)


class Seen(NamedTuple):
    """A cell and what classifiers call its image."""

    cell: Cell
    style: str
    object: str

    def right(self, domain: str) -> bool:
        """Whether the label of a domain is recognised."""
        return self.called(domain) == self.cell.expected(domain)

    def called(self, domain: str) -> str:
        """The label given in the domain "style" or "object"."""
        return self.style if domain == "style" else self.object


Classify = Callable[[Sequence[Path]], Sequence[str]]
"""Labels of images by their files."""


def read_folder(folder: Path, wanted: Sequence[Cell], style: Classify, thing: Classify, batch: int = 32) -> list[Seen]:
    """What two classifiers see in a folder's images.

    Raises:
        ValueError: images are missing.
    """
    files = {cell: file for cell in wanted if (file := find_image(folder, cell)) is not None}
    missing = [cell.name for cell in wanted if cell not in files]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(wanted)} images, {missing[0]}.jpg or .png among them; every "
            "style needs one with every object for every seed"
        )
    found: list[Seen] = []
    for first in range(0, len(wanted), batch):
        part = wanted[first : first + batch]
        paths = [files[cell] for cell in part]
        found += [Seen(*row) for row in zip(part, style(paths), thing(paths), strict=True)]
    return found
