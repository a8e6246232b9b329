"""What `MaskedTextPipeline` is given: prompts as rows of tokens, and what it refuses.

B rows, P prompt tokens, G new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from imgdit.models.image_rows import ImageVectors
from imgdit.models.masked_text_passes import CacheKind
from imgdit.naming import check_choice, is_count
from imgdit.schedulers.masked_text import Choose, Generators, Sampling

Side = Literal["left", "right"]
REMASKING = {"low_confidence": "probability"}
"""LLaDA's names of how masks are chosen -> the scheduler's; "random" is called the same."""
GEN_LENGTH = 2048
"""`LLaDA2Pipeline`'s."""
MOST_STEPS = 100_000
"""Of a block: more than any has tokens, and few enough for a table of what each step reveals."""


@dataclass(frozen=True)
class TextOptions:
    """How `MaskedTextPipeline` writes; the names are those of its arguments.

    Raises:
        ValueError: a value that no model takes.
    """

    block_length: int
    num_inference_steps: int
    temperature: float
    top_p: float | None
    top_k: int | None
    sampling_method: str
    threshold: float | None
    editing_threshold: float | None
    max_post_steps: int
    minimal_topk: int
    guidance_scale: float
    cache: CacheKind | None
    remasking: str | None
    forbidden_tokens: tuple[int, ...]
    late_tokens: tuple[int, ...]
    allow_mask_token: bool
    eos_early_stop: bool
    generator: Generators
    output_type: str
    stops: tuple[tuple[int, ...], ...] = ()
    """Tokens of each stop string; a row ends before one of them."""

    def __post_init__(self) -> None:
        for name in ("block_length", "num_inference_steps", "minimal_topk"):
            value = getattr(self, name)
            if not is_count(value):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_inference_steps > MOST_STEPS:
            raise ValueError(f"num_inference_steps must be at most {MOST_STEPS}, got {self.num_inference_steps}")
        if self.top_k is not None and not is_count(self.top_k, 0):
            raise ValueError(f"top_k must be a whole number of at least 0 (off), got {self.top_k!r}")
        if self.editing_threshold is not None and not self.editing_threshold >= 0:
            raise ValueError(f"editing_threshold must be at least 0 (off), got {self.editing_threshold}")
        if not is_count(self.max_post_steps, 0):
            raise ValueError(f"max_post_steps must be a whole number of at least 0, got {self.max_post_steps!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 <= self.guidance_scale < math.inf:
            expected = "at least 0 (up to 1 is off) and finite"
            raise ValueError(f"guidance_scale must be {expected}, got {self.guidance_scale}")
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0 (above 1: off), got {self.threshold}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        check_choice("sampling_method", self.sampling_method, get_args(Sampling))
        check_choice("cache", self.cache, (None, *get_args(CacheKind)))
        check_choice("remasking", self.remasking, (None, *REMASKING, *get_args(Choose)))
        check_choice("output_type", self.output_type, ("text", "seq"))

    @property
    def choose(self) -> str | None:
        return REMASKING.get(self.remasking, self.remasking) if self.remasking is not None else None

    @property
    def steps(self) -> int:
        """Steps per block, so few that each reveals `minimal_topk` tokens."""
        if self.minimal_topk == 1:
            return self.num_inference_steps
        return max(1, min(self.num_inference_steps, self.block_length // self.minimal_topk))


class Prompts(NamedTuple):
    """Prompts as rows of tokens."""

    ids: torch.Tensor
    """(B, P)."""
    mask: torch.Tensor
    """Boolean (B, P), true on real tokens."""
    holes: torch.Tensor
    """Boolean (B, P), true on masks to be filled."""
    infills: bool
    """Whether holes were asked for, though there may be none."""
    order: torch.Tensor
    """(B, P), where each token was before padding went to the left."""
    images: ImageVectors | None = None
    """Vectors at places of images (B, P); `None`: there are none."""

    def on_their_side(self, filled: torch.Tensor) -> torch.Tensor:
        """Rows (B, P) with their padding where it was."""
        return torch.empty_like(filled).scatter(1, self.order, filled)


def encode_prompts(
    tokenizer: Any,
    prompt: str | Sequence[str] | None,
    messages: Sequence[Any] | None,
    use_chat_template: bool,
    add_generation_prompt: bool,
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask (B, P) of texts or chats, padded on the left.

    Args:
        messages: one chat (a list of messages), or a list of chats.
        use_chat_template: put each prompt into the tokenizer's chat template, if it has one, as a user's message.
    """
    if prompt is not None and messages is not None:
        raise ValueError("give either prompt or messages, not both")
    if prompt is None and messages is None:
        raise ValueError("give one of prompt, messages or input_ids")
    if tokenizer is None:
        raise ValueError("this pipeline has no tokenizer; give input_ids")
    if messages is not None:
        chats = _chats(messages)
    else:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt must be a text or a list of texts, at least one, got {prompt!r}")
        if not (use_chat_template and getattr(tokenizer, "chat_template", None)):
            return padded_rows([tokenizer(text)["input_ids"] for text in texts], pad_token_id)
        chats = [[{"role": "user", "content": text}] for text in texts]
    # The template writes special tokens itself.
    rendered = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, tokenize=False)
        for chat in chats
    ]
    return padded_rows([tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered], pad_token_id)


def _chats(messages: Any) -> list[Any]:
    """One or several chats as a list of them, each a list of messages."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of messages, or of chats, at least one, got {messages!r}")
    chats = [messages] if isinstance(messages[0], dict) else list(messages)
    for chat in chats:
        whole = isinstance(chat, (list, tuple)) and all(isinstance(one, dict) for one in chat)
        if (
            not whole
            or not chat
            or not all(
                isinstance(one.get("role"), str) and isinstance(one.get("content"), (str, list)) for one in chat
            )
        ):
            raise ValueError(f"a chat must be a list of messages, at least one, with role and content, got {chat!r}")
    return chats


def padded_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, side: Side = "left", length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and boolean mask (B, L) of rows of different lengths.

    Args:
        side: of the padding.
        length: L; `None`: of the longest row.
    """
    check_choice("side", side, get_args(Side))
    length = max(map(len, rows)) if length is None else length
    ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for n, row in enumerate(rows):
        at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[n, at], mask[n, at] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


def check_ids(
    input_ids: Any, attention_mask: Any, vocabulary: int, name: str = "input_ids"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and boolean mask (B, P) as given, a single row without its batch included."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim not in (1, 2) or not len(input_ids):
        shown = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"{name} must be a tensor (batch, tokens) with at least one row, got {shown}")
    if input_ids.dtype != torch.long:
        raise ValueError(f"{name} must be int64 token ids, got {input_ids.dtype}")
    ids = input_ids if input_ids.ndim == 2 else input_ids[None]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise ValueError(
            f"{name} must lie in 0..{vocabulary - 1}, the model's vocabulary, got {int(ids.min())} to {int(ids.max())}"
        )
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"attention_mask must be a tensor {tuple(ids.shape)} like {name}, got {type(mask).__name__}")
    mask = mask if mask.ndim == 2 else mask[None]
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be {tuple(ids.shape)} like {name}, got {tuple(mask.shape)}")
    return ids, mask.to(ids.device).bool()


def find_holes(ids: torch.Tensor, mask: torch.Tensor, infill_mask: Any, mask_token_id: int) -> Prompts:
    """Prompts with their holes: the places of `infill_mask`, else the mask tokens among them. Padding goes to the
    left, so that what is written follows the prompt."""
    if infill_mask is None:
        holes = (ids == mask_token_id) & mask
    else:
        if not isinstance(infill_mask, torch.Tensor):
            expected = f"a tensor {tuple(ids.shape)} like the prompt"
            raise ValueError(f"infill_mask must be {expected}, got {type(infill_mask).__name__}")
        holes = (infill_mask if infill_mask.ndim == 2 else infill_mask[None]).to(ids.device)
        if holes.shape != ids.shape:
            raise ValueError(f"infill_mask must be {tuple(ids.shape)} like the prompt, got {tuple(holes.shape)}")
        holes = holes.bool()
        if (holes & ~mask).any():
            raise ValueError("infill_mask marks padding; mark real tokens only")
        ids = ids.masked_fill(holes, mask_token_id)
    order = torch.argsort(mask.long(), dim=1, stable=True)
    infills = infill_mask is not None or bool(holes.any())
    return Prompts(ids.gather(1, order), mask.gather(1, order), holes.gather(1, order), infills, order)


def new_tokens(gen_length: int | None, prompts: Prompts, positions: int | None) -> int:
    """G, checked against the model's positions.

    Args:
        gen_length: as given; `None`: 0 where a prompt has holes, else 2048 or as many as there are positions for.
        positions: of the model; `None`: no limit.
    """
    longest = int(prompts.mask.sum(1).max()) if prompts.mask.numel() else 0
    room = None if positions is None else positions - longest
    if gen_length is None:
        gen_length = 0 if prompts.infills else min(GEN_LENGTH, GEN_LENGTH if room is None else max(room, 1))
    if not is_count(gen_length, 0 if prompts.infills else 1):
        raise ValueError(
            "gen_length must be a whole number of at least 1, or 0 to only fill holes of the prompt, got "
            f"{gen_length!r}"
        )
    if room is not None and gen_length > room:
        raise ValueError(
            f"{longest} prompt tokens and gen_length={gen_length} new ones exceed the model's {positions} positions; "
            f"take at most gen_length={max(room, 0)}, or shorten the prompt"
        )
    return gen_length
