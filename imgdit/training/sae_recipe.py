"""Recipes of `imgdit sae train`: what is recorded, what is trained on it, which concepts are selected."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from imgdit.io.text import read_lines
from imgdit.recipes import find_object, parse_as, read_yaml
from imgdit.sae.concepts import check_floor
from imgdit.sae.training import SAETrainConfig


@dataclass(frozen=True)
class SAERun:
    """How long, and what is written when."""

    folder: str
    """Folder of everything the run writes; the autoencoders are in `saes/<hookpoint>`."""
    steps: int
    """Training steps of each autoencoder."""
    batch_size: int = 4096
    """Token vectors per step."""
    seed: int = 0
    """Decides the images, the initial weights and the order of the vectors."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl`."""
    checkpoint_every: int = 500
    """Steps between two checkpoints. The last step always writes one."""
    keep: int = 1
    """Checkpoints that stay."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class SAEPipeline:
    """Whose activations."""

    pretrained: str
    """Folder or Hub repository of a diffusers pipeline, or "embedded" for the one that comes along."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of its weights."""
    batch_size: int = 4
    """Images made at once."""
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline, as `num_inference_steps` and `guidance_scale`."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if "generator" in self.call or "latents" in self.call:
            raise ValueError("the noise comes from run.seed; remove generator and latents from call")


@dataclass(frozen=True)
class SAEData:
    """What the images show, and how their activations are kept."""

    prompts: tuple[str, ...] = ()
    """Prompts."""
    prompts_file: str | None = None
    """A text file with a prompt per line."""
    prompts_from: str | None = None
    """"package.module:function", a function `(count, seed) -> list of prompts`."""
    count: int = 0
    """Prompts that `prompts_from` makes."""
    scene_captions: int = 0
    """What version 0.1 had for `prompts_from: imgdit.scenes.prompts:captions` and `count`."""
    held_out: int = 0
    """Of the prompts, the last ones, which are not trained on: on them the image distance with the reconstruction
    inserted is measured in the end."""
    shards: str | None = None
    """Folder for the activations on disk, which are recorded once and then read; `None`: they stream through memory
    and images are generated as long as training goes on."""
    buffer: int = 65_536
    """Token vectors per hookpoint that are held in memory to be shuffled."""

    def __post_init__(self) -> None:
        _rename_count(self, "scene_captions", "imgdit.scenes.prompts:captions")
        sources = [name for name in ("prompts", "prompts_file", "prompts_from") if getattr(self, name)]
        if len(sources) != 1:
            raise ValueError(f"give one of prompts, prompts_file and prompts_from, got {', '.join(sources) or 'none'}")
        _check_count(self)

    def all_prompts(self, seed: int) -> list[str]:
        """All prompts, the held-out ones last."""
        if self.prompts_file is not None:
            found = [line.strip() for line in read_lines(self.prompts_file) if line.strip()]
        elif self.prompts_from is not None:
            found = find_object(self.prompts_from, {}, "imgdit.prompts", "data.prompts_from is")(self.count, seed)
        else:
            found = list(self.prompts)
        if len(found) <= self.held_out:
            raise ValueError(f"held_out={self.held_out} leaves nothing of {len(found)} prompts to train on")
        return found


@dataclass(frozen=True)
class SAEModelConfig:
    """The autoencoders; see `SAEConfig`."""

    hookpoints: tuple[str, ...]
    """Module paths, `*` for one part; one autoencoder is trained for each."""
    source: Literal["output", "update"] = "output"
    """What of the module is read."""
    expansion_factor: int = 16
    """Features per width."""
    num_latents: int = 0
    """Features; 0: expansion_factor times the width."""
    k: int = 32
    """Features active at once."""
    activation: Literal["topk", "batch_topk", "sample_topk", "groupmax"] = "batch_topk"
    """How they are chosen in training."""
    input_unit_norm: bool = False
    """Each token is standardised."""
    multi_topk: bool = False
    """A second loss with 4k features."""
    pretrained: str | None = None
    """Folder of autoencoders by hookpoint to go on from; the sizes above are then theirs."""


@dataclass(frozen=True)
class SAEConcepts:
    """Concepts that are selected when training is done."""

    prompts: dict[str, Any] = field(default_factory=dict)
    """Prompts per concept. Empty: none are selected."""
    prompts_from: str | None = None
    """Instead, "package.module:function", a function `(count, seed) -> list of {concept: prompts}`; concepts are told
    apart within each entry of the list."""
    count: int = 0
    """Prompts of each concept that `prompts_from` makes."""
    scene_labels: int = 0
    """What version 0.1 had for `prompts_from: imgdit.scenes.prompts:concepts` and `count`."""
    top_n: int | None = None
    """Features per concept and timestep."""
    percentile: float | None = None
    """Instead, features whose score lies above this percentile."""
    floor: float = 0.0
    """Of these, features that score below this fraction of the timestep's best are left out."""
    multiplier: float = -1.0
    """Stored with each concept: how strongly it is unlearned where nothing else is said."""
    seed: int = 0
    """Of the first image of each concept."""

    def __post_init__(self) -> None:
        _rename_count(self, "scene_labels", "imgdit.scenes.prompts:concepts")
        if self.prompts and self.prompts_from:
            raise ValueError("give either prompts or prompts_from, not both")
        _check_count(self)
        if (self.prompts or self.prompts_from) and (self.top_n is None) == (self.percentile is None):
            raise ValueError(f"give either top_n or percentile, got {self.top_n} and {self.percentile}")
        check_floor(self.floor)
        for name, lines in self.prompts.items():
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines) or not lines:
                raise ValueError(f"prompts.{name} must be a list of prompts, got {lines!r}")

    def kinds(self) -> list[dict[str, list[str]]]:
        """Prompts per concept; concepts are told apart within each of the groups."""
        if self.prompts_from is not None:
            return find_object(self.prompts_from, {}, "imgdit.prompts", "concepts.prompts_from is")(
                self.count, self.seed
            )
        return [self.prompts] if self.prompts else []


@dataclass(frozen=True)
class SAERecipe:
    """A run of `imgdit sae train`."""

    run: SAERun
    pipeline: SAEPipeline
    data: SAEData
    sae: SAEModelConfig
    train: SAETrainConfig = field(default_factory=SAETrainConfig)
    concepts: SAEConcepts = field(default_factory=SAEConcepts)

    def __post_init__(self) -> None:
        if self.sae.activation == "sample_topk" and self.data.shards is None:
            raise ValueError("sae.activation 'sample_topk' needs whole maps; set data.shards to record them")
        if self.data.shards is None and self.data.buffer < 2 * self.run.batch_size:
            raise ValueError(
                f"data.buffer={self.data.buffer} must hold at least two batches of run.batch_size="
                f"{self.run.batch_size} vectors to shuffle them"
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return dataclasses.asdict(self)


def load_sae_recipe(path_or_name: str | Path) -> SAERecipe:
    """Read a recipe: a YAML file, or the name of a packaged one."""
    return parse_as(SAERecipe, *read_yaml(path_or_name))


def _rename_count(section: Any, old: str, source: str) -> None:
    """Read a count under its name of version 0.1."""
    count = getattr(section, old)
    if not count:
        return
    warnings.warn(f"{old}: {count} is now prompts_from: {source} and count: {count}", DeprecationWarning, stacklevel=2)
    for name, value in ((old, 0), ("prompts_from", source), ("count", count)):
        object.__setattr__(section, name, value)


def _check_count(section: Any) -> None:
    if (section.prompts_from is None) != (section.count < 1):
        raise ValueError(
            f"prompts_from and count go together, got {section.prompts_from!r} and {section.count}; count is the "
            "number of prompts to make"
        )
