"""From the runs of the scenes' recipes to pipelines, and to the folders of `imgdit.checkpoints`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from imgdit import ImgDiTPipeline, MMDiT
from imgdit.data.words import caption_tokenizer
from imgdit.lora_dialects import LoraPair
from imgdit.lora_files import AdapterInfo, adapter_pairs, write_adapter
from imgdit.training.config import ADAPTER, Recipe, build_scheduler
from imgdit.training.scene_conditions import SceneConditions
from imgdit.training.scene_frames import SceneFrames, latent_scale
from imgdit.training.trained import load_trained, trained_recipe


def scene_pipeline(recipe: Recipe, transformer: MMDiT) -> ImgDiTPipeline:
    """A pipeline around a transformer of the data "scene_frames", with the autoencoder and text encoder it needs.

    Raises:
        ValueError: a run that the recipe's data names has no checkpoint.
    """
    data = _arguments(SceneFrames, recipe)
    vae = load_trained(data["autoencoder"])
    vae.register_to_config(scaling_factor=latent_scale(data["latents"]))
    return ImgDiTPipeline(
        scheduler=build_scheduler(recipe),
        vae=vae,
        text_encoder=load_trained(data["text_encoder"]).encoder,
        tokenizer=caption_tokenizer(),
        transformer=transformer,
    )


def assemble(run: Path, out: Path) -> None:
    """Save the pipeline of a transformer's run.

    Half precision, but for the small text encoder: transformers would compute in whatever is stored.

    Args:
        run: folder of the run.
        out: folder of the pipeline.

    Raises:
        ValueError: a run has no checkpoint.
    """
    pipe = scene_pipeline(trained_recipe(run), load_trained(run))
    pipe.vae.half()
    pipe.transformer.half()
    pipe.save_pretrained(out)


def save_adapter(run: Path, out: Path) -> None:
    """Save the condition adapter of a run as a LoRA file, in half precision.

    Raises:
        ValueError: the run has no checkpoint, or trained no adapter.
    """
    recipe = trained_recipe(run)
    if not recipe.adapter.rank or recipe.data.name != "scene_conditions":
        raise ValueError(f"{run} trained no condition adapter: expected adapter.rank and the data scene_conditions")
    data = _arguments(SceneConditions, recipe)
    pairs = {
        name: LoraPair(pair.down.half(), pair.up.half())
        for name, pair in adapter_pairs(load_trained(run), ADAPTER).items()
    }
    info = AdapterInfo(
        base_model=recipe.model.pretrained,
        task=data["task"],
        position=data["position"],
        scale=1.0,
        mode=data["mode"],
        licence="Apache-2.0",
    )
    write_adapter(out, pairs, info)


def _arguments(dataset: Any, recipe: Recipe) -> dict[str, Any]:
    """What a recipe's data set is called with, defaults included."""
    parameters = inspect.signature(dataset).parameters
    return {name: parameter.default for name, parameter in parameters.items()} | recipe.data.arguments


def save_probe(run: Path, out: Path) -> None:
    """Save a probe's run in half precision.

    Raises:
        ValueError: the run has no checkpoint.
    """
    load_trained(run).half().save_pretrained(out)
