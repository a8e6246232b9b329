"""Pairs of texts that belong together, for contrastive training: what people bring as a file, and batches of them.

B pairs, N hard negatives, L tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imgdit import compat
from imgdit.checkpoints import EMBEDDED
from imgdit.io.safe_json import parse_object
from imgdit.io.text import read_lines
from imgdit.training.batches import Movable
from imgdit.training.text_rows import HELD_OUT


class TextPair(NamedTuple):
    """A text, one that it should be close to, and texts that it should be far from; as tokens."""

    query: list[int]
    positive: list[int]
    negatives: tuple[list[int], ...] = ()


@dataclass(frozen=True, eq=False)
class TextPairs(Movable):
    """Queries, then their positives in the same order, then all hard negatives."""

    ids: torch.Tensor
    """(2 B + N, L), padded on the right."""
    mask: torch.Tensor
    """Boolean (2 B + N, L), true on real tokens."""
    pairs: int
    """B."""


class UserTextPairs:
    """Pairs of a file.

    Args:
        path: `.jsonl` with {"query": …, "positive": …} per line, and "negative" with a text or a list of texts that
            only look alike.
        tokenizer: folder or Hub repository of the model's tokenizer.
        length: tokens after which a text is cut.
        split: "train", or "heldout": every twentieth pair.
        subfolder: of `tokenizer`.

    Raises:
        ValueError: no such file, another line, or fewer pairs than the splits need.
    """

    def __init__(
        self,
        path: str = "pairs.jsonl",
        tokenizer: str = EMBEDDED,
        length: int = 128,
        split: str = "train",
        subfolder: str = "",
    ):
        from transformers import AutoTokenizer

        from imgdit.hub import find_model

        place = find_model(tokenizer, f"{subfolder}/tokenizer_config.json".lstrip("/"))
        self.tokenizer = AutoTokenizer.from_pretrained(place, subfolder=subfolder)
        self.length = length
        texts = _read_pairs(Path(path).expanduser())
        self.texts = [text for n, text in enumerate(texts) if (n % HELD_OUT == HELD_OUT - 1) == (split == "heldout")]
        if not self.texts:
            raise ValueError(
                f"{path} has {len(texts)} pairs, none for the split {split!r}; it needs at least {HELD_OUT}"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> TextPair:
        query, positive, negatives = self.texts[index]
        return TextPair(self._ids(query), self._ids(positive), tuple(self._ids(text) for text in negatives))

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text)["input_ids"][: self.length]
        if not ids:
            raise ValueError(f"the text {text!r} has no token")
        return ids


def _read_pairs(path: Path) -> list[tuple[str, str, list[str]]]:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} of pairs")
    found = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        values = parse_object(line, f"{path}, line {number}")
        negatives = values.get("negative", [])
        negatives = [negatives] if isinstance(negatives, str) else negatives
        texts = [values.get("query"), values.get("positive"), *(negatives if isinstance(negatives, list) else [None])]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{path}, line {number}: expected texts query and positive, and perhaps negative with one or more, "
                f"got {sorted(values)}"
            )
        found.append((texts[0], texts[1], texts[2:]))
    return found


def collate_text_pairs(samples: Sequence[TextPair]) -> TextPairs:
    """Pairs to one batch, padded to the longest text."""
    rows = [pair.query for pair in samples] + [pair.positive for pair in samples]
    rows += [negative for pair in samples for negative in pair.negatives]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = True
    return TextPairs(ids, mask, len(samples))


def text_features(model: Any, pairs: TextPairs) -> torch.Tensor:
    """Features (2 B + N, L, D) of each token after the model's last norm, by its own forward pass, so that wrappers of
    distributed training see it.

    Args:
        model: an encoder or a language model of transformers, wrapped or not.
    """
    takes_part = "logits_to_keep" in inspect.signature(compat.unwrapped(model).forward).parameters
    options = {"logits_to_keep": 1} if takes_part else {}  # of the shape (…, vocabulary), and not needed
    output = model(input_ids=pairs.ids, attention_mask=pairs.mask.long(), output_hidden_states=True, **options)
    features = output.hidden_states[-1]
    # The sum of no logit: it gives a head that is trained a gradient of 0, which DDP and the checkpoints expect.
    return features + output.logits[:, :0].sum() if "logits" in output else features
