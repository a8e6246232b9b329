"""Whether captions still name what was unlearned: of images with it, and of images that a method generated without it.

A method works on the image that is read, as it does on one that is generated: by the same features of the same block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from imgdit.benchmarks.unlearning.methods.catalogue import Method
from imgdit.benchmarks.unlearning.methods.material import Unlearned
from imgdit.benchmarks.unlearning.plan import Cell, find_image
from imgdit.images import open_image, to_rgb
from imgdit.scenes.caption_parser import parse_caption
from imgdit.scenes.captions import words
from imgdit.scenes.labels import kind_of


def settings_on_images(method: Method) -> Mapping[str, Any] | None:
    """The first settings of a method by which it changes the rows of an image; `None`: it has none."""
    if not method.needs_saes:
        return None
    return next((one for one in method.grid if one.get("stream", "image") == "image"), None)


def chosen_cells(target: str, wanted: Sequence[Cell], count: int) -> tuple[list[Cell], list[Cell]]:
    """Up to so many cells that show a target, and as many that do not, spread over all of them."""
    domain = kind_of(target)
    found = []
    for shows in (True, False):
        cells = [cell for cell in wanted if (cell.expected(domain) == target) == shows]
        found.append([cells[i * len(cells) // count] for i in range(min(count, len(cells)))])
    return found[0], found[1]


def names(caption: str, label: str) -> bool:
    """Whether a caption names a style or an object: by the grammar, or where that cannot read it by the word."""
    parsed = parse_caption(caption)
    if parsed is None:
        return label in words(caption)
    return label == parsed.style or label in [kind for kind, _ in parsed.objects]


def write_captions(
    writer: Any, folder: Path, cells: Sequence[Cell], unlearned: Unlearned | None = None, batch: int = 8
) -> list[str]:
    """A caption of the image of each cell.

    Args:
        writer: pipeline with `caption`.
        folder: of the images.
        unlearned: method that works while captions are written.
    """
    texts: list[str] = []
    with nullcontext() if unlearned is None else unlearned.attach(writer):
        for start in range(0, len(cells), batch):
            files = [find_image(folder, cell) for cell in cells[start : start + batch]]
            texts += writer.caption([to_rgb(open_image(file)) for file in files if file is not None]).texts
    return texts


def counts(target: str, shows: Sequence[Cell], others: Sequence[Cell], texts: Sequence[str]) -> dict[str, Any]:
    """How many captions name the target, of images that should show it, and how many name the right label of its kind,
    of the others.

    Args:
        texts: of `shows` and then of `others`.
    """
    domain = kind_of(target)
    named = [names(text, target) for text in texts[: len(shows)]]
    kept = [names(text, cell.expected(domain)) for text, cell in zip(texts[len(shows) :], others)]
    return {"named": sum(named), "of": len(named), "kept": sum(kept), "of_others": len(kept), "texts": list(texts)}
