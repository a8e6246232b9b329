"""What the library knows of a transformer class, in one record, and the registry of these records.

Adapters, SAE hooks, LoRA files, μP, training and conversion ask the record of a model and import no family. The
records of the built-in families lie in `imgdit/families`, one file each, and are imported when a model of theirs is
met. A record of your own is registered by one call:

    register_family(Family(classes=("MyTransformer2DModel",), places=..., conditions=Conditions(...)))

B batch, N image tokens, T text tokens, n condition tokens, S = T + N + n, F frames, D width, C channels of a token, d
features of a head. *Arguments* are those of the transformer's `forward`, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch

from imgdit import compat
from imgdit.frames import Frame
from imgdit.naming import old_names

Grid = tuple[int, int]
"""Rows and columns of tokens."""
Arguments = Mapping[str, Any]
Edge = Callable[..., Any]
"""`function(step, module, original, *args, **kwargs)`: the result of a module at the edge of the transformer in a pass
with conditions; `original` is the module's own forward."""
BlockFunction = Callable[..., Any]
"""`function(block, arguments, step, plan, cache)`: what the block returns, in the order of its own forward.
`arguments` are those of the block by name, `step` an `imgdit.families.step.Step`, `plan` a `BlockPlan`, `cache` a
`LayerCache` or `None`."""


class Block(NamedTuple):
    """A transformer block, and how it is computed when condition tokens are in its sequence."""

    name: str
    """Path in the model."""
    module: Any
    function: BlockFunction
    attentions: tuple[str, ...] = ("attn",)
    """Names of the block's attentions."""
    ends_conditions: bool = False
    """Whether nothing reads the condition tokens after this block, so that only their keys and values are computed."""


class Call(NamedTuple):
    """What a call of the transformer works on."""

    frames: tuple[Frame, ...]
    """Of the image stream: the image that is generated, then the pipeline's own reference images with their noise
    levels. Only the length of a frame counts, and the size where conditions complete an image."""
    text_length: int
    length: int
    """Image tokens that the model is given; fewer than the frames have where a pipeline samples a part of them."""
    latents: torch.Tensor
    """(B, …) what the model denoises, in the shape of its output."""
    texts: tuple[torch.Tensor, ...]
    """Each (B, …): tensors that are equal for samples of one prompt."""
    cached_by: torch.Tensor
    """(B, …) what keys and values of conditions depend on besides weights, such as pooled text; (B, 0) if nothing. Its
    dtype is the run's."""
    key_mask: torch.Tensor | None = None
    """Boolean (B, T + N), in the order of `Conditions.rope`, False on padded text; or floating, see
    `grouped_attention`; `None`: all is seen."""
    places: tuple[int, ...] = ()
    """Numbers that positions depend on besides lengths and `position_arguments`, such as those of each sample's own
    text tokens."""


@dataclass(frozen=True)
class TokenFormat:
    """How an image becomes tokens of the model."""

    patch: Callable[[Any, Any], int]
    """`patch(model, vae)`: latent cells per side of a token."""
    channels: Callable[[Any], int]
    """Of a model: channels C of a token."""
    encode: Callable[[Any, Any, torch.Tensor, torch.Generator | None], torch.Tensor]
    """`encode(model, vae, pixels, generator)`: images (B, 3, H, W) in [-1, 1] to tokens (B, n, C) in the model's
    normalisation and order of features. The generator draws from the posterior; `None` takes its mode."""


@dataclass(frozen=True)
class Conditions:
    """How condition tokens go through a transformer of another library, which keeps its own forward.

    In each pass `call` tells what the model works on; `rope`, `vector` and `shared` compute what the blocks need; the
    edges add the condition tokens behind the image tokens and take them off again; the block functions compute the
    blocks. Between two blocks the sequence is in the model's own order, the condition tokens last.
    """

    call: Callable[[Any, Arguments], Call]
    """`call(model, arguments)`."""
    vector: Callable[[Any, Arguments, Frame], torch.Tensor]
    """`vector(model, arguments, frame)`: the conditioning vector (B, D) at the frame's noise level and guidance, at
    those of the call where the frame has none."""
    blocks: Callable[[Any], Iterable[Block]]
    """Blocks of a model in the order in which they run."""
    edges: Callable[[Any], Mapping[str, Edge]]
    """Of a model: module path and what its call gives."""
    processors: tuple[type, ...] = ()
    """Attention processors whose result for one frame is what the block functions compute; the first is the model's
    own. Others are refused."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Classes of pipelines and of attention processors that cannot run with conditions, and why."""
    rope: Callable[[Any, Arguments, Sequence[Frame], torch.Tensor | None], torch.Tensor] | None = None
    """`rope(model, arguments, conditions, kept)`: rotations (S, d/2) complex64 of text, image and condition tokens in
    the order in which the blocks compute them, or (B, S, d/2) where samples differ; `kept` are the numbers of the
    image tokens that are computed, `None` for all. `None`: positions are added to the tokens at an edge."""
    position_arguments: tuple[str, ...] = ()
    """Arguments that tell positions and grid: as long as a pipeline passes the same objects, these are not computed
    again."""
    remade_positions: tuple[str, ...] = ()
    """Those of them that pipelines make anew for each step of a call, with the same values."""
    shared: Callable[[Any, torch.Tensor, Any], Any] | None = None
    """`shared(model, vectors, plan)`: what all blocks read besides, from the vectors (B, F, D) of the frames: the
    modulation of models that project it outside of their blocks. `None`: the vectors themselves."""
    sigma: Callable[[Any, Arguments], torch.Tensor] | None = None
    """Noise level (B,) of a call in [0, 1], for conditions that complete an image; `None`: these are refused."""
    transport: tuple[str, str] | None = None
    """Name of the dictionary that the model hands to its blocks, and its name there. `None`: it hands on none; the
    blocks then find the plan in an object that belongs to the transformer, which runs one pass at a time."""
    residual_arguments: tuple[str, ...] = ()
    """Arguments that are lists, or dictionaries by block, of a ControlNet's residuals (B, N, D) of the image or
    (B, S, D) of the sequence in the model's own order."""
    spatial: bool = False
    """Whether the model takes and returns planes (B, C, h, w) and not tokens."""
    arguments: Callable[[Any, dict[str, Any], Any], dict[str, Any]] | None = None
    """`arguments(model, arguments, step)`: the arguments of a pass with conditions, for a model that takes them as
    arguments of its own; `None`: the edges add them."""
    clean_only: bool = False
    """Whether conditions and references are always at noise level 0."""
    timeless: Callable[[Any], tuple[str, ...]] | None = None
    """Of a model: arguments on which alone its blocks of text and references before the joint ones depend; (): they
    depend on the timestep too. `None`: it has no such blocks."""
    references: Callable[[Any, Arguments], tuple[Frame, ...]] | None = None
    """`references(model, arguments)`: frames of the pipeline's own reference images, each with its grid and noise
    level, in the order of their tokens behind those of the image that is generated. `None`: their settings cannot be
    changed."""
    without_references: str = "takes no reference images of its pipeline"
    """What the class does where `references` is `None`, as a predicate."""


class NoisyImages(NamedTuple):
    """What a transformer that keeps its own forward is trained on, without conditions."""

    tokens: torch.Tensor
    """(B, N, C) noisy tokens of one image per sample, in the order of features of `TokenFormat.encode`."""
    grid: Grid
    sigma: torch.Tensor
    """(B,) noise levels in [0, 1]."""
    text: torch.Tensor
    """(B, T, J) what the pipeline's `encode_prompt` gives; several layers of a text encoder lie side by side."""
    mask: torch.Tensor | None = None
    """Boolean (B, T), False on padded text; `None`: all tokens are seen."""
    guidance: torch.Tensor | None = None
    """(B,) of models that have it as an input."""


def tokens_as_given(tokens: torch.Tensor) -> torch.Tensor:
    """For `Training.velocity`: the model gives tokens, and noise minus data."""
    return tokens


@dataclass(frozen=True)
class Training:
    """How a transformer that keeps its own forward is called while it is trained, as its pipeline calls it."""

    arguments: Callable[[Any, NoisyImages], dict[str, Any]]
    """`arguments(model, images)`: arguments of its forward."""
    velocity: Callable[[Any], torch.Tensor] = tokens_as_given
    """Of what the model returns first: noise minus data, (B, N, C)."""
    text_width: Callable[[Any], int] = lambda model: model.config.joint_attention_dim
    """Of a model: features J of a text token."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Classes of pipelines whose folders cannot be trained on, and why."""


class PromptEncoding(NamedTuple):
    """How `encode_prompt` of a pipeline class is called and what it returns."""

    places: tuple[int, int | None, int | None]
    """Of embeddings, pooled text and mask in its result; `None`: it returns none."""
    others: tuple[str, ...] = ()
    """Names of the prompts for further text encoders."""
    keeps_padding: bool = False
    """Whether the model is given padded text with its mask, of which tokens are not left out."""
    length: int = 512
    """Tokens of a prompt at most; what the pipeline pads to where it pads."""


class Preset(NamedTuple):
    """How published condition adapters were trained whose files do not say it."""

    name: str
    keys: str
    """Regular expression found in a key of their files."""
    settings: Mapping[str, Any]
    """Fields of `imgdit.lora.files.AdapterInfo`."""
    header: str = ""
    """Regular expression found in their names or headers too, where adapters of other settings have the same keys."""


@old_names(shares="shared")
@dataclass(frozen=True, eq=False)
class LoraNames:
    """Names that LoRA files use for the layers of a family."""

    blocks: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = field(default_factory=dict)
    """Name of a list of blocks in the model's own repository: diffusers' name of the list, and of each layer there the
    names of its parts in the order of their rows."""
    root: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The same of layers outside of blocks."""
    layers: tuple[str, ...] = ()
    """Layers of blocks that the repository calls as diffusers does, for files that write underscores for dots."""
    written: bool = False
    """Whether files can be written by the repository's names too."""
    inputs: tuple[str, ...] = ()
    """Layers that read the latents."""
    missing_rows: Mapping[str, int] = field(default_factory=dict)
    """Part of a fused layer, and its rows in widths of the model where a LoRA has nothing for it; 1 by default."""
    scale_first: tuple[str, ...] = ()
    """Layers outside of blocks that give scale and shift here, and shift and scale in the repository."""
    scale_first_alone: tuple[str, ...] = ()
    """The same of layers in blocks, where they give nothing else."""
    label: str = ""
    """What messages call the family; "" for one whose files are not told from others'."""
    marks: str = ""
    """Regular expression found in names of modules that no other family has, in any dialect."""
    shared: str = ""
    """The same of names that others have too."""
    never: str = ""
    """The same of names that it has not."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Regular expression of a shared name, and rows per column of that layer."""
    also: tuple[str, ...] = ()
    """Labels of families whose files fit as well."""
    targets: tuple[str, ...] = ()
    """Regular expressions of whole module names: the layers that an adapter of conditions has by default, none of the
    text's. (): those of OminiControl's published LoRAs."""
    presets: tuple[Preset, ...] = ()
    """Published adapters whose files do not say how they were trained; the first that fits counts."""


@dataclass(frozen=True)
class AsMMDiT:
    """How a class of diffusers is an `MMDiT`."""

    fixed: Mapping[str, Any]
    """Settings of `MMDiT` that the class has built in."""
    names: tuple[str, ...]
    """Settings that are called the same in both."""
    added: Callable[[Any], dict[str, Any]] | None = None
    """Further settings of the class for an `MMDiT`."""
    check: Callable[[Mapping[str, Any]], None] | None = None
    """Raises `ValueError` for a configuration that cannot run."""
    defaults_of: str | None = None
    """Class of diffusers whose defaults settings have that a configuration leaves out, for a class that diffusers does
    not have; `None`: it has it."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Settings of `MMDiT` by the names that they have in the class, which a configuration must have."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the class by the names they begin with, and those of `MMDiT`, where they are not the same."""


def first_latents(arguments: Arguments) -> torch.Tensor:
    """`hidden_states` of a call, of a list the first."""
    latents = arguments["hidden_states"]
    return latents[0] if isinstance(latents, (list, tuple)) else latents


def length_of_embeddings(model: Any, arguments: Arguments) -> int:
    """Text tokens in `encoder_hidden_states`; 0 where that are not tokens (B, T, D)."""
    text = arguments.get("encoder_hidden_states")
    return text.shape[1] if isinstance(text, torch.Tensor) and text.ndim == 3 else 0


def timestep_times(factor: float) -> Callable[[Any, Arguments], float]:
    """For `Family.timestep`: the argument `timestep` of the first sample times a factor."""

    def timestep(model: Any, arguments: Arguments) -> float:
        value = arguments["timestep"]
        return float(value.flatten()[0] if isinstance(value, torch.Tensor) else value) * factor

    return timestep


timestep_unscaled = timestep_times(1.0)
TEXT_PARTS = r"context|add_|encoder_hidden|caption|text"


@dataclass(frozen=True)
class Family:
    """What is known of transformer classes that are alike. Every function of a model gets the bare one."""

    classes: tuple[str, ...]
    """Names of the classes; classes that derive from them belong to the family too."""
    places: Callable[[Any, Arguments], Sequence[tuple[slice, Grid]] | None]
    """`places(model, arguments)`: rows in the image stream, and grid, of each image that is generated; `None` for a
    model that works on planes. References of the pipeline and padding do not count."""
    timestep: Callable[[Any, Arguments], float] = timestep_unscaled
    """`timestep(model, arguments)`: the scheduler's timestep of a call, in [0, 1000]."""
    latents: Callable[[Arguments], torch.Tensor] = first_latents
    """Of the arguments: what is denoised, (B, …)."""
    text_length: Callable[[Any, Arguments], int] = length_of_embeddings
    """`text_length(model, arguments)`: text tokens in sequences of text and image."""
    text_parts: str = TEXT_PARTS
    """Regular expression that is found in the names of modules that work on text alone."""
    joint_parts: str | None = None
    """Regular expression that is found in the names of modules that work on text and image in one sequence."""
    image_first: bool = False
    """Whether the image stands before the text in such a sequence."""
    sequence_first: str | None = None
    """Regular expression that is found in the names of modules whose tokens are (N, B, D) outside of attentions."""
    image_places: Mapping[str, int] = field(default_factory=dict)
    """Class of a block that returns a tuple, and where the image stream stands in it; for classes that diffusers'
    registry of blocks does not list."""
    plane_parts: tuple[str, ...] = ()
    """Classes of modules that turn a plane into a token sequence and back."""
    guides_in_batch: bool = True
    """Whether pipelines put the negative prompt into the same batch and not into a call of its own."""
    prompt_first: bool = False
    """Whether the prompt stands before the negative prompt in that batch."""
    guides_by_second_call: bool = False
    """Whether pipelines that name no calls and do not guide in one batch make a second call for the negative prompt,
    with the same objects as latents and timestep."""
    tokens: TokenFormat | None = None
    """How images become condition tokens; `None`: there are none."""
    conditions: Conditions | None = None
    """How conditions go through the stock model; `None`: they cannot."""
    lora: LoraNames | None = None
    prompts: Mapping[str, PromptEncoding] = field(default_factory=dict)
    """By the class of a pipeline."""
    as_mmdit: AsMMDiT | None = None
    """`None`: it is no `MMDiT`."""
    training: Training | None = None
    """How it is trained in its own class; `None`: it is not, or as an `MMDiT`."""
    mup: Any = None
    """`imgdit.mup.Structure`: the role of every parameter; `None`: not known."""


class MeasuredPlaces:
    """Places and references of the calls of a run. Those that are read from position ids wait for the device, and a
    pipeline passes the same ids in every step, or new ones of the same values."""

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[tuple, Any]] = {}
        self._first: dict[tuple, tuple[Any, tuple]] = {}

    def positions(self, family: Family, model: Any, arguments: Arguments) -> tuple[Any, ...]:
        """The `position_arguments` of a call. Of those that a pipeline makes anew in each step, the objects of the
        first one: a call of a pipeline is known by its other position arguments, which it keeps."""
        conditions = family.conditions
        if conditions is None:
            return ()
        values = tuple(arguments.get(name) for name in conditions.position_arguments)
        pipe = compat.calling_pipeline(model) if conditions.remade_positions else None
        if pipe is None:
            return values
        parts = zip(conditions.position_arguments, values, strict=True)
        remade = conditions.remade_positions
        key = (id(pipe), *(_kind_of(one) if name in remade else id(one) for name, one in parts))
        if key not in self._first:
            if len(self._first) >= 8:
                self._first.clear()
            self._first[key] = (pipe, values)  # holding them, so that ids stay theirs
        return self._first[key][1]

    def of(self, family: Family, model: Any, arguments: Arguments) -> Sequence[tuple[slice, Grid]] | None:
        """Rows and grids of the images in a call: its `Family.places`."""
        return self._measured(family, family.places, model, arguments)

    def references(self, family: Family, model: Any, arguments: Arguments) -> tuple[Frame, ...]:
        """Frames of the reference images in a call: its `Conditions.references`."""
        function = None if family.conditions is None else family.conditions.references
        return () if function is None else self._measured(family, function, model, arguments)

    def _measured(
        self, family: Family, function: Callable[[Any, Arguments], Any], model: Any, arguments: Arguments
    ) -> Any:
        values = self.positions(family, model, arguments)
        if all(one is None for one in values):
            return function(model, arguments)
        key = (function, *map(id, values))
        if key not in self._known:
            if len(self._known) >= 8:
                self._known.clear()
            self._known[key] = (values, function(model, arguments))  # holding them, so that ids stay theirs
        return self._known[key][1]


def _kind_of(value: Any) -> tuple | None:
    """What tensors of equal values have in common besides."""
    return None if value is None else (value.shape, value.dtype, value.device)


_REGISTERED: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known by the names of its classes; it takes the place of one that is known by them already."""
    _REGISTERED.update(dict.fromkeys(family.classes, family))
    return family


def family_named(name: str) -> Family | None:
    """The family of a class by its name; `None`: it is not known."""
    modules = import_module("imgdit.families").MODULES
    if name not in _REGISTERED and name in modules:
        built_in = import_module(f"imgdit.families.{modules[name]}").FAMILY
        for cls in built_in.classes:
            _REGISTERED.setdefault(cls, built_in)
    return _REGISTERED.get(name)


def find_family(model: Any) -> Family | None:
    """The family of a model or of a class, by the names of the class and of those it derives from; `None`: not known.

    Args:
        model: also inside torch.compile, PEFT, DDP, FSDP or activation checkpointing.
    """
    while model is not None:
        for cls in (model if isinstance(model, type) else type(model)).__mro__:
            family = family_named(cls.__name__)
            if family is not None:
                return family
        model = compat.wrapped_model(model)
    return None


def families() -> list[Family]:
    """All families, the built-in ones first; these are imported."""
    built_in = [family_named(name) for name in import_module("imgdit.families").MODULES]
    return list({id(family): family for family in (*built_in, *_REGISTERED.values()) if family is not None}.values())


def known_classes(part: str | None = None) -> list[str]:
    """Names of all known classes, or of those whose family has a part, such as "conditions"."""
    return [name for family in families() for name in family.classes if part is None or getattr(family, part)]


def prompt_encodings() -> dict[str, PromptEncoding]:
    """By class of the pipeline, of all families."""
    return {name: encoding for family in families() for name, encoding in family.prompts.items()}


def refused_trainings() -> dict[str, str]:
    """By class of the pipeline, of all families: why its folder cannot be trained on."""
    trainings = [family.training for family in families() if family.training is not None]
    return {name: reason for training in trainings for name, reason in training.refused.items()}
