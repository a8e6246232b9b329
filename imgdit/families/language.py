"""Llama and Qwen2 of transformers, which are the backbones of LLaDA, LLaDA-V, LaViDa, MMaDA and Dream. All of their
tokens are text; images, where there are any, are vectors among them."""

from __future__ import annotations

from typing import Any

import torch

from imgdit.family import Arguments, Family


def given_tokens(arguments: Arguments) -> torch.Tensor:
    """Tokens (B, L), or their embeddings (B, L, D)."""
    ids = arguments.get("input_ids")
    return arguments["inputs_embeds"] if ids is None else ids


def masked_per_mille(model: Any, arguments: Arguments) -> float:
    """1000 times the fraction of masks among the tokens of a call; 0 for a model without a mask token."""
    mask, given = getattr(model.config, "mask_token_id", None), given_tokens(arguments)
    if mask is None:
        return 0.0
    if given.ndim == 2:
        return 1000.0 * float((given == mask).float().mean())
    vector = model.get_input_embeddings().weight[mask]
    return 1000.0 * float((given == vector.to(given)).all(-1).float().mean())


FAMILY = Family(
    classes=("LlamaPreTrainedModel", "Qwen2PreTrainedModel"),
    places=lambda model, arguments: None,  # there is no image that is generated
    timestep=masked_per_mille,
    latents=given_tokens,
    text_length=lambda model, arguments: given_tokens(arguments).shape[1],
    text_parts="",  # all
    image_places={"LlamaAttention": 0, "Qwen2Attention": 0},
    guides_in_batch=False,
)
