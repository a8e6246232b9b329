"""A few-step student of the model under its LoRA, by imitation of the model's own guided path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel

from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler, mix
from imgdit.training.batches import Batch, ObjectiveOutput
from imgdit.training.few_steps import guided_velocity, ode_path, path_levels, straight_line
from imgdit.training.objectives.flow_matching import flow_matching
from imgdit.training.objectives.frames import check_batch, noise_of


def few_steps(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch,
    generator: torch.Generator | None,
    *,
    steps: int = 4,
    substeps: int = 3,
    guidance_scale: float = 3.0,
    guidance: float = 1.0,
) -> ObjectiveOutput:
    """The mean velocity of the guided path between neighbouring levels of a sampler with few steps.

    Each sample is set to one of the `steps` noise levels by the forward process. From there the model without its LoRA
    goes on to the next level in `substeps` steps with guidance; the LoRA learns to get there in one step without.
    This is the average velocity u(z_t, r, t) of MeanFlow (arXiv 2505.13447, equation 3) for the pairs of levels of one
    sampler, where t alone tells r, from a teacher's path (as pi-Flow imitates one, arXiv 2510.14974) instead of a
    derivative of the student.

    Args:
        model: a transformer with the LoRA that is trained, wrapped for distributed training or not.
        scheduler: shifts the levels as the sampler will.
        batch: of one image; its clean tokens are seen at the sampler's levels. Their empty text guides.
        generator: source of levels and noise.
        steps: of the student's sampler.
        substeps: of the teacher for each of them.
        guidance_scale: of the teacher; 1: none, as for models that take the guidance scale as an input.
        guidance: input of guidance-distilled models.

    Raises:
        ValueError: no LoRA, several frames, guidance without the empty text, or counts below 1.
    """
    check_batch(batch)
    own = extract_model_from_parallel(model)
    if steps < 1 or substeps < 1:
        raise ValueError(f"steps and substeps must be at least 1, got {steps} and {substeps}")
    if len(batch.layout.frames) != 1:
        raise ValueError(f"few_steps learns one image from text, got {len(batch.layout.frames)} frames")
    if not getattr(own, "peft_config", None):
        raise ValueError("few_steps teaches a LoRA what the model under it does; set adapter.rank in the recipe")
    if guidance_scale != 1.0 and batch.empty is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs the empty text; pass Batch(empty=...) or 1")
    levels = torch.tensor(path_levels(scheduler, steps * substeps, batch.tokens.shape[1]))
    device = batch.tokens.device
    where = device if generator is None else generator.device
    first = substeps * torch.randint(steps, (len(batch.tokens), 1), generator=generator, device=where).to(device)
    path = levels.to(device)[first + torch.arange(substeps + 1, device=device)]  # (B, substeps + 1)
    start = mix(batch.tokens, noise_of(batch, generator), path[:, :1], batch.layout.lengths).float()

    def velocity(states: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        states = states.to(batch.tokens.dtype)
        return guided_velocity(
            model, states, sigmas, batch.text, batch.empty, batch.layout, guidance_scale, guidance
        )  # fmt: skip

    with torch.no_grad(), _without_lora(own):
        states = ode_path(velocity, start, path)
    data, noise = straight_line(states[:, 0], states[:, -1], path[:, :1], path[:, -1:])
    kind = batch.tokens.dtype
    line = dataclasses.replace(batch, tokens=data.to(kind), noise=noise.to(kind), sigmas=path[:, :1], counts=None)
    return flow_matching(model, scheduler, line, generator, text_dropout=0.0, guidance=guidance)


@contextmanager
def _without_lora(model: Any) -> Iterator[None]:
    """The model without its adapters while the context is open."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
