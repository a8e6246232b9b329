"""Captions of a folder's images, written beside them."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imgdit.apps.jobs.judge import read_image
from imgdit.data.listing import CAPTION_ENDINGS, caption_files, list_folder
from imgdit.io.atomic import write_text
from imgdit.io.bulk import run_bulk
from imgdit.pipelines.image_text_loading import length_option, load_image_text_pipeline
from imgdit.pipelines.load_options import AUTO, LoadOptions


class CaptionImages:
    """Writes the captions of some images. A caption depends on its image and the seed alone, not on the others.

    Args:
        model: folder or Hub repository of a pipeline that writes texts about images.
        folder: of the images.
        options: of the pipeline's `caption`.
        seed: of all captions; each image's own follows from it and the file's name.
        loading: fields of `LoadOptions`.
        length: tokens of a caption at most; `None`: the pipeline's own number.
    """

    def __init__(
        self, model: str, folder: str, options: dict[str, Any], seed: int, loading: dict[str, Any],
        length: int | None = None,
    ):  # fmt: skip
        self.folder, self.seed = Path(folder), seed
        self.pipe = load_image_text_pipeline(model, LoadOptions(**loading))
        self.options = options | length_option(self.pipe, length)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        images, names, broken, written = [], [], [], 0
        for name in item["files"]:
            if self._has_caption(name):  # by a person or another process, since the job began
                continue
            try:
                images.append(read_image(self.folder / name))
                names.append(name)
            except (ValueError, OSError) as error:
                broken.append(f"{name}: {error}")
        if names:
            for name, text in zip(names, self._texts(images, names, broken), strict=True):
                if text is None or self._has_caption(name):
                    continue
                caption = " ".join(text.split())
                if caption:
                    write_text(caption_file(self.folder, name), f"{caption}\n")
                    written += 1
                else:
                    broken.append(f"{name}: the model wrote an empty caption")
        return {"written": written, "broken": broken, "process": os.getpid()}

    def _has_caption(self, name: str) -> bool:
        file = caption_file(self.folder, name)
        return file.is_file() and bool(file.read_bytes().strip())

    def _texts(self, images: list[Image.Image], names: list[str], broken: list[str]) -> list[str | None]:
        """Captions of images, in which one that the pipeline refuses has none and a line in `broken`."""
        generators = [torch.Generator().manual_seed((self.seed << 32) + zlib.crc32(name.encode())) for name in names]
        try:
            return self.pipe.caption(images, generator=generators, **self.options).texts
        except ValueError as error:
            if len(names) == 1:
                broken.append(f"{names[0]}: {error}")
                return [None]
            refused: list[str] = []
            texts = [self._texts([image], [name], refused)[0] for image, name in zip(images, names)]
            if len(refused) == len(names):  # it is not the images
                raise
            broken += refused
            return texts


def caption_file(folder: Path, image: str) -> Path:
    """File of an image's caption."""
    return (folder / image).with_suffix(CAPTION_ENDINGS[0])


def caption_all(
    folder: Path,
    model: str,
    *,
    options: dict[str, Any] | None = None,
    length: int | None = None,
    seed: int = 0,
    batch: int = 8,
    loading: LoadOptions = AUTO,
    **engine: Any,
) -> Iterator[dict[str, Any]]:
    """Write a caption beside each image that has none: `0001.txt` beside `0001.png`. Captions that are there are kept,
    so a job that was stopped goes on.

    Args:
        folder: of images, looked through with all its sub-folders.
        model: folder or Hub repository of a pipeline that writes texts about images.
        options: of its `caption`, such as {"num_inference_steps": 16}.
        length, seed: see `CaptionImages`.
        batch: images at a time.
        loading: of the pipeline.
        engine: see `run_bulk`.

    Raises:
        ValueError: no folder, no image, metadata that would count in the place of captions, or two images whose
            captions would be one file.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} of images")
    listing = list_folder(folder)
    if not listing.images:
        raise ValueError(f"{str(folder)!r} holds no images")
    if listing.metadata:
        raise ValueError(
            f"{str(folder)!r} has {listing.metadata[0]}, whose texts count in the place of captions beside images; "
            "move it away first"
        )
    there, _ = caption_files(listing.images, listing.captions)
    missing = [name for name in listing.images if not there[name]]
    files: dict[Path, str] = {}
    for name in missing:
        other = files.setdefault(caption_file(folder, name), name)
        if other != name:
            raise ValueError(f"{other} and {name} would have one caption file; rename one of them")
    items = [{"files": missing[first : first + batch]} for first in range(0, len(missing), batch)]
    arguments: dict[str, Any] = {
        "model": str(model),
        "folder": str(folder.resolve()),
        "options": options or {},
        "seed": seed,
    }
    arguments |= {"loading": dataclasses.asdict(loading), "length": length}
    yield from run_bulk(items, CaptionImages, arguments, **engine)
