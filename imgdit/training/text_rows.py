"""Rows of tokens for language models: what people bring as text files, and batches of them.

B rows, L tokens; of images: B images of N tokens with C features, S rows of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imgdit.checkpoints import EMBEDDED
from imgdit.io.safe_json import parse_object
from imgdit.io.text import read_lines
from imgdit.training.batches import Movable

HELD_OUT = 20
"""Every so-manieth text is of the held-out split."""


@dataclass(frozen=True, eq=False)
class TextRows(Movable):
    """Texts of one length, padded with the end token."""

    ids: torch.Tensor
    """(B, L)."""
    prompt: torch.Tensor
    """Boolean (B, L), tokens that are given and never masked."""
    counted: torch.Tensor
    """Boolean (B, L), tokens whose loss counts."""


@dataclass(frozen=True, eq=False)
class ImageTexts(Movable):
    """Images, and texts about each of them."""

    tokens: torch.Tensor
    """(B, N, C) clean tokens of the images, row by row."""
    size: tuple[int, int]
    """Rows and columns of an image's tokens, N in all."""
    texts: TextRows
    """B · S rows: the first S are about the first image, and so on."""
    pooled: torch.Tensor | None = None
    """(1, P) pooled text that the model is given with all of them, that of the empty prompt; `None`: none."""


class TextRow(NamedTuple):
    """A prompt and what follows it, as tokens."""

    prompt: list[int]
    answer: list[int]


def text_rows(rows: Sequence[TextRow], length: int, eos_token_id: int, count_padding: bool = True) -> TextRows:
    """Rows of a fixed length: prompt, answer, end tokens.

    Args:
        rows: longer ones are cut behind, but for the last token, which is the end token.
        length: L.
        count_padding: also count the end tokens behind the first one, by which a masked model learns where texts end
            (LLaDA, arXiv 2502.09992, section 2.3).
    """
    ids = torch.full((len(rows), length), eos_token_id)
    prompt, counted = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for n, row in enumerate(rows):
        tokens = [*row.prompt, *row.answer][: length - 1]
        ids[n, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        prompt[n, : len(row.prompt)] = True
        counted[n, : length if count_padding else len(tokens) + 1] = True
    return TextRows(ids, prompt, counted & ~prompt)


def question_row(tokenizer: Any, question: str, answer: str, length: int, reverse: bool = False) -> TextRows:
    """One row of a question about an image and its answer, as Dual Diffusion is fine-tuned (arXiv 2501.00289):
    `Q: … A: ` and the answer, or the answer and ` Q: …`. Questions are never masked, end tokens that pad the answer
    are counted.

    Args:
        tokenizer: with an end token.
        length: L; what is too long is cut behind.
        reverse: whether the answer comes first.
    """
    end = tokenizer.eos_token_id
    asked, target = (
        tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1]
        for text in (f" Q: {question}" if reverse else f"Q: {question} A: ", answer)
    )
    if reverse:
        asked = [*asked, end]
    target = [*target, *[end] * (length - len(asked) - len(target))]
    parts = [(target, False), (asked, True)] if reverse else [(asked, True), (target, False)]
    ids = torch.tensor([[token for tokens, _ in parts for token in tokens][:length]])
    prompt = torch.tensor([[is_prompt for tokens, is_prompt in parts for _ in tokens][:length]])
    return TextRows(ids, prompt, ~prompt)


class UserTexts:
    """Texts of a file, for fine-tuning and pre-training.

    Args:
        path: `.jsonl` with {"prompt": …, "answer": …} or {"text": …} per line, otherwise a text per line.
        tokenizer: folder or Hub repository of the model's tokenizer.
        length: tokens of a row.
        split: "train", or "heldout": every twentieth text.
        subfolder: of `tokenizer`.

    Raises:
        ValueError: no such file, a line that is neither, or fewer texts than the splits need.
    """

    def __init__(
        self,
        path: str = "texts.jsonl",
        tokenizer: str = EMBEDDED,
        length: int = 128,
        split: str = "train",
        subfolder: str = "",
    ):
        from transformers import AutoTokenizer

        from imgdit.hub import find_model

        place = find_model(tokenizer, f"{subfolder}/tokenizer_config.json".lstrip("/"))
        self.tokenizer = AutoTokenizer.from_pretrained(place, subfolder=subfolder)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {tokenizer!r} has no eos_token, which texts are padded with")
        self.length = length
        texts = list(_read_texts(Path(path).expanduser()))
        self.texts = [text for n, text in enumerate(texts) if (n % HELD_OUT == HELD_OUT - 1) == (split == "heldout")]
        if not self.texts:
            raise ValueError(
                f"{path} has {len(texts)} texts, none for the split {split!r}; it needs at least {HELD_OUT}"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> TextRows:
        prompt, answer = self.texts[index]
        row = TextRow(begun(self.tokenizer, prompt), self._ids(answer))
        if len(row.prompt) >= self.length:
            raise ValueError(
                f"text {index} has a prompt of {len(row.prompt)} tokens, length={self.length} leaves no answer"
            )
        return text_rows([row], self.length, self.tokenizer.eos_token_id)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def begun(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt behind the token that begins every text, if the tokenizer has one."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def _read_texts(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} of texts")
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield "", line.strip()
            continue
        values = parse_object(line, f"{path}, line {number}")
        if isinstance(values.get("text"), str):
            yield "", values["text"]
        elif isinstance(values.get("prompt"), str) and isinstance(values.get("answer"), str):
            yield values["prompt"], values["answer"]
        else:
            raise ValueError(f"{path}, line {number}: expected prompt and answer, or text, got {sorted(values)}")


def collate_text_rows(samples: Sequence[TextRows]) -> TextRows:
    """Rows of one length to one batch."""
    return TextRows(*(torch.cat([getattr(s, name) for s in samples]) for name in ("ids", "prompt", "counted")))
