"""From the runs of the scenes' recipes to pipelines, and to the folders of `imgdit.checkpoints`."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imgdit import ImgDiTPipeline, MMDiT, NextDiT, OneDiffusionPipeline
from imgdit.checkpoints import EMBEDDED
from imgdit.data.buckets import bucket_sizes
from imgdit.lora.dialects import LoraPair
from imgdit.lora.files import AdapterInfo, adapter_pairs, write_adapter
from imgdit.pipelines.text_frames import QuestionForms, save_text_frames
from imgdit.scenes import sources
from imgdit.scenes.latents import SIZE
from imgdit.scenes.questions import question_forms
from imgdit.scenes.tokenizer import caption_tokenizer, question_tokenizer
from imgdit.scenes.training_conditions import SceneConditions
from imgdit.scenes.training_frames import PATCH, SceneFrames, latent_scale, scene_components
from imgdit.scenes.training_stream import STEP
from imgdit.scenes.training_texts import SceneImageTexts
from imgdit.scenes.trajectories import SceneTrajectories
from imgdit.taught import Taught, write_taught
from imgdit.training.build import build_scheduler
from imgdit.training.objectives.few_steps import few_steps
from imgdit.training.recipe import ADAPTER, Recipe
from imgdit.training.trained import load_trained, trained_recipe
from imgdit.training.user_images.encoder import Encoder
from imgdit.training.user_images.settings import USER_IMAGES, settings_of


def scene_pipeline(recipe: Recipe, transformer: MMDiT | NextDiT) -> ImgDiTPipeline:
    """A pipeline around a transformer of the scenes' frames, with the autoencoder and text encoder it needs; for
    `NextDiT` an `OneDiffusionPipeline`.

    Raises:
        ValueError: a run that the recipe's data names has no checkpoint.
    """
    data = _arguments(SceneFrames, recipe)
    if recipe.data.name in sources.STREAMS:  # of which the model is never a run
        data["model"] = recipe.data.arguments.get("model", EMBEDDED)
    if data["model"] is None:
        vae, text_encoder = load_trained(data["autoencoder"]), load_trained(data["text_encoder"]).encoder
        vae.register_to_config(scaling_factor=latent_scale(data["latents"]))
        tokenizer: Any = caption_tokenizer()
    else:
        vae, text_encoder, tokenizer = scene_components(data["model"])
    owner: Any = OneDiffusionPipeline if isinstance(transformer, NextDiT) else ImgDiTPipeline
    return owner(build_scheduler(recipe), vae, text_encoder, tokenizer, transformer)


def assemble(run: Path, out: Path) -> None:
    """Save the pipeline of a transformer's run.

    Half precision, but for the small text encoder: transformers would compute in whatever is stored.

    Args:
        run: folder of the run.
        out: folder of the pipeline.

    Raises:
        ValueError: a run has no checkpoint.
    """
    recipe = trained_recipe(run)
    pipe = scene_pipeline(recipe, load_trained(run))
    pipe.vae.half()
    pipe.transformer.half()
    pipe.save_pretrained(out)
    write_taught(out, taught_by(recipe))


def taught_by(recipe: Recipe) -> Taught:
    """What a backbone's recipe teaches: its sizes, and whose words."""
    if recipe.data.name == sources.FRAMES:
        size = _arguments(SceneFrames, recipe)["size"]
        return Taught(((size, size),), "scenes")
    if recipe.data.name in sources.STREAMS:
        of_stream = recipe.data.arguments.get("stream") or recipe.data.arguments
        least, greatest = of_stream.get("sizes", (SIZE, SIZE))
        sides = range(least, greatest + 1, STEP)
        return Taught(tuple((width, height) for width in sides for height in sides), "scenes")
    data = settings_of(recipe)
    return Taught(tuple(bucket_sizes(data.base, Encoder(data.model).cell * PATCH, data.ratio)))


def save_adapter(run: Path, out: Path) -> None:
    """Save the LoRA of a run as a file, in half precision, with what its user has to repeat.

    Args:
        run: folder of a run on the data of scenes or "user_images".
        out: file.

    Raises:
        ValueError: the run has no checkpoint, or trained no adapter.
    """
    recipe = trained_recipe(run)
    known = (sources.CONDITIONS, sources.FRAMES, sources.TRAJECTORIES, USER_IMAGES)
    if not recipe.adapter.rank or recipe.data.name not in known:
        raise ValueError(f"{run} trained no adapter: expected adapter.rank and data {' or '.join(known)}")
    pairs = {
        name: LoraPair(pair.down.half(), pair.up.half())
        for name, pair in adapter_pairs(load_trained(run), ADAPTER).items()
    }
    write_adapter(out, pairs, _info(recipe))


def save_texts(run: Path, out: Path) -> None:
    """Save the text frames of a run: adapter, head and tokenizer.

    Args:
        run: folder of a run on texts about scenes.
        out: folder, see `imgdit.pipelines.text_frames`.

    Raises:
        ValueError: the run has no checkpoint, or trained no text frames.
    """
    recipe = trained_recipe(run)
    if not recipe.adapter.rank or recipe.data.name != sources.IMAGE_TEXTS:
        raise ValueError(f"{run} trained no text frames: expected adapter.rank and data {sources.IMAGE_TEXTS}")
    length = _arguments(SceneImageTexts, recipe)["length"]
    info = AdapterInfo(base_model=recipe.model.pretrained, task="text", licence="Apache-2.0")
    questions = QuestionForms(**question_forms())
    save_text_frames(load_trained(run), ADAPTER, question_tokenizer(length), out, info, questions)


def _info(recipe: Recipe) -> AdapterInfo:
    """How a recipe's adapter is trained: on a condition's tokens (OminiControl), or on those of all frames."""
    base_model = recipe.model.pretrained
    if recipe.data.name == USER_IMAGES:
        own = settings_of(recipe)
        shared: dict[str, Any] = {"task": own.condition, "base_model": base_model, "size": own.base, "licence": None}
        if own.mode == "frame":
            return AdapterInfo(**shared, num_inference_steps=_few_steps(recipe))
        return AdapterInfo(position=own.position, scale=1.0, mode=own.mode, **shared)
    shared = {"base_model": base_model, "size": None, "licence": "Apache-2.0"}
    if recipe.data.name == sources.TRAJECTORIES:
        return AdapterInfo(num_inference_steps=_arguments(SceneTrajectories, recipe)["steps"], **shared)
    if recipe.data.name == sources.FRAMES:
        data = _arguments(SceneFrames, recipe)
        tasks = [*data["pairs"]] if [*data["probabilities"]] == ["pairs"] else []
        return AdapterInfo(task=tasks[0] if len(tasks) == 1 else None, **shared)
    data = _arguments(SceneConditions, recipe)
    return AdapterInfo(task=data["task"], position=data["position"], scale=1.0, mode=data["mode"], **shared)


def _few_steps(recipe: Recipe) -> int | None:
    """Steps that a recipe's LoRA is for, if it is a few-step LoRA."""
    if recipe.objective.function is not few_steps:
        return None
    default = inspect.signature(few_steps).parameters["steps"].default
    return recipe.objective.arguments.get("steps", default)


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


def save_saes(runs: Iterable[Path], out: Path) -> None:
    """Save the sparse autoencoders of runs, which are files for use already, with their concepts; those that `out` had
    go."""
    fresh = out.with_name(f"{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for run in runs:
        shutil.copytree(run / "saes", fresh, dirs_exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
