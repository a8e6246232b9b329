"""Unlearning by contrastive velocity matching (GEM, arXiv 2606.00140, for rectified-flow transformers).

B images, J text features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F

from imgdit.benchmarks.unlearning.methods.denoiser import CallHook, denoiser, placed, rows
from imgdit.benchmarks.unlearning.methods.material import Material, Unlearned
from imgdit.benchmarks.unlearning.methods.weights import swapped, training, with_weights
from imgdit.sae.calls import DenoiserCall
from imgdit.sae.sampling import PromptBatch

_QUERIES_AND_KEYS = re.compile(r"^transformer_blocks\.\d+\.attn\.(to|add)_[qk](_proj)?\.weight$")
"""Of the blocks with a stream each for image and text, as published for FLUX."""
_TEXT = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")


def erased_by_velocity_matching(
    pipe: Any,
    concepts: Sequence[str],
    material: Material,
    *,
    lr: float = 1e-3,
    eta: float = 1.0,
    gamma: float = 100.0,
    budget: int = 250,
    early: float = 10 / 28,
    batch_size: int = 4,
    seed: int = 0,
) -> Unlearned:
    """Queries and keys are trained so that the velocity for a concept's prompt comes to that for an anchor's.

    The loss at each latent is relu(|v − v⁺| − eta |v − v⁻|) (equations 13 and 14): v is the trained model's velocity
    for the concept's prompt, v⁺ and v⁻ are the frozen model's for the prompt with another label in the concept's place
    and for the concept's prompt itself. It is zero once v is nearer to the anchor than eta times its distance from the
    concept. The latents are the first ones of the trained model's own images, a new trajectory in every step.

    Published are LoRA of rank 16 of these weights; here the weights themselves are trained.

    Args:
        lr: of AdamW.
        eta: weight of the distance from the concept.
        gamma: factor of the loss.
        budget: noise levels, over all trajectories.
        early: fraction of a trajectory's steps, from pure noise, that is learned from; 10 of 28 as published.
        batch_size: prompts of a trajectory.
        seed: of the images.
    """
    model = denoiser(pipe)
    changed: dict[str, torch.Tensor] = {}
    if concepts:
        names = [name for name, _ in model.named_parameters() if _QUERIES_AND_KEYS.search(name)]
        if not names:
            raise ValueError(f"{type(model).__name__} has no transformer_blocks with to_q and to_k, which GEM trains")
        changed = {name: model.get_parameter(name).detach().clone() for name in names}
        levels = max(1, round(early * material.call["num_inference_steps"]))
        optimizer: torch.optim.Optimizer | None = None
        for step in range(-(-budget // levels)):
            concept = concepts[step % len(concepts)]
            batch, anchors = _prompts(material, concept, concepts, step // len(concepts), batch_size, seed + step)
            with swapped(model, changed):
                calls = _first_calls(pipe, batch, material, levels)
            seen = [_with_teachers(pipe, arguments, anchors) for arguments in calls]
            with training(model, changed) as trained:
                if optimizer is None:
                    optimizer = torch.optim.AdamW(trained, lr=lr)
                optimizer.zero_grad()
                for arguments, anchor, target in seen:
                    loss = hinge(model(**arguments)[0], anchor, target, eta).mean()
                    (gamma * loss / len(seen)).backward()
                optimizer.step()

    return with_weights(changed)


def hinge(velocity: torch.Tensor, anchor: torch.Tensor, concept: torch.Tensor, eta: float) -> torch.Tensor:
    """relu(|v − v⁺| − eta |v − v⁻|) of each sample (B,), by the Euclidean norm over all its values."""
    near = F.pairwise_distance(velocity.flatten(1), anchor.flatten(1))
    far = F.pairwise_distance(velocity.flatten(1), concept.flatten(1))
    return F.relu(near - eta * far)


def _prompts(
    material: Material, concept: str, concepts: Sequence[str], turn: int, size: int, seed: int
) -> tuple[PromptBatch, list[str]]:
    """Some of a concept's prompts, others in each turn, and the same with another label."""
    lines = material.lines(concept)
    other = material.lines(material.others(concept, concepts)[0])
    places = [(turn * size + i) % len(lines) for i in range(min(size, len(lines)))]
    seeds = [1000 * seed + i for i in range(len(places))]
    return PromptBatch(0, [lines[i] for i in places], seeds), [other[i] for i in places]


class _Enough(Exception):
    """Ends a call of the pipeline whose first steps were wanted."""


class _FirstCalls(CallHook):
    """Keeps the guided rows of the first calls, then ends the run."""

    def __init__(self, pipe: Any, count: int) -> None:
        super().__init__(pipe)
        self.count = count
        self.seen: list[dict[str, Any]] = []

    def before(self, arguments: dict[str, Any], call: DenoiserCall) -> dict[str, Any]:
        if len(self.seen) == self.count:
            raise _Enough
        if call.conditional is None:
            raise ValueError("GEM needs the prompts' and the negative prompts' rows in one call of the denoiser")
        self.seen.append(rows(arguments, call.conditional))
        return arguments


@torch.no_grad()
def _first_calls(pipe: Any, batch: PromptBatch, material: Material, count: int) -> list[dict[str, Any]]:
    recorder = _FirstCalls(pipe, count)
    with placed(recorder), suppress(_Enough):
        batch.run(pipe, **material.call)
    return recorder.seen


@torch.no_grad()
def _with_teachers(
    pipe: Any, arguments: dict[str, Any], anchors: Sequence[str]
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """A call, and what the model as it is predicts for the anchors' prompts and for its own."""
    embeds, _, pooled, _, mask, _ = pipe.encode_prompt(list(anchors), do_classifier_free_guidance=False)
    text = dict(zip(_TEXT, (embeds, pooled, mask)))
    if embeds.shape != arguments[_TEXT[0]].shape:
        raise ValueError(
            f"the labels of a kind must have as many tokens; got {tuple(arguments[_TEXT[0]].shape)} and "
            f"{tuple(embeds.shape)}"
        )
    model = denoiser(pipe)
    return arguments, model(**{**arguments, **text})[0], model(**arguments)[0]
