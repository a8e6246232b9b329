"""Unlearning by a rotation of the projections that read the text (OCE, arXiv 2605.28902).

J text features, D width of a projection's output, N concept vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from imgdit.benchmarks.unlearning.methods.closed_form import POOLED, TOKENS, edited_lines, text_vectors
from imgdit.benchmarks.unlearning.methods.denoiser import denoiser
from imgdit.benchmarks.unlearning.methods.material import Material, Unlearned
from imgdit.benchmarks.unlearning.methods.weights import with_weights


def erased_by_rotation(
    pipe: Any,
    concepts: Sequence[str],
    material: Material,
    *,
    erase: float = 1.0,
    preserve: float = 0.3,
    preserve_all: float = 0.5,
    ridge: float = 1.5,
    prompts: int = 16,
) -> Unlearned:
    """W' = R W, where the rotation R takes the concepts' subspace out of the anchors' complement and keeps the rest.

    R maximises ⟨R, M⟩ over rotations (the orthogonal Procrustes problem: R = U Vᵀ of M = U S Vᵀ) with
    M = −erase G (I − G*) + preserve Σ W p pᵀ Wᵀ + preserve_all W C Wᵀ + ridge W Wᵀ: G and G* project on the span of
    the concepts' and the anchors' W c, p are other labels' vectors and C is the mean of e eᵀ over tokens of prompts.
    Many concepts cost one singular value decomposition for each projection.

    What reads text in an MMDiT is the embedding of its tokens and of the pooled text, so both are rotated. A
    concept's vector is published as the last token of its words; the text encoder here spreads a concept over all
    tokens, so it is the pooled text of each of its prompts.

    Args:
        erase, preserve, preserve_all, ridge: weights of the terms, as published for FLUX.
        prompts: for each label.
    """
    model = denoiser(pipe)
    changed: dict[str, torch.Tensor] = {}
    if concepts:
        own, anchors, kept = edited_lines(material, concepts, prompts)
        _, before = text_vectors(pipe, own)
        _, after = text_vectors(pipe, anchors)
        tokens, rest = text_vectors(pipe, kept)
        for name, general in ((TOKENS, tokens), (POOLED, rest)):
            weights = {"erase": erase, "preserve": preserve, "preserve_all": preserve_all, "ridge": ridge}
            changed[name] = rotated(model.get_parameter(name), before, after, rest, general, **weights)

    return with_weights(changed)


@torch.no_grad()
def rotated(
    weight: torch.Tensor,
    concepts: torch.Tensor,
    anchors: torch.Tensor,
    kept: torch.Tensor,
    general: torch.Tensor,
    *,
    erase: float,
    preserve: float,
    preserve_all: float,
    ridge: float,
) -> torch.Tensor:
    """R W of W (D, J), see `erased_by_rotation`; norms of rows of Wᵀ and angles between them stay.

    Args:
        concepts, anchors, kept: (N, J) each.
        general: (N, J) vectors whose second moment is C.
    """
    w, concepts, anchors, kept, general = (x.double() for x in (weight, concepts, anchors, kept, general))
    erased, guide = _projector(concepts @ w.T), _projector(anchors @ w.T)  # (D, D)
    identity = torch.eye(len(w), dtype=w.dtype, device=w.device)
    values = kept @ w.T
    moment = general.T @ general / max(len(general), 1)
    target = -erase * erased @ (identity - guide) + preserve * values.T @ values
    target += preserve_all * w @ moment @ w.T + ridge * w @ w.T
    u, _, vt = torch.linalg.svd(target)
    if torch.linalg.det(u @ vt) < 0:  # the rotation among the orthogonal matrices that is next
        u[:, -1] *= -1
    return (u @ vt @ w).to(weight.dtype)


def _projector(vectors: torch.Tensor) -> torch.Tensor:
    """(D, D) projection on the span of rows (N, D), each as long as the others."""
    basis, values, _ = torch.linalg.svd(F.normalize(vectors, dim=1).T, full_matrices=False)
    basis = basis[:, values > 1e-6 * values[0]]
    return basis @ basis.T
