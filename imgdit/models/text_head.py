"""A text head for an `MMDiT` that has none."""

from __future__ import annotations

import torch

from imgdit.models.mmdit import MMDiT


def with_text_head(
    model: MMDiT,
    vocab_size: int,
    *,
    rope_axis: int | None = None,
    embeds: bool = False,
    generator: torch.Generator | None = None,
) -> MMDiT:
    """A model with the weights of another, and with new ones for a text head. Its images are those of the other.

    Args:
        model: without a text head.
        vocab_size: tokens that the head predicts.
        rope_axis: `text_rope_axis` of `MMDiT`.
        embeds: `text_embeds` of `MMDiT`.
        generator: source of the new weights.

    Raises:
        ValueError: the model has a text head.
    """
    if model.config.text_vocab_size is not None:
        raise ValueError(f"the model has a text head of {model.config.text_vocab_size} tokens already")
    head = {"text_vocab_size": vocab_size, "text_rope_axis": rope_axis, "text_embeds": embeds}
    own = {key: value for key, value in model.config.items() if not key.startswith("_")}
    grown = MMDiT(**{**own, **head})
    grown.init_weights(generator)
    grown.load_state_dict(model.state_dict(), strict=False)
    return grown if grown.dtype == model.dtype else grown.to(dtype=model.dtype)
