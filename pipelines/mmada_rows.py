"""MMaDA's sequences: text and the codes of images as rows of tokens of one vocabulary (arXiv 2505.15809, section 3.1).

B rows, L tokens of a row, N codes of an image, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from imgdit.pipelines.masked_text_inputs import Side, padded_rows

NAMES = {
    "image_start": ("<|soi|>", "<|reserved_token_0|>"),
    "image_end": ("<|eoi|>", "<|reserved_token_1|>"),
    "text_to_image": ("<|t2i|>", "<|reserved_token_4|>"),
    "understanding": ("<|mmu|>", "<|reserved_token_5|>"),
    "padding": ("[iPAD]", "<|reserved_token_9|>"),
    "reasoning": ("<|r2i|>", "<|reserved_token_10|>"),
    "mask": ("<|mdm_mask|>",),
    "header_end": ("<|end_header_id|>",),
}
"""Special tokens by their names in a tokenizer; published ones lie in reserved places of LLaDA's."""


@dataclass(frozen=True)
class MMaDATokens:
    """Ids of special tokens and codes, as a tokenizer has them."""

    bos: int
    eos: int
    mask: int
    padding: int
    """In front of short prompts."""
    image_start: int
    image_end: int
    text_to_image: int
    """The first token of a row says its task; this one and the next two."""
    understanding: int
    reasoning: int
    """Of an answer in text that an image follows."""
    header_end: int
    """Behind the name of who speaks in a chat."""
    first_code: int
    """Of the codes, which follow the tokenizer's own ids."""
    codebook_size: int

    @classmethod
    def of(cls, tokenizer: Any, codebook_size: int, vocab_size: int) -> MMaDATokens:
        """Read a tokenizer.

        Args:
            codebook_size: codes of the image tokenizer.
            vocab_size: rows of the model's embedding, text and codes together.

        Raises:
            ValueError: a special token is missing, or text and codes exceed the model's vocabulary.
        """
        known, name = tokenizer.get_vocab(), getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        found = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
        for role, names in NAMES.items():
            found[role] = next((known[one] for one in names if one in known), None)
        missing = [" or ".join(NAMES.get(role, (f"{role}_token",))) for role, token in found.items() if token is None]
        if missing:
            raise ValueError(f"{name} is no tokenizer of MMaDA: it has no {', no '.join(missing)}")
        if len(tokenizer) + codebook_size > vocab_size:
            raise ValueError(
                f"{name} has {len(tokenizer)} tokens and the image tokenizer {codebook_size} codes, together "
                f"{len(tokenizer) + codebook_size}; the model's vocabulary has {vocab_size}. Take the tokenizers that "
                "the model was trained with"
            )
        return cls(**found, first_code=len(tokenizer), codebook_size=codebook_size)

    @property
    def codes(self) -> slice:
        """Columns of logits that are codes."""
        return slice(self.first_code, self.first_code + self.codebook_size)

    def image_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N) of codes (B, N); -1 becomes the mask token.

        Raises:
            ValueError: codes outside the table.
        """
        if codes.dtype != torch.long or codes.ndim != 2:
            raise ValueError(f"codes must be int64 (batch, codes), got {codes.dtype} {tuple(codes.shape)}")
        if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) >= self.codebook_size):
            raise ValueError(
                f"codes must lie in 0..{self.codebook_size - 1}, the table of the image tokenizer, or be -1 where "
                f"they are to be generated; got {int(codes.min())} to {int(codes.max())}"
            )
        return torch.where(codes < 0, self.mask, codes + self.first_code)


class MMaDARows(NamedTuple):
    """Rows of one task."""

    ids: torch.Tensor
    """(B, L)."""
    attention_mask: torch.Tensor
    """(B, L), 0 on padding that is not seen."""
    prompt: torch.Tensor
    """Boolean (B, L), what is given and never masked."""
    image: slice
    """Places of the codes; empty without an image."""


def text_to_image_rows(
    tokens: MMaDATokens, texts: Sequence[Sequence[int]], image_ids: torch.Tensor, length: int | None = None,
    side: Side = "left",
) -> MMaDARows:  # fmt: skip
    """`<t2i> bos text eos <soi> codes <eoi>`. The empty text is the prompt of unguided predictions.

    Args:
        texts: tokens of each row.
        image_ids: (B, N), see `MMaDATokens.image_ids`.
        length: tokens of the part before the image; longer ones are cut and end with the end token. `None`: of the
            longest one.
        side: where short ones are padded; published rows are on the left, and padding is never seen.
    """
    parts = [[tokens.text_to_image, *_begun(tokens, text), tokens.eos] for text in texts]
    length = max(map(len, parts)) if length is None else length
    if length < 3:
        raise ValueError(f"length must leave room for the task, the beginning and the end of a text, got {length}")
    parts = [part if len(part) <= length else [*part[: length - 1], tokens.eos] for part in parts]
    ids, real = padded_rows(parts, tokens.padding, side, length)
    image, prompt = _image_part(tokens, image_ids)
    return MMaDARows(
        torch.cat([ids, image], 1),
        torch.cat([real.long(), torch.ones_like(image)], 1),
        torch.cat([torch.ones_like(real), prompt], 1),
        _places(length, image_ids),
    )


def language_rows(tokens: MMaDATokens, texts: Sequence[Sequence[int]], length: int) -> MMaDARows:
    """`bos text eos`, filled up with end tokens, which are learnt; longer texts are cut and lose theirs.

    In a chat everything up to the last header's end is given.

    Args:
        texts: tokens of each row.
        length: tokens of a row.
    """
    ids = torch.full((len(texts), length), tokens.eos)
    prompt = torch.zeros_like(ids, dtype=torch.bool)
    for n, text in enumerate(texts):
        row = torch.tensor([*_begun(tokens, text), tokens.eos][:length])
        ids[n, : len(row)] = row
        headers = (row == tokens.header_end).nonzero()
        prompt[n, : int(headers[-1]) + 1 if len(headers) else 0] = True
    return MMaDARows(ids, torch.ones_like(ids), prompt, slice(0, 0))


def understanding_rows(
    tokens: MMaDATokens, texts: Sequence[Sequence[int]], image_ids: torch.Tensor, length: int
) -> MMaDARows:
    """`<mmu> <soi> codes <eoi>` and a row of `language_rows`.

    Args:
        texts, length: of `language_rows`.
        image_ids: (B, N).
    """
    image, prompt = _image_part(tokens, image_ids)
    text = language_rows(tokens, texts, length)
    task = torch.full((len(image), 1), tokens.understanding)
    ids = torch.cat([task, image, text.ids], 1)
    prompt_mask = torch.cat([torch.ones_like(task, dtype=torch.bool), torch.ones_like(prompt), text.prompt], 1)
    return MMaDARows(ids, torch.ones_like(ids), prompt_mask, _places(1, image_ids))


def reasoning_rows(
    tokens: MMaDATokens, texts: Sequence[Sequence[int]], image_ids: torch.Tensor, length: int
) -> MMaDARows:
    """`<r2i>`, a row of `language_rows`, `<soi> codes <eoi>`. A text without a header is all given.

    Args:
        texts, length: of `language_rows`.
        image_ids: (B, N).
    """
    image, prompt = _image_part(tokens, image_ids)
    text = language_rows(tokens, texts, length)
    task = torch.full((len(image), 1), tokens.reasoning)
    ids = torch.cat([task, text.ids, image], 1)
    asked = text.prompt | ~text.prompt.any(1, keepdim=True)
    prompt_mask = torch.cat([torch.ones_like(task, dtype=torch.bool), asked, prompt], 1)
    return MMaDARows(ids, torch.ones_like(ids), prompt_mask, _places(1 + length, image_ids))


def question_rows(
    tokens: MMaDATokens, chats: Sequence[Sequence[int]], image_ids: torch.Tensor, side: Side = "left"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and boolean mask (B, L) of `<mmu> <soi> codes <eoi> chat`, which an answer is to follow.

    Args:
        chats: tokens of each row, which end with the header of the answer.
        image_ids: (B, N).
    """
    images = _image_part(tokens, image_ids)[0].tolist()
    rows = [[tokens.understanding, *image, *chat] for image, chat in zip(images, chats)]
    return padded_rows(rows, tokens.padding, side)


def _image_part(tokens: MMaDATokens, image_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`<soi> codes <eoi>` (B, N + 2), and which of it is no code."""
    start, end = (torch.full((len(image_ids), 1), token) for token in (tokens.image_start, tokens.image_end))
    mark, codes = torch.ones_like(start, dtype=torch.bool), torch.zeros_like(image_ids, dtype=torch.bool)
    return torch.cat([start, image_ids, end], 1), torch.cat([mark, codes, mark], 1)


def _places(before: int, image_ids: torch.Tensor) -> slice:
    """Places of the codes behind so many tokens and the mark of the image's beginning."""
    return slice(before + 1, before + 1 + image_ids.shape[1])


def _begun(tokens: MMaDATokens, text: Sequence[int]) -> list[int]:
    """A text behind the token that begins every text."""
    return list(text) if text and text[0] == tokens.bos else [tokens.bos, *text]
