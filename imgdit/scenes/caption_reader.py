"""A small text encoder that learns to understand captions before it conditions images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from transformers import T5Config, T5EncoderModel


class CaptionReader(nn.Module):
    """A T5 encoder with one question per slot, answered from the masked mean of its output.

    Text has no positions of its own in an MMDiT, so who is left of whom must be in the tokens when they arrive: the
    questions put it there. Afterwards only `encoder` is kept.

    Args:
        slots: answers of each question, by its name.
        vocab_size: tokens of the tokenizer.
        d_model: features of a token.
        num_layers, num_heads, d_ff: of the encoder.
    """

    def __init__(
        self,
        slots: Mapping[str, Sequence[str]],
        vocab_size: int,
        d_model: int = 192,
        num_layers: int = 3,
        num_heads: int = 6,
        d_ff: int = 512,
    ):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model={d_model} must be a multiple of num_heads={num_heads}")
        config = T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=d_model // num_heads,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=num_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
        self.encoder = T5EncoderModel(config)
        self.questions = nn.ModuleList(nn.Linear(d_model, len(choices)) for choices in slots.values())

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, answers) of each question for token ids (B, T) with their mask (B, T)."""
        hidden_states = self.encoder(input_ids, attention_mask=mask)[0]  # (B, T, D)
        weight = mask[..., None].to(hidden_states)
        pooled = (hidden_states * weight).sum(1) / weight.sum(1)
        return [question(pooled) for question in self.questions]
