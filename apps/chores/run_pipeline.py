"""From the run of a backbone to a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imgdit import NextDiT, OneDiffusionPipeline
from imgdit.apps.chores.weights import scene_pipeline
from imgdit.checkpoints import EMBEDDED
from imgdit.models.bd3lm import BD3LM
from imgdit.pipelines.block_text import BlockTextPipeline
from imgdit.pipelines.masked_text import MaskedTextPipeline
from imgdit.pipelines.vision_language_loading import with_parts
from imgdit.prompts.facts import KEY
from imgdit.scenes.sources import FRAMES, STREAMS, TEXT_PAIRS, TEXTS
from imgdit.scenes.texts import scene_text_tokenizer
from imgdit.schedulers.masked_text import MaskedTextScheduler
from imgdit.training.mmada import MMaDASettings
from imgdit.training.recipe import Recipe
from imgdit.training.sources import source_of
from imgdit.training.trained import load_merged, load_trained, trained_recipe
from imgdit.training.user_images.encoder import Encoder
from imgdit.training.user_images.settings import USER_IMAGES

TEXT_DATA = (TEXTS, TEXT_PAIRS, "user_texts", "user_text_pairs")
"""Data of language models."""
DIALOGUES = "user_dialogues"
"""Data of vision-language models."""
MMADA = "mmada"
"""Data of MMaDA."""
BACKBONE_DATA = (FRAMES, *STREAMS, USER_IMAGES)
"""Data of backbones, which tell what they were taught."""


def run_pipeline(run: Path) -> Any:
    """The pipeline of a run's latest checkpoint: with what reads the scenes for scenes, that of the
    folder which `data.arguments.model` names for "user_images". A FLUX or SD3 folder's stays diffusers' own. A LoRA of
    a language model is added to its weights.

    Raises:
        ValueError: the run has no checkpoint, trained a LoRA of a backbone, or trained none.
    """
    recipe = trained_recipe(run)
    if recipe.data.name in TEXT_DATA:
        return text_pipeline(recipe, load_merged(run) if recipe.adapter.rank else load_trained(run))
    if recipe.data.name == DIALOGUES:
        parts = load_merged(run) if recipe.adapter.rank else load_trained(run)
        return with_parts(recipe.data.arguments["model"], parts)
    if recipe.data.name == MMADA:
        model = load_merged(run) if recipe.adapter.rank else load_trained(run)
        return MMaDASettings(**recipe.data.arguments).tokenizers().pipeline(model)
    if recipe.adapter.rank:
        raise ValueError(f"{run} trained a LoRA, which is a file: imgdit lora export {run} FILE.safetensors")
    if recipe.data.name in (FRAMES, *STREAMS):
        return scene_pipeline(recipe, load_trained(run))
    if recipe.data.name != USER_IMAGES:
        raise ValueError(f"{run} trained on {recipe.data.name!r}; a pipeline comes of {FRAMES!r} and {USER_IMAGES!r}")
    transformer, encoder = load_trained(run), Encoder(recipe.data.arguments.get("model", EMBEDDED))
    pipe = encoder.load()
    if encoder.name in ("FluxPipeline", "StableDiffusion3Pipeline"):
        transformer = transformer.to_diffusers()
    owner: Any = OneDiffusionPipeline if isinstance(transformer, NextDiT) else type(pipe)
    if getattr(pipe, "prompt_words", None) is not None:  # it has learned other captions
        pipe.tokenizer.init_kwargs.pop(KEY)
    return owner(**{**pipe.components, "transformer": transformer})


def text_pipeline(recipe: Recipe, model: Any) -> MaskedTextPipeline | BlockTextPipeline:
    """The pipeline of a trained language model, with its data's tokenizer."""
    if recipe.data.name in (TEXTS, TEXT_PAIRS):
        tokenizer = scene_text_tokenizer()
    else:
        tokenizer = source_of(recipe).open(recipe.data.arguments).tokenizer  # type: ignore[attr-defined]
    if isinstance(model, BD3LM):
        return BlockTextPipeline(model, tokenizer)
    return MaskedTextPipeline(model, MaskedTextScheduler(), tokenizer)
