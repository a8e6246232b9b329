"""Unlearning by a closed-form edit of the projections that read the text (UCE, arXiv 2308.14761).

J text features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from imgdit.benchmarks.unlearning.methods.denoiser import denoiser
from imgdit.benchmarks.unlearning.methods.material import Material, Unlearned
from imgdit.benchmarks.unlearning.methods.weights import with_weights

TOKENS, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"
"""What reads the tokens of the text, and the pooled text."""


def edited_in_closed_form(
    pipe: Any,
    concepts: Sequence[str],
    material: Material,
    *,
    preserve: float = 0.1,
    ridge: float = 0.1,
    prompts: int = 16,
) -> Unlearned:
    """Where a prompt says a concept, its text is projected as if it said another label of the same kind.

    UCE edits the keys and values of cross-attention; what reads text in an MMDiT is the embedding of its tokens and
    the embedding of the pooled text, so both are edited:
    W' = (Σ W c₀ cᵀ + preserve Σ W p pᵀ + ridge W) (Σ c cᵀ + preserve Σ p pᵀ + ridge I)⁻¹ (UCE's equation 7).

    Args:
        preserve: weight of the prompts p of all other labels.
        ridge: weight of leaving the matrix as it is.
        prompts: for each label.
    """
    model = denoiser(pipe)
    changed: dict[str, torch.Tensor] = {}
    if concepts:
        before, after, rest = (text_vectors(pipe, lines) for lines in edited_lines(material, concepts, prompts))
        for name, old, new, stay in zip((TOKENS, POOLED), before, after, rest):
            if len(old) != len(new):
                raise ValueError(f"the labels of a kind must have as many tokens; got {len(old)} and {len(new)}")
            changed[name] = _edited(model.get_parameter(name), old, new, stay, preserve, ridge)

    return with_weights(changed)


@torch.no_grad()
def _edited(
    weight: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    kept: torch.Tensor,
    preserve: float,
    ridge: float,
) -> torch.Tensor:
    """W' of W (D, J) that maps rows of `before` (N, J) as W maps `after`, and `kept` as W does."""
    w, before, after, kept = (x.double() for x in (weight, before, after, kept))
    stay = preserve * kept.T @ kept + ridge * torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    change = (after - before).T @ before  # W' - W = W change (before^T before + stay)^-1
    return (w + w @ torch.linalg.solve(before.T @ before + stay, change.T).T).to(weight.dtype)


def edited_lines(material: Material, concepts: Sequence[str], prompts: int) -> tuple[list[str], list[str], list[str]]:
    """Prompts of concepts, the same with another label of the kind, and those of other labels that name none of them.

    Args:
        prompts: for each label.
    """
    lines = {label: list(material.lines(label))[:prompts] for kind in material.prompts.values() for label in kind}
    unwanted = [material.words[concept] for concept in concepts]
    return (
        [line for label in concepts for line in lines[label]],
        [line for label in concepts for line in lines[material.others(label, concepts)[0]]],
        [line for label in lines for line in lines[label] if not any(words in line for words in unwanted)],
    )


@torch.no_grad()
def text_vectors(pipe: Any, lines: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token vectors (N, J) of prompts, one after the other, and pooled vectors (prompts, J)."""
    if not lines:
        model: Any = denoiser(pipe)
        widths = (model.config.joint_attention_dim, model.config.pooled_projection_dim)
        return tuple(torch.zeros(0, width, device=model.device) for width in widths)  # type: ignore[return-value]
    embeds, _, pooled, _, mask, _ = pipe.encode_prompt(list(lines), do_classifier_free_guidance=False)
    return embeds[mask], pooled
