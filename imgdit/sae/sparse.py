"""Sparse codes: k of the latents of each row, and products with them that never build an (N, L) gradient.

N rows, L latents, d features, n non-zeros. A product with a sparse code is an `embedding_bag` (rows) or one over the
code's transpose (columns); the gradient of the activations is a product sampled at the non-zeros. Measured on one
thread with N = L = 4096, d = 256, k = 32: 1 to 3 ms each, where a dense product takes 90.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

Selection = Literal["topk", "batch_topk", "sample_topk", "groupmax"]


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the non-zeros of a code are, row by row."""

    indices: torch.Tensor
    """(n,) latents."""
    offsets: torch.Tensor
    """(N + 1,) first non-zero of each row, and n."""
    num_latents: int
    per_row: int | None = None
    """Non-zeros of each row, where all have as many."""

    @property
    def num_rows(self) -> int:
        return self.offsets.shape[0] - 1

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """(n,) row of each non-zero."""
        rows = torch.arange(self.num_rows, device=self.indices.device)
        if self.per_row is not None:
            return rows[:, None].expand(-1, self.per_row).flatten()
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.indices.shape[0])

    @functools.cached_property
    def transposed(self) -> tuple[torch.Tensor, Pattern]:
        """Order of the non-zeros by latent, and the pattern of the transposed code. Decoder and encoder need it."""
        order = self.indices.argsort(stable=True)
        counts = torch.bincount(self.indices, minlength=self.num_latents)
        return order, Pattern(self.rows[order], F.pad(counts.cumsum(0), (1, 0)), self.num_rows)

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """(n,) entries of a dense (N, L)."""
        if self.per_row is not None:
            return dense.gather(1, self.indices.view(-1, self.per_row)).flatten()
        return dense.flatten()[self.rows * self.num_latents + self.indices]


class SparseCode(NamedTuple):
    """Activations of the selected latents."""

    acts: torch.Tensor
    """(n,) activations, never negative."""
    pattern: Pattern

    def dense(self) -> torch.Tensor:
        """The code as (N, L)."""
        rows, latents = self.pattern.num_rows, self.pattern.num_latents
        flat = self.acts.new_zeros(rows * latents)
        flat[self.pattern.rows * latents + self.pattern.indices] = self.acts
        return flat.view(rows, latents)

    def mean(self, rows_per_map: int) -> torch.Tensor:
        """(maps, L) mean over the `rows_per_map` rows of each map, without the dense code."""
        latents = self.pattern.num_latents
        maps = self.pattern.num_rows // rows_per_map
        place = (self.pattern.rows // rows_per_map) * latents + self.pattern.indices
        sums = self.acts.new_zeros(maps * latents).index_add_(0, place, self.acts)
        return sums.view(maps, latents) / rows_per_map


def select(
    scores: torch.Tensor, k: int, how: Selection = "topk", *, tokens: int = 1, hint: float | None = None
) -> Pattern:
    """Which latents are active.

    Args:
        scores: (N, L) pre-activations.
        k: latents per row ("topk", "groupmax": the largest of each of k groups of neighbours), on average over all
            rows ("batch_topk", arXiv 2412.06410), or per map of `tokens` rows ("sample_topk", SAeUron).
        tokens: rows of a map.
        hint: for "batch_topk", a value that probably lies below the smallest one selected; only speed depends on it.
    """
    rows, latents = scores.shape
    if how in ("topk", "groupmax"):
        k = min(k, latents)
        if how == "topk":
            indices = scores.topk(k, dim=1, sorted=False).indices
        else:
            width = latents // k
            first = torch.arange(0, latents, width, device=scores.device)
            indices = scores.unflatten(1, (k, width)).argmax(2) + first
        return Pattern(indices.flatten(), torch.arange(0, rows * k + 1, k, device=scores.device), latents, k)
    if how == "batch_topk":
        chosen = _largest(scores.flatten(), min(k * rows, scores.numel()), hint)
    else:
        maps = scores.view(-1, tokens * latents)
        first = torch.arange(0, scores.numel(), maps.shape[1], device=scores.device)[:, None]
        chosen = (maps.topk(min(k, maps.shape[1]), dim=1, sorted=False).indices + first).flatten()
    return _from_places(chosen.sort().values, rows, latents)


def above(scores: torch.Tensor, threshold: float | torch.Tensor) -> Pattern:
    """Pattern of all scores (N, L) above a threshold, or above (L,) one of each latent."""
    return _from_places((scores > threshold).flatten().nonzero().flatten(), *scores.shape)


def _largest(flat: torch.Tensor, count: int, hint: float | None) -> torch.Tensor:
    """Places of the `count` largest values."""
    if hint is not None:
        candidates = (flat > hint).nonzero().flatten()
        if candidates.shape[0] >= count:
            return candidates[flat[candidates].topk(count, sorted=False).indices]
    return flat.topk(count, sorted=False).indices


def _from_places(places: torch.Tensor, rows: int, latents: int) -> Pattern:
    """Pattern from sorted places in the flattened (N, L)."""
    row = torch.div(places, latents, rounding_mode="floor")
    counts = torch.bincount(row, minlength=rows)
    return Pattern(places - row * latents, F.pad(counts.cumsum(0), (1, 0)), latents)


def decode(code: SparseCode, weight: torch.Tensor) -> torch.Tensor:
    """The code times (L, d): (N, d). Gradients reach the activations and the weight."""
    return _Decode.apply(code.acts, weight, code.pattern)


def selected_scores(
    scores: torch.Tensor, pattern: Pattern, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Scores of the selected latents, through which gradients reach what computed them.

    Args:
        scores: (N, L), computed without gradients: `x @ weight.T + bias`.
        pattern: which of them.
        x: (N, d), weight: (L, d), bias: (L,).

    Returns:
        (n,) scores.
    """
    return _SelectedScores.apply(scores, pattern, x, weight, bias)


def _weighted_sum(acts: torch.Tensor, pattern: Pattern, weight: torch.Tensor) -> torch.Tensor:
    """(N, d) sums of weight rows."""
    return F.embedding_bag(
        pattern.indices, weight, pattern.offsets, per_sample_weights=acts, mode="sum", include_last_offset=True
    )


def _transposed_sum(acts: torch.Tensor, pattern: Pattern, x: torch.Tensor) -> torch.Tensor:
    """(L, d): the transposed code times (N, d)."""
    order, turned = pattern.transposed
    return _weighted_sum(acts[order], turned, x)


def _sampled_products(x: torch.Tensor, weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(n,) products x_row · weight_latent at the non-zeros."""
    where = _csr(pattern.offsets, pattern.indices, x.new_zeros(pattern.indices.shape[0]), (len(x), len(weight)))
    return torch.sparse.sampled_addmm(where, x, weight.t(), beta=0.0).values()


@functools.cache
def _quiet_csr() -> Callable[..., torch.Tensor]:
    """torch says once per process that CSR is in beta; nobody who trains an SAE can act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))
    return torch.sparse_csr_tensor


def _csr(*parts: Any) -> torch.Tensor:
    return _quiet_csr()(*parts, check_invariants=False)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: torch.Tensor, weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        ctx.save_for_backward(acts, weight)
        ctx.pattern = pattern
        return _weighted_sum(acts, pattern, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        acts, weight = ctx.saved_tensors
        grad = grad.contiguous()
        to_acts = _sampled_products(grad, weight, ctx.pattern) if ctx.needs_input_grad[0] else None
        to_weight = _transposed_sum(acts, ctx.pattern, grad) if ctx.needs_input_grad[1] else None
        return to_acts, to_weight, None


class _SelectedScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, pattern: Pattern, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pattern = pattern
        return pattern.gather(scores)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        pattern = ctx.pattern
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[2]:
            to_x = _weighted_sum(grad, pattern, weight)
        if ctx.needs_input_grad[3]:
            to_weight = _transposed_sum(grad, pattern, x)
        if ctx.needs_input_grad[4]:
            to_bias = grad.new_zeros(pattern.num_latents).index_add_(0, pattern.indices, grad)
        return None, None, to_x, to_weight, to_bias
