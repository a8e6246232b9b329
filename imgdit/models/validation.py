"""What `MMDiT` refuses, with what it got, what it expects and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from imgdit.attention.cache import KVCache
from imgdit.layout import FrameLayout
from imgdit.mup import check_settings, mup_settings
from imgdit.naming import check_choice


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration of `MMDiT` that cannot work."""
    widths = ("in_channels", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim")
    for field in ("patch_size", "num_attention_heads", *widths, "text_vocab_size"):
        if config[field] is None and field in ("pooled_projection_dim", "text_vocab_size"):
            continue
        if config[field] < 1:
            raise ValueError(f"{field} must be positive, got {config[field]}")
    if min(config["num_layers"], config["num_single_layers"]) < 0:
        raise ValueError("num_layers and num_single_layers count blocks and cannot be negative")
    if config["num_layers"] + config["num_single_layers"] == 0:
        raise ValueError("num_layers and num_single_layers are both 0; a model needs at least one block")
    check_choice("pos_embed_type", config["pos_embed_type"], ("rope", "sincos"))
    check_choice("qk_norm", config["qk_norm"], ("rms_norm", None))
    head_dim = config["attention_head_dim"]
    width = config["num_attention_heads"] * head_dim
    axes = config["axes_dims_rope"]
    if config["pos_embed_type"] == "rope":
        if sum(axes) != head_dim or any(dim % 2 for dim in axes) or len(axes) != 3:
            raise ValueError(
                f"axes_dims_rope must be three even numbers that add up to attention_head_dim={head_dim}, "
                f"got {tuple(axes)} (sum {sum(axes)})"
            )
    elif width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, got {width} (heads * attention_head_dim)")
    wrong = [i for i in config["dual_attention_layers"] if not 0 <= i < config["num_layers"]]
    if wrong:
        raise ValueError(
            f"dual_attention_layers names blocks {wrong}, but there are num_layers={config['num_layers']}"
        )
    if config["context_pre_only"] and config["num_single_layers"]:
        raise ValueError(
            f"context_pre_only ends the text stream, but {config['num_single_layers']} single-stream blocks read it; "
            "set num_single_layers=0 or context_pre_only=False"
        )
    _check_head(config)
    check_settings(mup_settings(config), head_dim)


def _check_head(config: Mapping[str, Any]) -> None:
    """Refuse settings of the text head, and of what it does without, that cannot work."""
    if config["pooled_projection_dim"] is None and config["guidance_embeds"]:
        raise ValueError("guidance_embeds needs pooled text; set pooled_projection_dim, or leave the guidance out")
    axis, axes, tokens = config["text_rope_axis"], config["axes_dims_rope"], config["null_image_tokens"]
    if config["text_vocab_size"] is None:
        if axis is not None or tokens or config["text_embeds"]:
            raise ValueError(
                f"text_rope_axis={axis}, text_embeds={config['text_embeds']} and null_image_tokens={tokens} are of a "
                "text head; set text_vocab_size, or leave them out"
            )
        return
    if config["context_pre_only"]:
        raise ValueError(
            "context_pre_only ends the text stream in the last block, and the text head reads it behind that block; "
            "set context_pre_only=False or leave it out"
        )
    if axis is not None and (config["pos_embed_type"] != "rope" or not 0 <= axis < len(axes)):
        raise ValueError(
            f"text_rope_axis must be None or the number of one of {len(axes)} rotary axes, from 0, of a model with "
            f"pos_embed_type='rope'; got {axis} with pos_embed_type={config['pos_embed_type']!r}"
        )
    if tokens < 0:
        raise ValueError(f"null_image_tokens counts tokens and cannot be negative, got {tokens}")


def check_inputs(
    model: Any,
    hidden_states: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor | None,
    timestep: torch.Tensor,
    img_ids: torch.Tensor | None,
    txt_ids: torch.Tensor | None,
    guidance: torch.Tensor | None,
    joint_attention_kwargs: Mapping[str, Any] | None,
    encoder_attention_mask: torch.Tensor | None,
    layout: FrameLayout | None,
    cache: KVCache | None,
) -> None:
    """Refuse arguments of `MMDiT.forward` whose shapes do not fit the model or each other."""
    config = model.config
    if model._parallel_config is not None and (layout is not None or encoder_attention_mask is not None):
        raise ValueError(
            "context parallelism splits one frame's tokens evenly over the ranks; it would cut through a layout or a "
            "text mask. Pass img_ids and full texts, or run this model on one rank"
        )
    rotary = config.pos_embed_type == "rope"
    if joint_attention_kwargs:
        raise ValueError(
            f"joint_attention_kwargs knows only 'scale', got {sorted(joint_attention_kwargs)}; adapters on frames and "
            "attention between frames are set by the layout"
        )
    if hidden_states is None:
        _check_no_image(config, img_ids, layout)
    elif hidden_states.ndim == 4 and not rotary and layout is None:
        _check_grid(model, hidden_states)
    elif hidden_states.ndim != 3:
        expected = "(batch, tokens, channels)" + (
            "" if rotary else ", or (batch, channels, height, width) and no layout"
        )
        raise ValueError(f"hidden_states must be {expected}, got shape {tuple(hidden_states.shape)}")
    elif layout is None and not rotary:
        raise ValueError(
            "a model with sin-cos positions needs a layout to place tokens; pass layout= or a latent grid"
        )
    elif hidden_states.shape[2] != model.token_channels:
        raise ValueError(
            f"hidden_states must have {model.token_channels} channels per token, got {hidden_states.shape[2]}"
        )
    if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[2] != config.joint_attention_dim:
        raise ValueError(
            f"encoder_hidden_states must be (batch, tokens, {config.joint_attention_dim}), "
            f"got {tuple(encoder_hidden_states.shape)}"
        )
    batch, text = encoder_hidden_states.shape[:2]
    if hidden_states is not None and (batch := hidden_states.shape[0]) != encoder_hidden_states.shape[0]:
        raise ValueError(f"hidden_states has batch {batch}, encoder_hidden_states {encoder_hidden_states.shape[0]}")
    samples = batch
    if layout is not None:
        assert hidden_states is not None  # _check_no_image
        writes = cache is not None and cache.mode == "write"
        samples = _check_layout(hidden_states, text, img_ids, encoder_attention_mask, layout, writes)
    elif cache is not None:
        raise ValueError("a cache keeps the frozen frames of a layout; pass layout= as well")
    elif rotary and hidden_states is not None:
        _check_ids("img_ids", img_ids, hidden_states.shape[1])
    elif img_ids is not None:
        raise ValueError("img_ids are rotary positions; this model adds sin-cos positions (pos_embed_type='sincos')")
    check_cache(layout, cache, batch)
    if txt_ids is not None:
        _check_ids("txt_ids", txt_ids, text)
    _check_pooled(pooled_projections, samples, config.pooled_projection_dim)
    frames = 1 if layout is None else len(layout.live)
    _check_levels("timestep", timestep, samples, batch, frames)
    if config.guidance_embeds and guidance is None:
        raise ValueError("this model takes the guidance scale as an input (guidance_embeds=True); pass guidance=")
    if guidance is not None and not config.guidance_embeds:
        raise ValueError("this model has no guidance embedding; leave guidance out and guide with two predictions")
    if guidance is not None:
        _check_levels("guidance", guidance, samples, batch, frames)
    if encoder_attention_mask is not None and tuple(encoder_attention_mask.shape) != (batch, text):
        raise ValueError(
            f"encoder_attention_mask must be ({batch}, {text}), got {tuple(encoder_attention_mask.shape)}"
        )


def check_text_level(
    model: Any, text_timestep: torch.Tensor | None, layout: FrameLayout | None, text: torch.Tensor
) -> None:
    """Refuse a noise level of the text that does not fit the model, the layout or the text (B, T, J)."""
    generated = text_timestep is not None if layout is None else bool(layout.predicted_texts)
    if generated and model.config.text_vocab_size is None:
        raise ValueError(
            "a text is to be generated, and this model has no text head; hold every text at a sigma and leave "
            "text_timestep out, or take a model with text_vocab_size"
        )
    if text_timestep is None:
        return
    if not generated:
        raise ValueError("text_timestep is the noise level of texts that are generated; the layout has none")
    scenes = text.shape[0] if layout is None or not layout.is_packed else layout.num_scenes
    if tuple(text_timestep.shape) != (scenes,):
        raise ValueError(f"text_timestep must be ({scenes},), one per sample, got shape {tuple(text_timestep.shape)}")


def _check_no_image(config: Any, img_ids: torch.Tensor | None, layout: FrameLayout | None) -> None:
    if not config.null_image_tokens:
        raise ValueError(
            "hidden_states is None, and this model has no tokens that stand for an image where there is none "
            "(null_image_tokens=0); give an image"
        )
    if layout is not None or img_ids is not None:
        raise ValueError("hidden_states is None, and nothing is to be placed; leave out layout and img_ids")


def _check_pooled(pooled: torch.Tensor | None, samples: int, features: int | None) -> None:
    got = None if pooled is None else tuple(pooled.shape)
    expected = None if features is None else (samples, features)
    if got != expected:
        raise ValueError(f"pooled_projections must be {expected}, got {got}")


def check_cache(
    layout: FrameLayout | None, cache: KVCache | None, batch: int, rotation: tuple[float, float] | None = None
) -> None:
    """Refuse a cache, or none, that does not go with the layout of a forward pass."""
    if layout is None:
        return
    if cache is not None:
        cache.begin(layout, batch, rotation)
    elif layout.cached:
        raise ValueError(
            "the layout leaves its frozen frames to a key/value cache; pass the cache= that a step with the whole "
            "layout wrote, or the whole layout"
        )


def _check_grid(model: Any, latents: torch.Tensor) -> None:
    patch, side = model.config.patch_size, model.config.pos_embed_max_size
    height, width = latents.shape[-2:]
    if latents.shape[1] != model.config.in_channels:
        raise ValueError(f"latents must have {model.config.in_channels} channels, got {latents.shape[1]}")
    if height % patch or width % patch:
        raise ValueError(f"latents of {height}x{width} cells do not divide into patches of {patch}x{patch}")
    if max(height, width) // patch > side:
        raise ValueError(
            f"latents of {height}x{width} cells are {height // patch}x{width // patch} patches, "
            f"the position table ends at {side}x{side}"
        )


def _check_layout(
    hidden_states: torch.Tensor,
    text: int,
    img_ids: torch.Tensor | None,
    encoder_attention_mask: torch.Tensor | None,
    layout: FrameLayout,
    writes: bool,
) -> int:
    """Check the tensors against a layout; the number of samples (batch, or scenes of a packed layout).

    Args:
        writes: whether the pass fills a cache, and so need not predict anything.
    """
    if img_ids is not None:
        raise ValueError("the layout holds the positions; pass either img_ids or layout")
    if hidden_states.shape[1] != layout.image_length:
        raise ValueError(
            f"hidden_states has {hidden_states.shape[1]} tokens, the layout's frames {layout.lengths} "
            f"have {layout.image_length}"
        )
    if text != layout.text_length:
        raise ValueError(f"encoder_hidden_states has {text} tokens, the layout expects {layout.text_length}")
    if not layout.predicted and not layout.predicted_texts and not writes:
        raise ValueError("every frame of the layout is held at its noise level: there is nothing to predict")
    if not layout.is_packed:
        return hidden_states.shape[0]
    if hidden_states.shape[0] != 1:
        raise ValueError(f"a packed layout is one sequence of batch 1, got batch {hidden_states.shape[0]}")
    if encoder_attention_mask is not None:
        raise ValueError("a packed layout has no padding; pack each text at its own length and leave the mask out")
    return layout.num_scenes


def _check_ids(name: str, ids: torch.Tensor | None, length: int) -> None:
    if ids is None or ids.ndim != 2 or tuple(ids.shape) != (length, 3):
        got = "nothing" if ids is None else f"shape {tuple(ids.shape)}"
        raise ValueError(f"{name} must be ({length}, 3), one (frame, row, column) per token, got {got}")


def _check_levels(name: str, values: torch.Tensor, samples: int, batch: int, frames: int) -> None:
    if tuple(values.shape) not in ((samples,), (batch, frames)):
        raise ValueError(
            f"{name} must be ({samples},), one per sample, or ({batch}, {frames}), one per frame; "
            f"got shape {tuple(values.shape)}"
        )
