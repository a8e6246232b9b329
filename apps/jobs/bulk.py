"""Workers of `imgdit.io.bulk`: images from a file of prompts, latents of people's own images, and activations."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from imgdit.data.folders import METADATA
from imgdit.io.atomic import check_index, write_text
from imgdit.io.bulk import run_bulk
from imgdit.pipelines.load_options import AUTO, LoadOptions
from imgdit.pipelines.loading import load_pipeline
from imgdit.recipes import parse_as
from imgdit.training.recipe import Recipe
from imgdit.training.sae_recipe import SAERecipe
from imgdit.training.sae_run import activation_recorder
from imgdit.training.sae_run import load_pipeline as load_recorded
from imgdit.training.user_images import UserImages, UserImagesSettings, settings_of

CHUNK = 64
"""Rows that a worker encodes, and images that it labels, before it writes them."""


class GenerateImages:
    """Generates the images of one chunk of prompts. A chunk is one batch, always the same, so that its pixels
    depend on nothing else.

    Args:
        model: folder or Hub repository of a pipeline.
        out: folder.
        options: of the pipeline's call.
        seed: of the first prompt; the others count up.
        loading: fields of `LoadOptions`.
    """

    def __init__(self, model: str, out: str, options: dict[str, Any], seed: int, loading: dict[str, Any]):
        self.out, self.options, self.seed = Path(out), options, seed
        self.pipe = load_pipeline(model, LoadOptions(**loading))
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        first, prompts = item["first"], list(item["prompts"])
        generators = [torch.Generator().manual_seed(self.seed + first + i) for i in range(len(prompts))]
        images = self.pipe(prompts, generator=generators, **self.options).images
        for number, image in enumerate(images, start=first):
            path = image_file(self.out, number)
            temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
            image.save(temporary)
            temporary.replace(path)
        return {"first": first, "count": len(prompts), "process": os.getpid()}


def image_file(out: Path, number: int) -> Path:
    """File of a prompt's image."""
    return out / f"{number:08d}.png"


def generate_all(
    prompts: Sequence[str],
    out: Path,
    model: str,
    *,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    batch: int = 8,
    loading: LoadOptions = AUTO,
    **engine: Any,
) -> Iterator[dict[str, Any]]:
    """Generate an image per prompt; those that are there are kept. When all are done, the folder gets `metadata.jsonl`
    and can be trained on.

    Args:
        prompts: prompts.
        out: folder.
        model: folder or Hub repository of a pipeline.
        options: of the pipeline's call, such as {"num_inference_steps": 28}.
        seed: of the first image.
        batch: images at a time.
        loading: of the pipeline.
        engine: see `run_bulk`.

    Raises:
        ValueError: the folder holds images of other prompts or settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = " ".join([str(model), *loading.asked])
    origin = {"model": name, "options": options or {}, "seed": seed, "batch": batch, "prompts": list(prompts)}
    check_index(out, origin, "job")
    chunks: list[dict[str, Any]] = [
        {"first": first, "prompts": list(prompts[first : first + batch])} for first in range(0, len(prompts), batch)
    ]
    missing = [
        chunk
        for chunk in chunks
        if not all(image_file(out, chunk["first"] + i).exists() for i in range(len(chunk["prompts"])))
    ]
    arguments = {"model": str(model), "out": str(out.resolve()), "options": options or {}, "seed": seed}
    arguments["loading"] = dataclasses.asdict(loading)
    yield from run_bulk(missing, GenerateImages, arguments, **engine)
    lines = [json.dumps({"file_name": image_file(out, i).name, "text": prompt}) for i, prompt in enumerate(prompts)]
    write_text(out / METADATA, "\n".join(lines) + "\n")


class CacheRows:
    """Fills the caches of some rows.

    Args:
        arguments: fields of `UserImagesSettings`.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.data = UserImages(UserImagesSettings(**{**arguments, "ahead": False}))

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        self.data.fill(range(item["first"], item["first"] + item["count"]))
        return {**item, "process": os.getpid()}


def cache_all(recipe: Recipe, **engine: Any) -> Iterator[dict[str, Any]]:
    """Compute everything that the training of a recipe on the data "user_images" reads.

    Args:
        recipe: of the training.
        engine: see `run_bulk`.

    Raises:
        ValueError: other data, or what `UserImages` raises.
    """
    settings = dataclasses.replace(settings_of(recipe), ahead=False)
    if settings.cache is None:
        raise ValueError("data.arguments.cache is null: the recipe keeps no cache that could be filled")
    # Everything is inspected here, once; the workers find what was found.
    images = UserImages(settings).index.images
    items = [{"first": first, "count": min(CHUNK, len(images) - first)} for first in range(0, len(images), CHUNK)]
    yield from run_bulk(items, CacheRows, {"arguments": dict(recipe.data.arguments)}, **engine)


class CollectActivations:
    """Records the activations of one batch of prompts.

    Args:
        recipe: of `imgdit sae train`, as plain values.
    """

    def __init__(self, recipe: dict[str, Any]):
        parsed = parse_as(SAERecipe, recipe, "the recipe")
        self.recorder = activation_recorder(parsed, load_recorded(parsed))

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**self.recorder.record(item["number"]), "process": os.getpid()}


def collect_all(recipe: SAERecipe, **engine: Any) -> Iterator[dict[str, Any]]:
    """Record everything that the training of a recipe reads, into its `data.shards`.

    Args:
        recipe: of `imgdit sae train`.
        engine: see `run_bulk`.

    Raises:
        ValueError: the recipe keeps nothing on disk, or the folder holds a recording of something else.
    """
    recorder = activation_recorder(recipe, load_recorded(recipe))
    items = [{"number": number} for number in recorder.missing()]
    recorder.pipe = None  # the workers have their own
    for shard in run_bulk(items, CollectActivations, {"recipe": recipe.to_dict()}, **engine):
        recorder.note({name: shard[name] for name in ("file", "prompts", "maps")})
        yield shard
