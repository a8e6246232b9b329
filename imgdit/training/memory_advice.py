"""What would make a training run fit into a GPU: changes of its recipe, with the memory that each leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from imgdit.training.memory import Load, Memory, memory_plan
from imgdit.training.recipe import Recipe

MOST_GPUS = 1024


class Remedy(NamedTuple):
    """One change."""

    what: str
    """For the reader, with the recipe's key."""
    memory: Memory


def remedies(recipe: Recipe, load: Load, limit: float, *, gpus: int = 1) -> Iterator[Remedy]:
    """Changes that take less memory, each alone, then all that need no other machine together, then more GPUs.

    Args:
        recipe: of an MMDiT, or of a transformer that is trained in its own class.
        load: of a micro-batch.
        limit: bytes of a GPU, which the number of GPUs is chosen for.
        gpus: that share weights now.
    """
    before = memory_plan(recipe, load, gpus=gpus).total
    together, smaller, useful = recipe, load, 0
    for what, changed, loads in _changes(recipe, load):
        found = memory_plan(changed, loads, gpus=gpus)
        if found.total < 0.99 * before:
            yield Remedy(what, found)
            together, smaller, useful = (
                _merge(together, changed, recipe),
                min(smaller, loads, key=_samples),
                useful + 1,
            )
    if useful > 1:
        yield Remedy("all of these", memory_plan(together, smaller, gpus=gpus))
    if recipe.model.quantize != "none":
        return
    while gpus < MOST_GPUS:
        gpus *= 2
        found = memory_plan(recipe, load, gpus=gpus)
        if found.total <= limit or gpus == MOST_GPUS:
            yield Remedy(
                f"{gpus} GPUs with FSDP2 (accelerate launch --config_file configs/accelerate/fsdp2.json)", found
            )
            return
        if found.gathered + found.step > limit:  # what more GPUs do not change
            return


def _changes(recipe: Recipe, load: Load) -> Iterator[tuple[str, Recipe, Load]]:
    model, frozen = recipe.model, recipe.adapter.rank and recipe.model.pretrained is not None
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing: true", recipe.replace(model={"gradient_checkpointing": True}), load
    if recipe.run.mixed_precision == "no":
        yield "run.mixed_precision: bf16", recipe.replace(run={"mixed_precision": "bf16"}), load
    elif frozen and model.dtype == "float32" and recipe.run.mixed_precision == "bf16":
        yield "model.dtype: bfloat16", recipe.replace(model={"dtype": "bfloat16"}), load
    if frozen and model.quantize == "none":
        yield "model.quantize: torchao_int8, or int8", recipe.replace(model={"quantize": "int8"}), load
    if frozen and model.quantize != "bnb_nf4":
        yield "model.quantize: bnb_nf4", recipe.replace(model={"quantize": "bnb_nf4"}), load
    if recipe.optimizer.kind in ("adamw", "paged_adamw"):
        yield "optimizer.kind: adamw_8bit", recipe.replace(optimizer={"kind": "adamw_8bit"}), load
    if load.samples > 1:
        half = load._replace(samples=-(-load.samples // 2))
        accumulation = {"accumulation": 2 * recipe.run.accumulation, "batch_size": 2 * recipe.run.batch_size}
        yield "half the samples at once, run.accumulation doubled", recipe.replace(run=accumulation), half
    if not recipe.adapter.rank and model.pretrained is not None:
        yield "adapter.rank: 16 (a LoRA instead of the whole model)", recipe.replace(adapter={"rank": 16}), load


def _merge(together: Recipe, changed: Recipe, recipe: Recipe) -> Recipe:
    """`together` with what `changed` changed of `recipe`."""
    sections = {}
    for name in ("run", "model", "adapter", "optimizer"):
        ours, theirs = vars(getattr(recipe, name)), vars(getattr(changed, name))
        sections[name] = {key: value for key, value in theirs.items() if value != ours[key]}
    return together.replace(**sections)


def _samples(load: Load) -> int:
    return load.samples
