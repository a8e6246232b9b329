"""The model, adapter and scheduler that a recipe names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from imgdit.adapters.stock_frames import StockFrames
from imgdit.family import find_family
from imgdit.hub import find_model
from imgdit.io.checkpoints import find_checkpoint, load_weights, read_shapes, read_state
from imgdit.lora.config import OMINICONTROL_TARGETS
from imgdit.models.quantized import load_options, quantize_rows
from imgdit.training.objectives.alignment import HEAD, add_head, drop_head
from imgdit.training.recipe import ADAPTER, AdapterConfig, ModelConfig, Recipe, parse_recipe


def build_model(recipe: Recipe) -> torch.nn.Module:
    """The model of a recipe, new weights drawn from `run.seed` or loaded; ready to train.

    Raises:
        CheckpointError: the run to start from has no checkpoint, or one of another architecture.
        ImportError: what `model.quantize` names is not installed.
    """
    config = recipe.model
    if config.pretrained is not None:
        dtype = getattr(torch, config.dtype)
        # A function is the loader itself.
        load = getattr(config.model_class, "from_pretrained", config.model_class)
        model = load(
            pretrained_folder(config), subfolder=config.subfolder or None, dtype=dtype,
            **load_options(config.quantize, dtype),
        )  # fmt: skip
        if config.quantize == "int8":
            quantize_rows(model)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.run.seed)
            model = config.model_class(**config.arguments)
        # transformers' models draw their weights when they are built; their method of this name is another.
        if hasattr(model, "init_weights") and not isinstance(model, PreTrainedModel):
            model.init_weights(torch.Generator().manual_seed(recipe.run.seed))
        if config.start_from is not None and not any(p.is_meta for p in model.parameters()):
            _load_earlier(model, find_checkpoint(config.start_from))
    if recipe.adapter.rank:
        add_adapter(model, recipe.adapter, recipe.run.seed)
    add_head(model, recipe.objective.function, recipe.run.seed)
    family = find_family(model)
    if family is not None and family.training is not None:
        StockFrames(model)
    if config.gradient_checkpointing:
        if isinstance(model, PreTrainedModel):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.enable_gradient_checkpointing()
    return model.train()


def _load_earlier(model: torch.nn.Module, checkpoint: Path) -> None:
    """The weights of an earlier run without its alignment head, if it had one."""
    if any(name.startswith(f"{HEAD}.") for name in read_shapes(checkpoint / "model.safetensors")):
        earlier = parse_recipe(read_state(checkpoint, ("recipe",))["recipe"], str(checkpoint))
        add_head(model, earlier.objective.function, earlier.run.seed)
    load_weights(model, checkpoint)
    drop_head(model)


def pretrained_folder(config: ModelConfig) -> str:
    """Where a model's weights come from, see `imgdit.hub.find_model`."""
    assert config.pretrained is not None
    return find_model(config.pretrained, f"{config.subfolder}/config.json".lstrip("/"))


def add_adapter(model: Any, config: AdapterConfig, seed: int) -> None:
    """Freeze a model, but for `config.modules`, and put a LoRA on it, called `ADAPTER`, that changes nothing yet.

    Raises:
        ValueError: `config.modules` names no module of the model.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    model.requires_grad_(False)
    family = find_family(model)
    own = () if family is None or family.lora is None else family.lora.targets
    targets = own if own and config.targets == OMINICONTROL_TARGETS else config.targets
    pattern = "|".join(f"(?:{target})" for target in targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=pattern), ADAPTER
        )
    for whole in config.modules:
        found = [module for name, module in model.named_modules() if re.fullmatch(whole, name)]
        if not found:
            raise ValueError(f"adapter.modules names {whole!r}, which is no module of {type(model).__name__}")
        for module in found:
            module.requires_grad_(True)
    cast_training_params(model)  # PEFT makes an adapter of what its layer is made of


def build_scheduler(recipe: Recipe) -> Any:
    """The `MultiFrameFlowMatchScheduler` of a recipe. One that says nothing of it and trains the transformer of a
    pipeline's folder has the pipeline's."""
    from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler

    config = recipe.model
    if not recipe.scheduler and config.kind == "transformer" and config.pretrained is not None and config.subfolder:
        folder = find_model(config.pretrained, "scheduler/scheduler_config.json")
        return MultiFrameFlowMatchScheduler.from_pretrained(folder, subfolder="scheduler")
    return MultiFrameFlowMatchScheduler(**recipe.scheduler)
