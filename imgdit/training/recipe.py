"""Recipes: YAML files read into frozen dataclasses.

A recipe says everything a training run depends on. The docstring under a field is its help. Reading is strict: an
unknown key, a wrong type or a value out of range is a `ValueError` that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from imgdit.lora.config import OMINICONTROL_TARGETS
from imgdit.naming import renamed_value
from imgdit.recipes import check_arguments, find_object, parse_as, read_yaml, with_values

MODELS = {
    "transformer": "imgdit.training.stock:load_transformer",
    "mmdit": "imgdit.models.mmdit:MMDiT",
    "nextdit": "imgdit.models.nextdit:NextDiT",
    "autoencoder_kl": "diffusers:AutoencoderKL",
    "autoencoder_dc": "diffusers:AutoencoderDC",
    "bd3lm": "imgdit.models.bd3lm:BD3LM",
    "masked_lm": "imgdit.models.masked_lm:load_masked_lm",
    "vision_language": "imgdit.training.vision_language:instruction_stage",
    "vision_language_projector": "imgdit.training.vision_language:projector_stage",
    "vision_language_whole": "imgdit.training.vision_language:whole_stage",
}
"""Short names of `model.kind`."""
OBJECTIVES = {
    name: f"imgdit.training.objectives.{name}:{name}"
    for name in (
        "flow_matching",
        "feature_alignment",
        "self_flow",
        "condition_lora",
        "few_steps",
        "autoencoder",
        "masked_text",
        "block_text",
        "contrastive",
        "vision_language",
        "joint",
        "mmada",
    )
}
"""Short names of `objective.name`."""
# As version 0.1 called them.
_RENAMED_MODELS = {
    "caption_reader": "imgdit.scenes.training_readers:scene_reader",
    "scene_probe": "imgdit.scenes.training_readers:scene_probe",
}
_RENAMED_DATA = {
    f"scene_{name}": f"imgdit.scenes.sources:{name}"
    for name in ("pictures", "sentences", "readings", "frames", "conditions")
} | {"blobs": "toy", "own_pictures": "user_images"}
_RENAMED_OBJECTIVES = {
    "read_captions": "imgdit.scenes.objectives:read_captions",
    "read_pictures": "imgdit.scenes.objectives:read_images",
}


@dataclass(frozen=True)
class RunConfig:
    """How long, in which portions, and what is written when."""

    folder: str
    """Folder of everything the run writes."""
    steps: int
    """Optimiser steps of the whole run."""
    batch_size: int
    """Samples per optimiser step, over all ranks and micro-batches."""
    accumulation: int = 1
    """Micro-batches that a rank adds up before a step. `batch_size` must divide by accumulation times ranks."""
    seed: int = 0
    """Decides the initial weights, the order of the data and every noise."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """What the forward pass computes in; the weights stay float32."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl`."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints. The last step always writes one."""
    keep: int = 2
    """Checkpoints that stay; older ones are deleted."""
    evaluate_every: int = 0
    """Steps between two held-out losses; 0: none."""
    evaluate_sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels of the held-out loss; empty for objectives without noise."""
    sample_every: int = 0
    """Steps between two calls of `on_sample`; 0: none."""
    tracker: Literal["auto", "tensorboard", "wandb", "trackio", "none"] = "auto"
    """Where curves and sample sheets go besides the run's folder; "auto": tensorboard if it is installed."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("evaluate_every", "sample_every", "seed"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for sigma in self.evaluate_sigmas:
            _require(0.0 < sigma <= 1.0, "evaluate_sigmas", "noise levels in (0, 1]", self.evaluate_sigmas)


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    kind: str = "mmdit"
    """Its class: "mmdit" (`imgdit.MMDiT`), "nextdit" (`imgdit.NextDiT`), "transformer" (that of the folder
    `pretrained`: diffusers' own for FLUX.2, Qwen-Image, Z-Image, Krea 2, Chroma and LongCat-Image, `MMDiT` for FLUX.1
    and SD3), "autoencoder_kl" or "autoencoder_dc" (diffusers' `AutoencoderKL` and `AutoencoderDC`), "bd3lm"
    (`imgdit.BD3LM`), "masked_lm" (what `load_masked_lm` reads from `pretrained`), "vision_language",
    "vision_language_projector" or "vision_language_whole" (what `load_vision_language` reads; all but the tower is
    trained, the projector alone, or all), an entry point of the group "imgdit.models", or "package.module:attribute":
    a torch module, or a function that returns one."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of its class."""
    pretrained: str | None = None
    """Folder or Hub repository to start from, "embedded" for the one that comes along; `arguments` must then be
    empty."""
    subfolder: str = ""
    """Folder of the model within `pretrained`, as pipelines have them ("transformer")."""
    start_from: str | None = None
    """Folder of a run, such as an earlier stage, whose weights (the average, if it kept one) to start from instead of
    new ones; `arguments` must be of the same architecture."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    quantize: Literal["none", "int8", "torchao_int8", "bnb_int8", "bnb_nf4"] = "none"
    """What the weights under an adapter are rounded to, see `imgdit.models.quantized`. The adapter is used on the
    unquantised model as well."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the other weights under an adapter are kept in. Trained weights are always float32."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", renamed_value(self.kind, _RENAMED_MODELS, "model.kind"))
        if self.pretrained is not None and self.start_from is not None:
            raise ValueError(
                f"weights come from pretrained or from start_from, got {self.pretrained!r} and {self.start_from!r}"
            )
        if self.pretrained is not None and self.arguments:
            raise ValueError(f"pretrained brings its own configuration; remove arguments, got {dict(self.arguments)}")
        if self.arguments:
            check_arguments(self.model_class, self.arguments, "arguments")

    @property
    def model_class(self) -> Any:
        """What `kind` names."""
        found = find_object(self.kind, MODELS, "imgdit.models", "model.kind is")
        model_type = (
            found if isinstance(found, type) else get_type_hints(found).get("return") if callable(found) else None
        )
        if not (isinstance(model_type, type) and issubclass(model_type, torch.nn.Module)):
            raise ValueError(
                f"model.kind must name a torch module or a function that is annotated to return one, got {self.kind!r}"
            )
        return found


ADAPTER = "trained"
"""Name of a recipe's LoRA while it is trained; its file has none."""


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA that is trained on a frozen model."""

    rank: int = 0
    """Its rank; 0: no LoRA, the model itself is trained."""
    alpha: float | None = None
    """Its scale times its rank; `None`: the rank."""
    targets: tuple[str, ...] = OMINICONTROL_TARGETS
    """Regular expressions of whole module names. The default is that of FLUX.1, SD3 and `MMDiT`; for a model of
    another family it stands for the family's own (`imgdit.family.LoraNames.targets`)."""
    modules: tuple[str, ...] = ()
    """Regular expressions of whole names of modules that are trained themselves, such as a new text head."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "rank", "0 or more", self.rank)
        _require(self.alpha is None or self.alpha > 0, "alpha", "positive or null", self.alpha)


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on. The command that reads the recipe makes the data set and checks `arguments`."""

    name: str = ""
    """A short name of `imgdit.training.sources`, an entry point of the group "imgdit.data", or
    "package.module:attribute": an `imgdit.training.sources.Source`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the data set."""
    shuffle: bool = True
    """A new permutation per epoch; without effect on an endless data set, whose samples are new anyway."""
    workers: int = 0
    """Processes that prepare samples; 0: the training process itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", renamed_value(self.name, _RENAMED_DATA, "data.name"))
        _require(self.workers >= 0, "workers", "0 or more", self.workers)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for matrices and AdamW for the rest."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"] = "adamw"
    """"adamw" and how its moments are kept: float32, or 8 bits by bitsandbytes; "paged": they move to the machine's
    memory while the GPU's is full. "muon": hidden matrices, known by their μP roles, are trained by `torch.optim.Muon`
    (arXiv 2502.16982), whose updates have one spectral norm at every width, everything else by AdamW."""
    lr: float = 1e-3
    """Learning rate; under μP at the base width. Of AdamW."""
    muon_lr: float = 0.02
    """Learning rate of Muon: the spectral norm of an update of a square matrix. The same at every width."""
    muon_momentum: float = 0.95
    """Of Muon (Nesterov)."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of some parameters, by regular expressions of their whole names; the first that fits counts. Not
    under μP, which has rates of its own."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment; under μP at the base width."""
    weight_decay: float = 0.0
    """Decoupled weight decay; under μP at the base width, for other widths see `mup_wd_exponent` of the model. Biases
    and gains have none. What Muon trains shrinks by as much per step: by lr times weight_decay."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; `None`: no clipping."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "positive", self.lr)
        _require(self.muon_lr > 0, "muon_lr", "positive", self.muon_lr)
        _require(0 <= self.muon_momentum < 1, "muon_momentum", "in [0, 1)", self.muon_momentum)
        for pattern, rate in self.rates.items():
            _require(rate > 0, f"rates[{pattern!r}]", "positive", rate)
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers in [0, 1)", self.betas)
        _require(self.eps > 0, "eps", "positive", self.eps)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive or null", self.clip_norm)


@dataclass(frozen=True)
class ScheduleConfig:
    """A factor on every group's own learning rate, so that μP's ratios between groups stay."""

    kind: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up. "cosine": falls until the last step; "constant": stays at 1 until `decay`."""
    warmup: int = 0
    """Steps in which the factor rises linearly to 1."""
    decay: int = 0
    """Last steps of "constant", in which the factor falls linearly."""
    floor: float = 0.0
    """Factor at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        _require(self.warmup >= 0, "warmup", "0 or more", self.warmup)
        _require(self.decay >= 0, "decay", "0 or more", self.decay)
        _require(0 <= self.floor <= 1, "floor", "in [0, 1]", self.floor)
        if self.kind == "cosine" and self.decay:
            raise ValueError(f"decay belongs to kind 'constant'; a cosine falls all the way, got decay={self.decay}")

    def factor(self, step: int, steps: int) -> float:
        """Factor of step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "cosine":
            done = (step - self.warmup) / max(steps - self.warmup, 1)
        else:
            done = (step - (steps - self.decay)) / max(self.decay, 1)
        done = min(max(done, 0.0), 1.0)
        fall = (1 + math.cos(math.pi * done)) / 2
        return self.floor + (1 - self.floor) * (fall if self.kind == "cosine" else 1 - done)


@dataclass(frozen=True)
class EmaConfig:
    """Running average of the weights, for sampling."""

    decay: float = 0.999
    """Weight of the old average. It warms up as (1 + n) / (10 + n) over the first updates; 0: no average."""

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "decay", "in [0, 1)", self.decay)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned."""

    name: str = "flow_matching"
    """A file of `imgdit.training.objectives`, an entry point of the group "imgdit.objectives", or
    "package.module:function": a function `(model, scheduler, batch, generator, *, …) -> ObjectiveOutput`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", renamed_value(self.name, _RENAMED_OBJECTIVES, "objective.name"))
        check_arguments(self.function, self.arguments, "arguments")

    @property
    def function(self) -> Callable[..., Any]:
        """What `name` names."""
        found = find_object(self.name, OBJECTIVES, "imgdit.objectives", "unknown objective")
        taken = list(inspect.signature(found).parameters) if callable(found) else []
        if taken[:4] != ["model", "scheduler", "batch", "generator"]:
            raise ValueError(
                "objective.name must name a function (model, scheduler, batch, generator, *, …), got "
                f"{self.name!r} with {taken}"
            )
        return found


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    run: RunConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Arguments of `MultiFrameFlowMatchScheduler`. Empty: its defaults; with `model.kind: transformer` those of the
    pipeline that the model is of, so that noise levels are drawn as the pipeline shifts its steps."""

    def __post_init__(self) -> None:
        if self.schedule.warmup + self.schedule.decay > self.run.steps:
            raise ValueError(
                f"schedule.warmup={self.schedule.warmup} and schedule.decay={self.schedule.decay} take longer than "
                f"run.steps={self.run.steps}"
            )
        frozen = self.model.quantize != "none" or self.model.dtype != "float32"
        if frozen and (not self.adapter.rank or self.model.pretrained is None):
            raise ValueError(
                f"model.quantize={self.model.quantize!r} and model.dtype={self.model.dtype!r} are for frozen weights "
                "under an adapter; set adapter.rank and model.pretrained, or leave them out to train the model itself"
            )
        if self.model.dtype == "bfloat16" and self.run.mixed_precision != "bf16":
            raise ValueError(
                "model.dtype 'bfloat16' goes with run.mixed_precision 'bf16', which computes in it; got "
                f"{self.run.mixed_precision!r}"
            )
        if self.scheduler:
            from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler

            check_arguments(MultiFrameFlowMatchScheduler, self.scheduler, "scheduler")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as JSON and YAML take them."""
        return _plain(dataclasses.asdict(self))

    def replace(self, **sections: Mapping[str, Any]) -> Recipe:
        """A copy with fields of sections changed: `recipe.replace(run={"steps": 10})`."""
        changed = {name: dataclasses.replace(getattr(self, name), **values) for name, values in sections.items()}
        return dataclasses.replace(self, **changed)


def load_recipe(path_or_name: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path_or_name: a YAML file, or the name of a packaged recipe without its ending ("scenes/transformer").
        changes: other values for some fields, by their path: {"run.steps": 2000}.

    Raises:
        ValueError: no such recipe, or a mistake in it.
    """
    values, source = read_yaml(path_or_name)
    return parse_recipe(with_values(values, changes or {}), source)


def parse_recipe(values: Any, source: str) -> Recipe:
    """A recipe from nested plain values; `source` is what errors name."""
    return parse_as(Recipe, values, source)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _require(holds: bool, name: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")
