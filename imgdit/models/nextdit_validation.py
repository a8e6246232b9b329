"""What `NextDiT` refuses, with what it got, what it expects and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from imgdit import compat
from imgdit.layout import FrameLayout
from imgdit.mup import check_settings, mup_settings
from imgdit.naming import check_choice, nearest

# What training left in the published configuration: its averaging of weights and its memory saving.
_LEFT_OVER = {
    *("decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup"),
    *("forward_dtype", "param_dtype", "remat_attention", "remat_block", "remat_mlp"),
}


def read_config(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what training left in it.

    Raises:
        ValueError: another architecture, or a key that no configuration has.
    """
    name = config.get("_class_name", cls.__name__)
    if name != cls.__name__:
        raise ValueError(f"this folder holds a {name}, not a {cls.__name__}; load it with its own class")
    known = compat.init_keys(cls)
    kept = {key: value for key, value in config.items() if key not in _LEFT_OVER}
    unknown = [key for key in kept if not key.startswith("_") and key not in known | {"quantization_config"}]
    if unknown:
        raise ValueError(f"unknown configuration key {nearest(unknown[0], known)}")
    return kept


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration of `NextDiT` that cannot work."""
    for field in ("in_channels", "hidden_size", "depth", "num_heads", "multiple_of", "caption_channels"):
        if config[field] < 1:
            raise ValueError(f"{field} must be positive, got {config[field]}")
    patch = tuple(config["patch_size"])
    if len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2] or patch[1] < 1:
        raise ValueError(f"patch_size must be (1, p, p): a token belongs to one frame; got {patch}")
    hidden, heads = config["hidden_size"], config["num_heads"]
    if hidden % heads or hidden // heads % 6:
        raise ValueError(
            f"hidden_size / num_heads must be a multiple of 6 (three axes turn pairs of features), "
            f"got {hidden} / {heads}"
        )
    if config["num_kv_heads"] is not None and (config["num_kv_heads"] < 1 or heads % config["num_kv_heads"]):
        raise ValueError(f"num_kv_heads must divide num_heads={heads}, got {config['num_kv_heads']}")
    check_choice("norm_type", config["norm_type"], ("rms",))
    for field in ("pred_sigma", "guidance_embeds"):
        check_choice(field, config[field], (False,))
    cap = config["attention_softcap"]
    if cap is not None and cap != "auto" and not (isinstance(cap, int | float) and cap > 0):
        raise ValueError(f"attention_softcap must be a positive number, 'auto' or None, got {cap!r}")
    check_settings(mup_settings(config), hidden // heads, "hidden_size / num_heads")


def check_tokens(
    model: Any,
    hidden_states: torch.Tensor,
    text: torch.Tensor,
    pooled: torch.Tensor | None,
    timestep: torch.Tensor,
    layout: FrameLayout,
) -> None:
    """Refuse tokens that do not fit the layout, the text or the model's positions."""
    batch, config = hidden_states.shape[0], model.config
    if model._parallel_config is not None:
        raise ValueError("NextDiT runs on one rank; disable context parallelism")
    if layout.is_packed:
        raise ValueError(f"NextDiT takes one scene per sample, got a packed layout of {layout.num_scenes}")
    if layout.has_adapters:
        raise ValueError(
            f"frames with adapters of their own ({', '.join(sorted(layout.claimed))}) need MMDiT; "
            "a LoRA for the whole of NextDiT needs no mention in the layout"
        )
    if tuple(hidden_states.shape[1:]) != (layout.image_length, model.token_channels):
        raise ValueError(
            f"hidden_states must be (batch, {layout.image_length}, {model.token_channels}) for the layout's frames "
            f"{layout.lengths}, got {tuple(hidden_states.shape)}"
        )
    if not layout.predicted:
        raise ValueError("every frame of the layout is clean: there is nothing to predict")
    if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != config.caption_channels:
        raise ValueError(
            f"encoder_hidden_states must be ({batch}, tokens, {config.caption_channels}), got {tuple(text.shape)}"
        )
    if pooled is not None and tuple(pooled.shape) != (batch, config.caption_channels):
        raise ValueError(
            f"pooled_projections must be ({batch}, {config.caption_channels}) or None, got {tuple(pooled.shape)}"
        )
    allowed = ((batch,), (batch, len(layout.live)), (batch, layout.image_length))
    if tuple(timestep.shape) not in allowed:
        raise ValueError(
            f"timestep must be one of {allowed} (per sample, frame or token), got {tuple(timestep.shape)}"
        )
    check_positions(model, layout)


def check_positions(model: Any, layout: FrameLayout) -> None:
    """Refuse frames beyond the positions the model was built for; the reference fails there."""
    for i in layout.live:
        frame = layout.frames[i]
        if frame.index >= model.max_frames:
            raise ValueError(
                f"frame {frame.index:g} is beyond the model's positions, which end at {model.max_frames} frames; "
                "give fewer frames"
            )
        last = [(n - 1 + shift) * frame.scale for n, shift in zip(frame.size, frame.offset, strict=True)]
        if max(last) >= model.max_grid:
            raise ValueError(
                f"a frame of {frame.size[0]}x{frame.size[1]} tokens is beyond the model's positions, which end at "
                f"{model.max_grid}; make it smaller"
            )
