"""PEFT's configuration of a LoRA: the factor that it puts on each module's change, and what it says cannot be read.

It stands in the header of a file that diffusers wrote (`lora_adapter_metadata`), or beside a file that PEFT wrote
(`adapter_config.json`). https://huggingface.co/docs/peft/package_reference/lora
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from imgdit.lora.dialects import LoraKindError, Scale

CONFIG = "adapter_config.json"
"""PEFT's file, beside the weights."""
_BASE_CHANGED = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
"""Initialisations that take the LoRA's start out of the base weights, so that it fits the published ones no more."""
_PATTERN = re.compile(r"(?:[\w.^$|()-]|\\[.d]|\\d\+)*")
"""Module names and what PEFT's patterns have of regular expressions; nothing that takes exponential time to match."""

OMINICONTROL_TARGETS = (
    r"x_embedder",
    r"transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)",
    r"single_transformer_blocks\.\d+\.(norm\.linear|attn\.to_[qkv]|proj_mlp|proj_out)",
)
"""Layers that OminiControl's published LoRAs change: none of the text's."""


def of_transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a header's configuration that is the transformer's: a pipeline's has a prefix, a model's none."""
    prefix = "transformer."
    own = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    return own or {key: value for key, value in config.items() if not key.startswith("text_encoder")}


def scale_of(config: Mapping[str, Any], source: str) -> Scale | None:
    """The factor alpha / rank of each module, by alpha, its patterns and rsLoRA (alpha / sqrt(rank)).

    Args:
        config: fields of a `LoraConfig`.
        source: of the configuration, for messages.

    Returns:
        `None` where the configuration has no alpha.

    Raises:
        LoraKindError: it is of another kind than plain LoRA.
        ValueError: it holds what no configuration has.
    """
    kind = config.get("peft_type") or "LORA"
    if str(kind).upper().removeprefix("PEFTTYPE.") != "LORA":
        raise LoraKindError(f"is a {kind!s:.40}, as its PEFT configuration says; expected a plain LoRA")
    if config.get("use_dora"):
        raise LoraKindError(
            "is a DoRA, as its PEFT configuration says: it changes whole weights and cannot act on one condition's "
            "tokens; expected a plain LoRA"
        )
    if config.get("lora_bias"):
        raise LoraKindError("is a LoRA with biases (lora_bias=True), as its PEFT configuration says; expected none")
    started = config.get("init_lora_weights")
    if isinstance(started, str) and _BASE_CHANGED.match(started):
        raise LoraKindError(
            f"was started by init_lora_weights={started!r:.40}, which changes the base weights: on the published ones "
            "it is wrong. Save it by PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    if "lora_alpha" not in config:
        return None
    alpha, root = config["lora_alpha"], bool(config.get("use_rslora"))
    patterns = _checked_patterns(config, source)

    def scale(module: str, rank: int) -> float:
        of_module = patterns.get(get_pattern_key(list(patterns), module), alpha)
        return of_module / (math.sqrt(rank) if root else rank)

    return scale


def _checked_patterns(config: Mapping[str, Any], source: str) -> dict[str, float]:
    """The alphas of a configuration by pattern."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: alpha_pattern has {patterns!r:.60}; expected names of modules with their alphas")
    for name, alpha in {"lora_alpha": config["lora_alpha"], **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            raise ValueError(
                f"{source}: its PEFT configuration has the alpha {alpha!r:.60} of {name!r:.60}; expected a number"
            )
        try:
            sound = _PATTERN.fullmatch(name) and re.compile(f"({name})$")
        except re.error:
            sound = None
        if not sound:
            raise ValueError(f"{source}: alpha_pattern has {name!r:.60}; expected names of modules")
    return patterns
