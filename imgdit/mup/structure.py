"""What μP has to know about a model class: the role of every parameter, as ordered name patterns.

There is no catch-all: a parameter that no pattern matches is an error, so that a new layer is classified by a person.
Each family of `imgdit/families` has its table; a model class outside of them declares `_mup_structure` itself.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from imgdit.family import family_named, known_classes

Role = Literal["input", "hidden", "modulation", "output", "vector", "finite", "adapter"]
# What a pattern says: a role; "head" for a gain of one head, which is finite unless heads themselves grow; or "heads"
# for a vector with one entry per head, which grows with their number.
Kind = Role | Literal["head", "heads"]

# What torch.compile, DDP, FSDP1 and activation checkpointing call the module that they wrap.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# PEFT wraps the whole model in two more, and single layers in layers of its own.
_MODEL_WRAPPERS = (*_WRAPPERS, "base_model", "model")
_LAYER_WRAPPERS = (*_WRAPPERS, "base_layer", "original_module")
_TRAINED_COPY = "modules_to_save"  # PEFT's, followed by the adapter's name
# Prefixes of PEFT's own parameters. The width of an adapter is its rank, which does not grow with the model.
_ADAPTERS = (
    *("lora_", "hada_", "lokr_", "oft_", "boft_", "ia3_", "vera_lambda_", "vblora_", "randlora_", "fourierft_"),
    *("waveft_", "hra_", "c3a_", "miss_", "road_", "delora_", "gralora_", "glora_", "shira_"),
)


@dataclass(frozen=True)
class Structure:
    """The parameters of a model class. All patterns are `fnmatch`'s; of several, the first match counts."""

    roles: tuple[tuple[str, Kind] | tuple[str, Kind, float], ...]
    """Pattern, kind and, where it is not fan_in^-1/2, the standard deviation of the initialisation."""
    queries: tuple[tuple[str, ...], ...]
    """What the attention's logits are proportional to: the gains of the queries, or the projections where there are
    no gains. The first of these sets that names any parameter counts."""
    branches: tuple[str, ...]
    """What the output of a residual branch is proportional to."""
    blocks: tuple[str, ...]
    """Parameters inside residual branches."""
    depth: tuple[str, ...] = ("num_layers",)
    """Config keys whose sum is the number of blocks."""
    width: tuple[str, ...] = ("num_attention_heads", "attention_head_dim")
    """Config keys whose product is the width; the head dimension is the last, or the width over `heads`."""
    heads: str = "num_attention_heads"
    """Config key of the number of heads."""
    kv_heads: str = ""
    """Config key of the number of heads of keys and values, where that is another; it grows in the same proportion."""
    capped: tuple[str, ...] = ()
    """Parameters of conditioning vectors that do not grow beyond the width `cap`."""
    cap: int = 0
    less_one: tuple[str, ...] = ()
    """Gains that the model adds 1 to: their parameters are the gains less 1."""

    def kind(self, name: str) -> tuple[Kind, float | None]:
        """Kind of the parameter `name`, and its declared standard deviation.

        Raises:
            KeyError: no pattern matches.
        """
        if any(part.startswith(_ADAPTERS) for part in name.split(".")):
            return "adapter", None
        for pattern, kind, *std in self.roles:
            if fnmatch.fnmatchcase(name, pattern):
                return kind, std[0] if std else None
        raise KeyError(name)

    def width_of(self, config: Mapping[str, Any]) -> int:
        """Width of a model of this configuration."""
        width = 1
        for key in self.width:
            width *= config[key]
        return width

    def head_dim_of(self, config: Mapping[str, Any]) -> int:
        """Features of an attention head."""
        return self.width_of(config) // config[self.heads]

    @property
    def head_dim_name(self) -> str:
        """What a configuration calls the features of an attention head."""
        return self.width[-1] if len(self.width) > 1 else f"{self.width[0]} / {self.heads}"

    def depth_of(self, config: Mapping[str, Any]) -> int:
        """Blocks on the residual stream."""
        return sum(config[key] for key in self.depth)


def bare_model(model: Any) -> Any:
    """The model inside DDP, FSDP1, torch.compile, PEFT and activation checkpointing, in any order; untouched."""
    while _declared(type(model)) is None:
        children = dict(model.named_children())
        if len(children) != 1 or not children.keys() <= set(_MODEL_WRAPPERS):
            break
        (model,) = children.values()
    return model


def plain_name(name: str) -> str:
    """A parameter's name without the names of what wraps its module or the model."""
    parts = iter(name.removeprefix("base_model.model.").split("."))
    plain = []
    for part in parts:
        if part == _TRAINED_COPY:
            next(parts, None)
        elif part not in _LAYER_WRAPPERS:
            plain.append(part)
    return ".".join(plain)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether any of the patterns matches."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def structure_of(model: Any) -> Structure:
    """The declaration of a model's class.

    Raises:
        ValueError: the class is not known; names its first parameter, which would have to be classified.
    """
    declared = _declared(type(model))
    if declared is not None:
        return declared
    first = next((name for name, _ in model.named_parameters()), "none")
    raise ValueError(
        f"μP knows the structure of {', '.join(known_classes('mup'))}, not of {type(model).__name__}; the first "
        f"unclassified parameter is {first!r}. Declare {type(model).__name__}._mup_structure = "
        "imgdit.mup.Structure(...), or register_family(Family(..., mup=Structure(...)))"
    )


def _declared(kind: type) -> Structure | None:
    for cls in kind.__mro__:
        declared = vars(cls).get("_mup_structure")
        if declared is not None:
            return declared
        family = family_named(cls.__name__)
        if family is not None and family.mup is not None:
            return family.mup
    return None
