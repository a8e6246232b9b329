"""What a recipe of `imgdit sae train` costs, on paper and from configurations alone.

d width of the activations, L features, k of them active, V vectors of a step.

| what | formula |
|---|---|
| vectors of a prompt | image tokens of a step * steps of the sampler |
| prompts | (steps of training * V + half a buffer) / vectors of a prompt |
| transformer, per call | see `imgdit.training.flops` |
| autoencoder, per step | 6 * V * d * (L + k): three products with the encoder, three with k rows of the decoder |
| memory of an autoencoder | (4 weights + 4 gradients + 8 Adam) * (2 d L + d + L) bytes |
| buffer | 4 * d bytes per vector, in the machine's memory |

The transformer's pass runs on tensors without memory, while its linear layers and hookpoints tell their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from imgdit import compat
from imgdit.family import prompt_encodings
from imgdit.frames import Frame
from imgdit.hub import find_pipeline
from imgdit.layout import FrameLayout
from imgdit.models.functional import PATCH
from imgdit.models.mmdit import MMDiT
from imgdit.sae.hooks import find_hookpoints
from imgdit.training.blocks import block_paths
from imgdit.training.flops import counted
from imgdit.training.memory import Load, without_memory
from imgdit.training.recipe import ModelConfig, Recipe, RunConfig
from imgdit.training.sae_recipe import SAERecipe
from imgdit.training.user_images.encoder import cell_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class SAEPlan(NamedTuple):
    """Cost of a run."""

    widths: dict[str, int]
    """Width of the activations by hookpoint."""
    features: dict[str, int]
    """Features by hookpoint."""
    vectors: int
    """Of a prompt."""
    prompts: int
    """That are made; a shorter list is gone through several times, with new noise."""
    parameters: int
    """Of the transformer."""
    model_bytes: int
    """Its weights."""
    sae_bytes: int
    """All autoencoders while they are trained."""
    buffer_bytes: int
    """All buffers, in the machine's memory."""
    calls: int
    """Of the transformer for a prompt."""
    model_flops: float
    sae_flops: float
    """Floating-point operations of the whole run."""

    def hours(self, flops_per_second: float) -> float:
        """Of the run on a GPU that reaches so many."""
        return (self.model_flops + self.sae_flops) / flops_per_second / 3600


def sae_plan(recipe: SAERecipe) -> SAEPlan:
    """Cost of a recipe; only configurations of its pipeline are read.

    Args:
        recipe: with height, width and num_inference_steps in `pipeline.call`.

    Raises:
        ValueError: one of these is missing, or the transformer is of a class whose costs are not known.
    """
    call = recipe.pipeline.call
    missing = [name for name in ("height", "width", "num_inference_steps") if name not in call]
    if missing:
        raise ValueError(f"the cost depends on the images: give pipeline.call.{missing[0]} in the recipe")
    path = find_pipeline(recipe.pipeline.pretrained)
    name = compat.DiffusionPipeline.load_config(path)["_class_name"]
    encodings = prompt_encodings()
    if name not in encodings:
        raise ValueError(f"costs are known for {', '.join(encodings)}, got a {name}")
    side = PATCH * cell_of(MMDiT.load_config(path, subfolder="vae"))
    grid = (call["height"] // side, call["width"] // side)
    text = encodings[name].length
    model = ModelConfig(kind="transformer", pretrained=path, subfolder="transformer")
    whole = Recipe(run=RunConfig(folder="unused", steps=1, batch_size=1), model=model)
    load = Load(FrameLayout.build([Frame(grid)], text), 1, text)
    with without_memory(whole, load) as (transformer, run):
        hookpoints = find_hookpoints(SimpleNamespace(transformer=transformer), recipe.sae.hookpoints)
        with counted(transformer, [point.partition(".")[2] for point in hookpoints]) as found, torch.no_grad():
            run()
        parameters = sum(p.numel() for p in transformer.parameters())
        forward = found.flops(load, len(block_paths(transformer)))
    widths = {point: found.widths[point.partition(".")[2]] for point in hookpoints}
    config, batch, steps = recipe.sae, recipe.run.batch_size, recipe.run.steps
    features = {point: config.num_latents or config.expansion_factor * d for point, d in widths.items()}
    sizes = {point: 2 * d * features[point] + d + features[point] for point, d in widths.items()}
    vectors = grid[0] * grid[1] * call["num_inference_steps"]
    prompts = math.ceil((steps * batch + recipe.data.buffer / 2) / vectors)
    guided = call.get("true_cfg_scale", call.get("guidance_scale", 1.0)) > 1.0
    calls = call["num_inference_steps"] * (2 if guided and not _embeds_guidance(transformer) else 1)
    return SAEPlan(
        widths=widths,
        features=features,
        vectors=vectors,
        prompts=prompts,
        parameters=parameters,
        model_bytes=parameters * _BYTES[recipe.pipeline.dtype],
        sae_bytes=16 * sum(sizes.values()),
        buffer_bytes=4 * recipe.data.buffer * sum(widths.values()),
        calls=calls,
        model_flops=forward * calls * prompts,
        sae_flops=sum(6.0 * batch * d * (features[point] + config.k) for point, d in widths.items()) * steps,
    )


def sae_plan_lines(recipe: SAERecipe, flops_per_second: float) -> Iterator[str]:
    """The plan for the reader.

    Args:
        flops_per_second: what a GPU reaches.
    """
    found, call = sae_plan(recipe), recipe.pipeline.call
    for point, width in found.widths.items():
        yield f"{point}: {found.features[point]:,} features of activations of width {width:,}"
    yield (
        f"{found.vectors:,} vectors per prompt ({call['height']}x{call['width']} pixels, {found.calls} calls of the "
        f"transformer), {recipe.run.steps * recipe.run.batch_size / 1e6:.1f} million in all: {found.prompts:,} "
        "prompts, each with a noise of its own"
    )
    yield (
        f"memory: transformer of {found.parameters / 1e9:.2f} billion parameters {found.model_bytes / 1e9:.1f} GB, "
        f"autoencoders while trained {found.sae_bytes / 1e9:.1f} GB, text encoders and image autoencoder"
        f"{_other_files(recipe)}; buffers {found.buffer_bytes / 1e9:.1f} GB of the machine's memory"
    )
    yield (
        f"time: {found.model_flops:.1e} floating-point operations of the transformer and {found.sae_flops:.1e} of the "
        f"autoencoders, {found.hours(flops_per_second):.1f} hours at {flops_per_second / 1e12:.0f} TFLOP/s"
    )


def _embeds_guidance(model: Any) -> bool:
    return bool(getattr(model.config, "guidance_embeds", False))


def _other_files(recipe: SAERecipe) -> str:
    """Size of the other weights, of a folder on this machine."""
    folder = Path(find_pipeline(recipe.pipeline.pretrained))
    if not folder.is_dir():
        return " besides"
    files = [path for path in folder.rglob("*.safetensors") if path.relative_to(folder).parts[0] != "transformer"]
    return f" {sum(path.stat().st_size for path in files) / 1e9:.1f} GB"
