"""Passes of a masked language model over a grid of tokens, block by block, with cached keys and values if wanted.

B rows, N places of the whole grid, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from imgdit.models.image_rows import ImageVectors, embed_rows
from imgdit.models.masked_lm import predicting_places, real_positions, rows_of

CacheKind = Literal["prefix", "dual", "prompt"]
APPROXIMATE = {
    "prompt": "the prompt sees itself only, as if its tokens did not depend on the answer",
    "prefix": "keys and values of the tokens before a block stay as they were in the block's first pass",
    "dual": "keys and values of all tokens outside a block stay as they were in the block's first pass",
}


class FreeRows(NamedTuple):
    """What the unguided prediction sees in place of the prompt."""

    ids: torch.Tensor
    """(B, N), of which the prompt's places are read."""
    attention_mask: torch.Tensor
    """(B, N), 1 on real tokens."""


class SlotLayer(DynamicLayer):
    """Keys and values of a whole grid, of which a pass over some places overwrites theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.start = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        stop = self.start + key_states.shape[-2]
        self.keys[..., self.start : stop, :] = key_states
        self.values[..., self.start : stop, :] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() or query_length, 0


def sees_prefix(lengths: torch.Tensor, length: int) -> torch.Tensor:
    """Boolean (B, 1, L, L), true where a place (row) sees another (column): prefixes see themselves, what follows sees
    everything (LaViDa's prefix mask, arXiv 2505.16839, section 3.3).

    Args:
        lengths: (B,) places of each row's prefix.
        length: L.
    """
    inside = torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, L)
    return (~inside[:, :, None] | inside[:, None, :])[:, None]


def sees_earlier_turns(turns: torch.Tensor) -> torch.Tensor:
    """Boolean (B, 1, L, L): a place sees those of its own and of earlier turns of a dialogue (LLaDA-V,
    arXiv 2505.16933, section 3.3).

    Args:
        turns: (B, L) number of each place's turn.
    """
    return (turns[:, None, :] <= turns[:, :, None])[:, None]


class BlockPasses:
    """Logits of a block's tokens given the whole grid.

    Without a cache each pass is over the whole grid and exact. With "prefix" or "dual", so is the first pass over a
    block; the others are approximate (Fast-dLLM, arXiv 2505.22618): "prefix" computes the block and what follows it,
    "dual" the block. "prompt" computes the prompt once and by itself, then what follows it; all passes are exact for
    the mask of `sees_prefix` (LaViDa, arXiv 2505.16839).

    Args:
        model: a bidirectional language model of transformers.
        cache: "prefix", "dual", "prompt" or `None`.
        attention_mask: (B, N), 1 on real tokens, padding at the left; `None`: all are real.
        guidance_scale: g of u + g (c - u), where c is the prediction and u the one with the prompt masked; at most 1
            is off. LLaDA's `cfg_scale` is g - 1.
        prompt: boolean (B, N), what u masks.
        mask_token_id: with which.
        free: what u sees there instead of masks, such as an empty prompt.
        images: vectors in place of tokens; u has none, as they are of the prompt.
        prompt_length: places of the prompt, that "prompt" computes once.
    """

    def __init__(
        self,
        model: Any,
        cache: CacheKind | None,
        attention_mask: torch.Tensor | None,
        guidance_scale: float,
        prompt: torch.Tensor,
        mask_token_id: int,
        free: FreeRows | None = None,
        images: ImageVectors | None = None,
        prompt_length: int = 0,
    ):
        self.model, self.kind, self.images, self.prompt_length = model, cache, images, prompt_length
        self.guidance_scale, self.prompt = guidance_scale, prompt
        self.free = mask_token_id if free is None else free.ids
        real = torch.ones_like(prompt, dtype=torch.long)
        masks = [attention_mask]  # of all rows that are computed
        if self.guided:
            masks.append(attention_mask if free is None else free.attention_mask)
        whole = torch.cat([real if mask is None else mask.long() for mask in masks])
        self.attention_mask = None if all(mask is None for mask in masks) else whole
        self.positions = None if self.attention_mask is None else real_positions(whole)
        self.keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.shifted = bool(getattr(model.config, "logit_shift", False))
        self.predicting = predicting_places(model, whole)
        self.start = self.stop = 0
        self.cache: Cache | None = None
        self.first_logits: torch.Tensor | None = None  # (B, 1, V) of what the prompt's last place predicts

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    def begin(self, start: int, stop: int) -> None:
        """Go to the block of places start to stop."""
        self.start, self.stop = start, stop
        if self.kind != "prompt":
            self.cache = None

    @property
    def first_is_outside(self) -> torch.Tensor | None:
        """Boolean (B,), rows whose block begins with a token that is predicted at a place outside the block, which
        only the first cached pass computes; `None` without a cache or where there is no such row."""
        if self.kind in (None, "prompt") or self.start == self.stop:
            return None
        outside = self.predicting[: len(self.prompt), self.start] < self.start
        return outside if outside.any() else None

    def __call__(self, grid: torch.Tensor) -> torch.Tensor:
        """Logits (B, stop - start, V) of the block's tokens, given the grid (B, N)."""
        ids = torch.cat([grid, torch.where(self.prompt, self.free, grid)]) if self.guided else grid
        length = grid.shape[1]
        first, last = 0, length  # the places that are computed
        if self.kind == "prompt":
            first = self.prompt_length
            if self.cache is None and first:
                self._read_prompt(ids)
        elif self.kind is not None and self.cache is not None:
            first, last = self.start, length if self.kind == "prefix" else self.stop
        elif self.kind == "prefix":
            self.cache = DynamicCache()
        elif self.kind == "dual":
            self.cache = Cache(layer_class_to_replicate=SlotLayer)
        logits = self._run(ids, first, last)
        if self.kind == "prefix":
            self.cache.crop(self.start - length)  # type: ignore[union-attr]
        elif self.kind == "prompt" and self.cache is not None:
            self.cache.crop(first - length)
        elif self.kind == "dual":
            for layer in self.cache.layers:  # type: ignore[union-attr]
                layer.start = self.start
        if not self.guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _read_prompt(self, ids: torch.Tensor) -> None:
        """Keys and values of the prompt, which sees itself."""
        self.cache = DynamicCache()
        options = self._options(len(ids), 0, self.prompt_length)
        options |= {"logits_to_keep": 1} if self.keeps_rows else {}
        if "attention_mask" in options:
            options["attention_mask"] = options["attention_mask"][:, : self.prompt_length]
        logits = self.model(**self._inputs(ids, 0, self.prompt_length), **options).logits[:, -1:]
        if self.shifted:
            self.first_logits = logits

    def _inputs(self, ids: torch.Tensor, first: int, last: int) -> dict[str, torch.Tensor]:
        """The model's input at places first to last: tokens, or embeddings where there are images."""
        if self.images is None:
            return {"input_ids": ids[:, first:last]}
        vectors, places = self.images
        if self.guided:
            vectors, places = vectors.repeat(2, 1, 1), torch.cat([places, torch.zeros_like(places)])
        images = ImageVectors(vectors[:, first:last], places[:, first:last])
        return {"inputs_embeds": embed_rows(self.model, ids[:, first:last], images)}

    def _options(self, rows: int, first: int, last: int) -> dict[str, Any]:
        """Mask, positions and cache of a pass over places first to last."""
        options: dict[str, Any] = {}
        if self.attention_mask is not None:
            options["attention_mask"] = self.attention_mask
        if self.positions is not None:
            options["position_ids"] = self.positions[:, first:last]
        elif self.cache is not None:
            device = self.prompt.device
            options["position_ids"] = torch.arange(first, last, device=device)[None].repeat(rows, 1)
        if self.cache is not None:
            options |= {"past_key_values": self.cache, "use_cache": True}
        return options

    def _run(self, ids: torch.Tensor, first: int, last: int) -> torch.Tensor:
        # A token may be predicted at the place before it, if that is computed.
        lowest = max(self.start - 1, first) if self.shifted else self.start
        rows = torch.arange(lowest - first, self.stop - first, device=ids.device)
        options: dict[str, Any] = {"logits_to_keep": rows} if self.keeps_rows else {}
        options |= self._options(len(ids), first, last)
        logits = self.model(**self._inputs(ids, first, last), **options).logits
        logits = logits if self.keeps_rows else logits[:, rows]
        if not self.shifted:
            return logits
        places = (self.predicting[:, self.start : self.stop] - lowest).clamp(min=0)
        found = rows_of(logits, places)
        if self.first_logits is not None and self.start == self.prompt_length:
            found[:, :1] = self.first_logits
        return found


def answer_likelihood(
    predict: Callable[[torch.Tensor], torch.Tensor], grid: torch.Tensor, places: torch.Tensor, answer: torch.Tensor,
    mask_token_id: int,
) -> torch.Tensor:  # fmt: skip
    """Log-likelihood (B,) float64 of an answer whose tokens are revealed one by one, the most probable first, which is
    exact for one token.

    Args:
        predict: logits (B, A, V) at the places, of a grid.
        grid: (B, N), masked at the places.
        places: (B, A) of the answer's tokens.
        answer: (A,), or (B, A) for one of each row.
        mask_token_id: of the grid.
    """
    grid, wanted = grid.clone(), answer.to(grid.device).expand(len(grid), -1)
    total = torch.zeros(len(grid), dtype=torch.float64, device=grid.device)
    for _ in range(wanted.shape[1]):
        known = predict(grid).double().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]  # (B, A)
        best = known.masked_fill(grid.gather(1, places) != mask_token_id, -torch.inf).max(1, keepdim=True)
        total += best.values[:, 0]
        grid.scatter_(1, places.gather(1, best.indices), wanted.gather(1, best.indices))
    return total
