"""Recipes: YAML files read into frozen dataclasses.

A recipe says everything a training run depends on. The docstring under a field is its help. Reading is strict: an
unknown key, a wrong type or a value out of range is a `ValueError` that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import reprlib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from imgdit.hub import find_model
from imgdit.io.paths import at_home
from imgdit.io.text import decode_text

from ..naming import nearest
from .checkpoint import find_checkpoint, load_weights
from .quantized import load_options, quantize_rows


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
    tracker: Literal["auto", "tensorboard", "none"] = "auto"
    """Where curves go besides the file; "auto": tensorboard if it is installed."""

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

    kind: Literal["mmdit", "nextdit", "autoencoder_kl", "autoencoder_dc", "caption_reader", "scene_probe"] = "mmdit"
    """Its class, "mmdit": `imgdit.MMDiT`; "nextdit": `imgdit.NextDiT`; "autoencoder_…": diffusers' `AutoencoderKL` or
    `AutoencoderDC`; "caption_reader": a T5 encoder that learns to understand the scenes' sentences; "scene_probe": a
    network that reads their pictures."""
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
    """What the weights under an adapter are rounded to, see `imgdit.training.quantized`. The adapter is used on the
    unquantised model as well."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the other weights under an adapter are kept in. Trained weights are always float32."""

    def __post_init__(self) -> None:
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
        """The class `kind` names."""
        if self.kind == "mmdit":
            from ..models.mmdit import MMDiT

            return MMDiT
        if self.kind == "nextdit":
            from ..models.nextdit import NextDiT

            return NextDiT
        if self.kind == "caption_reader":
            from .reader import scene_reader

            return scene_reader
        if self.kind == "scene_probe":
            from .reader import scene_probe

            return scene_probe
        from diffusers import AutoencoderDC, AutoencoderKL

        return AutoencoderKL if self.kind == "autoencoder_kl" else AutoencoderDC


OMINICONTROL_TARGETS = (
    r"x_embedder",
    r"transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)",
    r"single_transformer_blocks\.\d+\.(norm\.linear|attn\.to_[qkv]|proj_mlp|proj_out)",
)
"""Layers that OminiControl's published LoRAs change: none of the text's."""


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
    """Regular expressions of whole module names."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "rank", "0 or more", self.rank)
        _require(self.alpha is None or self.alpha > 0, "alpha", "positive or null", self.alpha)


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on. The command that reads the recipe makes the data set and checks `arguments`."""

    name: str = ""
    """Name of the data."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the data set."""
    shuffle: bool = True
    """A new permutation per epoch; without effect on an endless data set, whose samples are new anyway."""
    workers: int = 0
    """Processes that prepare samples; 0: the training process itself."""

    def __post_init__(self) -> None:
        _require(self.workers >= 0, "workers", "0 or more", self.workers)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """How its moments are kept: float32, or 8 bits by bitsandbytes; "paged": they move to the machine's memory while
    the GPU's is full."""
    lr: float = 1e-3
    """Learning rate; under μP at the base width."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment; under μP at the base width."""
    weight_decay: float = 0.0
    """Decoupled weight decay; under μP at the base width. Biases and gains have none."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; `None`: no clipping."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "positive", self.lr)
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
    """A function of `imgdit.training.objectives`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""

    def __post_init__(self) -> None:
        from . import objectives

        if self.name not in objectives.__all__:
            raise ValueError(f"unknown objective {nearest(self.name, objectives.__all__)}")
        check_arguments(getattr(objectives, self.name), self.arguments, "arguments")


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
    """Arguments of `MultiFrameFlowMatchScheduler`."""

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
            from ..schedulers.flow_match import MultiFrameFlowMatchScheduler

            check_arguments(MultiFrameFlowMatchScheduler, self.scheduler, "scheduler")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as JSON and YAML take them."""
        return _plain(dataclasses.asdict(self))

    def replace(self, **sections: Mapping[str, Any]) -> Recipe:
        """A copy with fields of sections changed: `recipe.replace(run={"steps": 10})`."""
        changed = {name: dataclasses.replace(getattr(self, name), **values) for name, values in sections.items()}
        return dataclasses.replace(self, **changed)


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        path_or_name: a YAML file, or the name of a packaged recipe without its ending ("scenes/transformer").

    Raises:
        ValueError: no such recipe, or a mistake in it.
    """
    return parse_recipe(*read_yaml(path_or_name))


class _AtHome(yaml.SafeLoader):
    """Plain values, with `~/` at the beginning of a text as the home folder."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        text = super().construct_scalar(node)
        return at_home(text) if isinstance(text, str) and text.startswith("~/") else text


def read_yaml(path_or_name: str | Path) -> tuple[Any, str]:
    """Plain values of a recipe's file or of a packaged recipe, and what errors in them should name."""
    path = Path(at_home(path_or_name))
    source: Path | Traversable = path
    if not path.is_file():
        known = packaged_recipes()
        if str(path_or_name) not in known:
            raise ValueError(f"there is no file and no packaged recipe {nearest(str(path_or_name), known)}")
        source = known[str(path_or_name)]
    try:
        return yaml.load(decode_text(source.read_bytes(), "its text"), _AtHome), str(source)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        # The last three come from dates that are none, tags on the wrong values, and lists in lists without end.
        raise ValueError(f"{source} is not a YAML file: {error}") from error


def packaged_recipes() -> dict[str, Traversable]:
    """Recipes that come with imgdit, by name."""
    found: dict[str, Traversable] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry

    walk(files("imgdit.configs"), "")
    return found


def parse_recipe(values: Any, source: str) -> Recipe:
    """A recipe from nested plain values; `source` is what errors name."""
    return parse_as(Recipe, values, source)


def parse_as(cls: Any, values: Any, source: str) -> Any:
    """A dataclass like `Recipe` from nested plain values."""
    return _section(cls, values, source, "")


def build_model(recipe: Recipe) -> torch.nn.Module:
    """The model of a recipe, new weights drawn from `run.seed` or loaded; ready to train.

    Raises:
        CheckpointError: the run to start from has no checkpoint, or one of another architecture.
        ImportError: what `model.quantize` names is not installed.
    """
    config = recipe.model
    if config.pretrained is not None:
        dtype = getattr(torch, config.dtype)
        model = config.model_class.from_pretrained(
            pretrained_folder(config), subfolder=config.subfolder or None, dtype=dtype,
            **load_options(config.quantize, dtype),
        )  # fmt: skip
        if config.quantize == "int8":
            quantize_rows(model)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.run.seed)
            model = config.model_class(**config.arguments)
        if hasattr(model, "init_weights"):
            model.init_weights(torch.Generator().manual_seed(recipe.run.seed))
        if config.start_from is not None and not any(p.is_meta for p in model.parameters()):
            load_weights(model, find_checkpoint(config.start_from))
    if recipe.adapter.rank:
        add_adapter(model, recipe.adapter, recipe.run.seed)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def pretrained_folder(config: ModelConfig) -> str:
    """Where a model's weights come from, see `imgdit.hub.find_model`."""
    assert config.pretrained is not None
    return find_model(config.pretrained, f"{config.subfolder}/config.json".lstrip("/"))


def add_adapter(model: Any, config: AdapterConfig, seed: int) -> None:
    """Freeze a model and put a LoRA on it, called `ADAPTER`, that changes nothing yet."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    model.requires_grad_(False)
    pattern = "|".join(f"(?:{target})" for target in config.targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=pattern), ADAPTER
        )
    cast_training_params(model)  # PEFT makes an adapter of what its layer is made of


def build_scheduler(recipe: Recipe) -> Any:
    """The `MultiFrameFlowMatchScheduler` of a recipe."""
    from ..schedulers.flow_match import MultiFrameFlowMatchScheduler

    return MultiFrameFlowMatchScheduler(**recipe.scheduler)


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments that `function` does not take, or of another type than it declares.

    Only keyword arguments with a default count; what comes without one is the caller's to give.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.default is not p.empty]
    hints = get_type_hints(function if inspect.isfunction(function) else function.__init__)
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"{where} has an unknown key {nearest(name, known)}")
        if name in hints:
            _convert(hints[name], value, f"{where}.{name}")


def _section(cls: Any, values: Any, source: str, where: str) -> Any:
    """One dataclass from a mapping."""
    name = where or "a recipe"
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: {name} must be a mapping of keys to values, got {_named(values)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    inner = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            place = f" in {where}" if where else ""
            raise ValueError(f"{source}: unknown key{place} {nearest(str(key), fields)}")
    for f in fields.values():
        missing = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if missing and f.name not in values:
            raise ValueError(f"{source}: {inner}{f.name} is missing; {name} needs it")
    converted = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            converted[key] = _section(hints[key], value, source, inner + key)
            continue
        try:
            converted[key] = _convert(hints[key], value, inner + key)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{source}: {inner.rstrip('.')}{': ' if inner else ''}{error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; only what YAML cannot say otherwise is converted (lists to tuples, 1 to 1.0)."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        options = [option for option in inner if option is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, where)
        for option in options:
            try:
                return _convert(option, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if any(value is choice or (value == choice and type(value) is type(choice)) for choice in inner):
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(repr, inner))}, got {_named(value)}")
    elif origin is tuple and isinstance(value, (list, tuple)):
        if inner[-1] is Ellipsis or len(inner) == 1:  # diffusers writes tuple[int] for any number of them
            return tuple(_convert(inner[0], part, f"{where}[{i}]") for i, part in enumerate(value))
        if len(inner) == len(value):
            return tuple(_convert(t, part, f"{where}[{i}]") for i, (t, part) in enumerate(zip(inner, value)))
        raise ValueError(f"{where} must have {len(inner)} entries, got {len(value)}: {reprlib.repr(value):.200}")
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    elif (hint is dict or origin is dict) and isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"{where} must be {_type_name(hint)}, got {_named(value)}{_yaml_hint(hint, value)}")


def _yaml_hint(hint: Any, value: Any) -> str:
    """YAML 1.1 reads `1e-3` as text, because its floats need a dot."""
    if hint is float and isinstance(value, str):
        try:
            return f"; YAML takes {value} for text, write {float(value)!r} with a dot, as in 1.0e-3"
        except ValueError:
            pass
    return ""


def _type_name(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is tuple:
        return "a list"
    if hint is dict or get_origin(hint) is dict:
        return "a mapping"
    return str(hint)


def _named(value: Any) -> str:
    # A few lines of YAML whose aliases name each other are gigabytes when they are written out, so not all is.
    return "nothing" if value is None else f"{type(value).__name__} {reprlib.repr(value):.200}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _require(holds: bool, name: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")
