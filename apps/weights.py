"""From the runs of the scenes' recipes to pipelines, and to the folders of `imgdit.checkpoints`."""

from __future__ import annotations

import inspect
from pathlib import Path

from imgdit import ImgDiTPipeline, MMDiT
from imgdit.data.words import caption_tokenizer
from imgdit.training.config import Recipe, build_scheduler
from imgdit.training.scene_frames import SceneFrames, latent_scale
from imgdit.training.trained import load_trained, trained_recipe


def scene_pipeline(recipe: Recipe, transformer: MMDiT) -> ImgDiTPipeline:
    """A pipeline around a transformer of the data "scene_frames", with the autoencoder and text encoder it needs.

    Raises:
        ValueError: a run that the recipe's data names has no checkpoint.
    """
    parameters = inspect.signature(SceneFrames).parameters
    data = {name: parameter.default for name, parameter in parameters.items()} | recipe.data.arguments
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


def save_probe(run: Path, out: Path) -> None:
    """Save a probe's run in half precision.

    Raises:
        ValueError: the run has no checkpoint.
    """
    load_trained(run).half().save_pretrained(out)
