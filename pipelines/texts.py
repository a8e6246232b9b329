"""Encoded text as a guided run reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class JoinedText(NamedTuple):
    """Both halves of guidance at one length, the negative half first. B samples, T tokens; k is 2, or 1 without
    guidance."""

    embeds: torch.Tensor
    """(B, T, J)."""
    negative_embeds: torch.Tensor | None
    """(B, T, J)."""
    pooled: torch.Tensor
    """(k * B, P)."""
    mask: torch.Tensor | None
    """(k * B, T) boolean; `None` where no row is padded."""


def join_halves(
    embeds: torch.Tensor,
    negative_embeds: torch.Tensor | None,
    pooled: torch.Tensor,
    negative_pooled: torch.Tensor | None,
    mask: torch.Tensor,
    negative_mask: torch.Tensor | None,
) -> JoinedText:
    """Join what `ImgDiTPipeline.encode_prompt` returns; the shorter half is padded."""
    if negative_embeds is not None:
        assert negative_pooled is not None and negative_mask is not None
        length = max(embeds.shape[1], negative_embeds.shape[1])
        embeds, negative_embeds = _pad(embeds, length), _pad(negative_embeds, length)
        pooled = torch.cat([negative_pooled, pooled])
        mask = torch.cat([_pad(negative_mask, length), _pad(mask, length)])
    padded = not bool(mask.all())  # asked once: it waits for the device
    return JoinedText(embeds, negative_embeds, pooled, mask if padded else None)


def _pad(x: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros (False) behind the tokens up to a length."""
    missing = length - x.shape[1]
    return x if missing == 0 else torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)


BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
"""Tokens that a tokenizer with byte fallback spells unknown words in."""


def unknown_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """Words of a prompt that a tokenizer with byte fallback spells in bytes, in their order, each once."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or BYTES[0] not in tokenizer.get_vocab():
        return []
    backend = tokenizer.backend_tokenizer
    text = prompt if backend.normalizer is None else backend.normalizer.normalize_str(prompt)
    encoded = backend.encode(text)
    spans: dict[int, tuple[int, int]] = {}
    for word, token in zip(encoded.word_ids, encoded.tokens):
        if token in BYTES:
            spans.setdefault(word, encoded.word_to_chars(word))
    return list(dict.fromkeys(text[start:end] for start, end in spans.values()))
