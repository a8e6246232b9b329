"""What `imgdit train --plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from imgdit.training.batches import Batch
from imgdit.training.flops import forward_flops
from imgdit.training.memory import Load, Memory, check_planned, load_of, memory_plan
from imgdit.training.memory_advice import remedies
from imgdit.training.plan import recipe_cost
from imgdit.training.recipe import Recipe
from imgdit.training.sources import training_batches
from imgdit.training.user_images import UserImages
from imgdit.training.user_images.settings import USER_IMAGES, settings_of

PER_PARAMETER = 165
"""Image tokens per parameter at which a computation is used best, at 256 pixels (arXiv 2608.17286)."""
SPEEDS = {"an H100 (400 TFLOP/s reached)": 4e14, "an RTX 4090 (80)": 8e13, "a CPU core (0.03)": 3e10}
"""FLOP per second that training reaches: about 40 % of what an H100 and half of what a 4090 can do in bf16."""
PARTS = ("weights", "gradients", "optimizer", "average", "gathered", "step")


def training_plan(recipe: Recipe, *, gpus: int = 1, gigabytes: float | None = None) -> Iterator[str]:
    """The plan as lines. Reads one batch of the data, as training does; the model is not loaded, nor are the text
    encoders and the autoencoder of a transformer that is trained in its own class: its prompts then count as the
    longest that it takes.

    Args:
        recipe: of an MMDiT, or of a transformer that is trained in its own class.
        gpus: that share weights by FSDP2.
        gigabytes: memory of a GPU; `None`: of this machine's, or of the machine itself.

    Raises:
        ValueError: another kind of model or data.
    """
    load = _load(recipe, gpus)
    limit, owner = _limit(gigabytes)
    found = memory_plan(recipe, load, gpus=gpus)
    yield (
        f"{found.parameters:,} parameters, {found.trained:,} trained; {load.samples} samples at once of "
        f"{load.layout.image_length} image and {load.text_tokens} text tokens, {_step_tokens(recipe, load, gpus):,} "
        f"tokens a step; {gpus} GPU{'s' * (gpus > 1)}"
    )
    yield from (f"  {part:<10}{getattr(found, part) / 1e9:>9.3f} GB" for part in PARTS if getattr(found, part))
    checkpointing = recipe.model.gradient_checkpointing
    other = memory_plan(recipe.replace(model={"gradient_checkpointing": not checkpointing}), load, gpus=gpus)
    yield (f"  step is {other.step / 1e9:.3f} GB with model.gradient_checkpointing: {str(not checkpointing).lower()}")
    yield f"  {'at most':<10}{found.total / 1e9:>9.3f} GB, {_verdict(found, limit)} {limit / 1e9:.1f} GB of {owner}"
    yield from _amount(recipe, load, found.parameters, gpus)
    if found.total <= limit:
        return
    yield "less memory:"
    for what, memory in remedies(recipe, load, limit, gpus=gpus):
        yield f"  {memory.total / 1e9:>9.3f} GB, {_verdict(memory, limit):<13} {what}"


def _step_tokens(recipe: Recipe, load: Load, gpus: int) -> int:
    """Tokens of all samples of an optimiser step."""
    return load.samples * recipe.run.accumulation * gpus * (load.layout.image_length + load.text_tokens)


def _amount(recipe: Recipe, load: Load, parameters: int, gpus: int) -> Iterator[str]:
    """How much data the run sees, and how long it takes at usual speeds."""
    run = recipe.run
    samples = load.samples * run.accumulation * gpus
    tokens = run.steps * samples * load.layout.image_length
    yield (
        f"{run.steps:,} steps of {samples} samples: {tokens:,} image tokens, {tokens / parameters:.3g} per "
        f"parameter; {PER_PARAMETER} use a computation best where a whole model is trained (arXiv 2608.17286)"
    )
    if recipe.model.kind == "transformer":
        forward = forward_flops(recipe, load)
    else:
        forward = recipe_cost(recipe, load.layout.image_length, load.text_tokens).forward_flops
    passes = 4 if recipe.model.gradient_checkpointing else 3  # see `imgdit.mup.cost`
    flops = passes * forward * samples * run.steps
    hours = ", ".join(f"{flops / (gpus * speed) / 3600:.3g} h on {name}" for name, speed in SPEEDS.items())
    yield f"{flops:.2g} FLOP, computed: {hours}{f', {gpus} of them' if gpus > 1 else ''}"


def _verdict(memory: Memory, limit: float) -> str:
    return "fits into" if memory.total <= limit else "too much for"


def _load(recipe: Recipe, gpus: int) -> Load:
    """The load of the data's first full batch."""
    check_planned(recipe)
    portions = recipe.run.accumulation * gpus
    if recipe.run.batch_size % portions:
        raise ValueError(
            f"run.batch_size={recipe.run.batch_size} does not divide by run.accumulation={recipe.run.accumulation} "
            f"times {gpus} GPUs"
        )
    if recipe.data.name == USER_IMAGES:
        changes: dict[str, Any] = {"ahead": False}  # nothing is computed beforehand
        if settings_of(recipe).preprocessor is not None:
            # Any condition has the image's size, and this one needs nothing installed.
            changes |= {"preprocessor": "grey", "preprocessor_options": {}}
        recipe = recipe.replace(data={"arguments": {**recipe.data.arguments, **changes}})
    recipe = recipe.replace(run={"evaluate_every": 0})
    batches, _ = training_batches(recipe)
    if isinstance(batches.dataset, UserImages) and (longest := batches.dataset.row_encoder.encoder.prompt_length):
        numbers = max((batches.dataset.index.rows_of(n) for n in range(5)), key=len)
        layout = batches.dataset.layout(batches.dataset.index.images[numbers[0]].bucket, longest)
        return Load(layout, len(numbers), longest)
    best: Load | None = None
    for n, micro in enumerate(batches.stream(0, recipe.run.batch_size // portions)):
        if not isinstance(micro.batch, Batch):
            raise ValueError(f"data.name={recipe.data.name!r} has no batches of frames")
        load = load_of(micro.batch)
        best = load if best is None or load.samples > best.samples else best
        if n == 4:  # the last batch of a bucket may be smaller
            break
    assert best is not None
    return best


def _limit(gigabytes: float | None) -> tuple[float, str]:
    """Bytes there are, and whose."""
    if gigabytes is not None:
        return gigabytes * 1e9, "a GPU"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    import psutil  # a dependency of accelerate

    return psutil.virtual_memory().available, "this machine's free memory"
