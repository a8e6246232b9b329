"""What `ImageTextPipeline` is given: rows of tokens of which some are to be written, and what it refuses.

B rows, L tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch

from imgdit.naming import check_choice, is_count, shown
from imgdit.schedulers.masked_text import Generators

MASK_TOKENS = ("<extra_id_0>",)
"""Tokens that stand for a mask where a tokenizer names none: T5's first sentinel (Dual Diffusion)."""
HOLE = re.compile(r"\[\?(\d*)\]")
"""A hole of a text: `[?]` for one token, `[?3]` for three."""
_BRACKETS = re.compile(r"\[[^\[\]]*\]")


class WritingCall(TypedDict, total=False):
    """Arguments of every method that writes; `WritingOptions` says what each does."""

    max_length: int | None
    num_inference_steps: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    guidance_scale: float
    cache: bool
    resolution: int | None
    latents: torch.Tensor | None
    generator: Generators
    output_type: str
    callback_on_step_end: Callable[..., Any] | None
    callback_on_step_end_tensor_inputs: list[str] | None


@dataclass(frozen=True, eq=False)
class WritingOptions:
    """How texts are written.

    Raises:
        ValueError: a value that no model takes.
    """

    max_length: int | None = None
    """Tokens L of a row, prompt and end token included; `None`: the pipeline's `text_length`."""
    num_inference_steps: int | None = None
    """Steps of the text scheduler. `None`: 16 for one that draws which masks go (`choose="ancestral"`), else one per
    token of a row; of `joint` 28."""
    temperature: float | None = None
    """0: the most probable tokens. `None`: 1 for a scheduler that draws (`choose="ancestral"`), else 0."""
    top_p: float | None = None
    top_k: int | None = None
    guidance_scale: float = 1.0
    """Above 1: steer away from what the model writes without the image."""
    cache: bool = True
    """Keep keys and values of an image that sees only itself over the steps of its text; otherwise they are computed
    in each step, with the same result. Dual Diffusion's images see the text and are always computed."""
    resolution: int | None = None
    """Side in pixels at which images are read; `None`: the side that the model was trained on."""
    latents: torch.Tensor | None = None
    """(B, C, h, w) of the images, in place of `images`."""
    generator: Generators = None
    """One, or a list of one per row: a row's text does not depend on the others then."""
    output_type: str = "text"
    """"text", or "seq" for token ids alone."""
    callback_on_step_end: Callable[..., Any] | None = None
    """Called as `callback(pipe, step, timestep, tensors)` after each step; may return a changed `block_x`."""
    callback_on_step_end_tensor_inputs: list[str] | None = None
    """Which tensors it gets; `["block_x"]`, the tokens, by default."""

    def __post_init__(self) -> None:
        for name in ("max_length", "num_inference_steps", "resolution"):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_count(value):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not self.guidance_scale >= 0:
            raise ValueError(f"guidance_scale must be at least 0 (up to 1 is off), got {self.guidance_scale}")
        check_choice("output_type", self.output_type, ("text", "seq"))


class Rows(NamedTuple):
    """Rows of tokens with masks."""

    ids: torch.Tensor
    """(B, L)."""
    holes: torch.Tensor
    """Boolean (B, L), masks that are to be filled."""
    starts: list[int]
    """Where what is returned as text begins in each row: behind a question."""


def mask_token_of(tokenizer: Any) -> int:
    """The token that stands for a mask.

    Raises:
        ValueError: the tokenizer has none.
    """
    found = getattr(tokenizer, "mask_token_id", None)
    if found is not None:
        return int(found)
    known = tokenizer.get_vocab()
    for name in MASK_TOKENS:
        if name in known:
            return int(known[name])
    raise ValueError(
        f"the tokenizer has no mask_token and none of {', '.join(MASK_TOKENS)}, so no text can be masked; take the "
        "tokenizer that the text head was trained with"
    )


def check_text(name: str, text: Any) -> str:
    """Refuse what is no text, an empty one, and control characters."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {shown(text)}")
    if not text.strip():
        raise ValueError(f"{name} is empty; write something")
    control = [char for char in text if unicodedata.category(char) == "Cc"]
    if control:
        raise ValueError(
            f"{name} has the control character U+{ord(control[0]):04X} at place {text.index(control[0])}; remove it"
        )
    return text


def texts_of(name: str, texts: Any) -> list[str]:
    """A text or several, checked."""
    listed = [texts] if isinstance(texts, str) else texts
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ValueError(f"{name} must be a text or a list of texts, at least one, got {shown(texts)}")
    return [check_text(name, text) for text in listed]


def empty_rows(count: int, length: int, mask: int) -> Rows:
    """Rows of masks alone, for captions."""
    ids = torch.full((count, length), mask)
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool), [0] * count)


def question_rows(tokenizer: Any, questions: Sequence[str], template: str, length: int, mask: int) -> Rows:
    """Questions, and masks for their answers.

    Args:
        template: "{}" stands for the question. The end token that a tokenizer puts behind it is left out, as in
            training.

    Raises:
        ValueError: a question that leaves no place for an answer.
    """
    rows = empty_rows(len(questions), length, mask)
    for n, question in enumerate(questions):
        tokens = tokenizer(template.format(question), add_special_tokens=False)["input_ids"]
        if len(tokens) >= length:
            raise ValueError(
                f"the question {question!r} has {len(tokens)} tokens and max_length={length} leaves none for an "
                "answer; shorten it, or raise max_length"
            )
        rows.ids[n, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        rows.holes[n, : len(tokens)] = False
        rows.starts[n] = len(tokens)
    return rows


def filling_rows(tokenizer: Any, texts: Sequence[str], length: int, mask: int, eos: int) -> Rows:
    """Texts with holes, end tokens behind them.

    Raises:
        ValueError: a text without a hole, an unknown placeholder, or a text that is too long.
    """
    rows = Rows(
        torch.full((len(texts), length), eos), torch.zeros(len(texts), length, dtype=torch.bool), [0] * len(texts)
    )
    for n, text in enumerate(texts):
        unknown = [found for found in _BRACKETS.findall(text) if not HOLE.fullmatch(found)]
        if unknown:
            raise ValueError(
                f"{text!r} has the unknown placeholder {unknown[0]}; write [?] for one token, [?3] for three"
            )
        if not HOLE.search(text):
            raise ValueError(f"{text!r} has no hole; write [?] in the place of a token to fill, [?3] of three")
        tokens: list[int] = []
        for part, number in zip(*_parts(text)):
            tokens += tokenizer(part, add_special_tokens=False)["input_ids"] if part.strip() else []
            rows.holes[n, len(tokens) : len(tokens) + number] = True
            tokens += [mask] * number
        if len(tokens) >= length:
            raise ValueError(
                f"{text!r} has {len(tokens)} tokens and an end token, max_length is {length}; shorten it, or raise "
                "max_length"
            )
        rows.ids[n, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return rows


def _parts(text: str) -> tuple[list[str], list[int]]:
    """Pieces between holes, and the tokens of the hole behind each; none behind the last."""
    pieces = HOLE.split(text)
    return pieces[::2], [int(number or 1) for number in pieces[1::2]] + [0]
