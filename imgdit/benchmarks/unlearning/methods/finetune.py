"""Unlearning by fine-tuning the attention's projections against the model's own guidance (ESD, arXiv 2303.07345)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from imgdit.benchmarks.unlearning.methods.denoiser import CallHook, denoiser, placed, rows
from imgdit.benchmarks.unlearning.methods.material import Material, Unlearned
from imgdit.benchmarks.unlearning.methods.weights import training, with_weights
from imgdit.sae.calls import DenoiserCall
from imgdit.sae.sampling import prompt_batches

_ATTENTION = re.compile(r"\.attn\d?\.(to_[qkv]|add_[qkv]_proj)\.weight$")


def erased_by_finetuning(
    pipe: Any,
    concepts: Sequence[str],
    material: Material,
    *,
    lr: float = 1e-4,
    steps: int = 150,
    batch_size: int = 4,
    eta: float = 1.0,
    images: int = 8,
    seed: int = 0,
) -> Unlearned:
    """Train the attention's projections to predict v₀ − eta (v_c − v₀) of the frozen model for a concept's prompts.

    v₀ is for the same prompt with another label in the concept's place instead of ESD's empty prompt, so that what
    else the prompt says is kept. The latents are those of images that the frozen model makes of the prompts.

    Args:
        lr: of Adam.
        steps, batch_size: of the training.
        eta: how far beyond v₀.
        images: trajectories for each concept.
        seed: of the images and of the order of their steps.
    """
    model = denoiser(pipe)
    names = [name for name, _ in model.named_parameters() if _ATTENTION.search(name)]
    changed: dict[str, torch.Tensor] = {}
    if concepts:
        seen = _recorded(pipe, concepts, material, eta, images, seed)
        changed = _trained(model, names, seen, lr, steps, batch_size, seed)

    return with_weights(changed)


class _Recorder(CallHook):
    """Keeps the conditional rows of each guided call with what they should become."""

    def __init__(self, pipe: Any, eta: float) -> None:
        super().__init__(pipe)
        self.eta = eta
        self.seen: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.last_call: tuple[dict[str, Any], DenoiserCall] | None = None

    def before(self, arguments: dict[str, Any], call: DenoiserCall) -> dict[str, Any]:
        self.last_call = (arguments, call)
        return arguments

    def after(self, prediction: torch.Tensor) -> torch.Tensor:
        assert self.last_call is not None
        arguments, call = self.last_call
        if call.conditional is None or call.unconditional is None:
            raise ValueError("fine-tuning against guidance needs a guidance_scale above 1 in Material.call")
        base, concept = prediction[call.unconditional], prediction[call.conditional]
        self.seen.append((rows(arguments, call.conditional), base - self.eta * (concept - base)))
        return prediction


def _recorded(
    pipe: Any, concepts: Sequence[str], material: Material, eta: float, images: int, seed: int
) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Calls of the denoiser, a batch of images each, with their targets."""
    recorder = _Recorder(pipe, eta)
    with placed(recorder), torch.no_grad():
        for concept in concepts:
            lines = material.lines(concept)
            other = material.lines(material.others(concept, concepts)[0])
            for batch in prompt_batches(lines[:images], material.batch_size, seed):
                without = list(other[batch.first : batch.first + len(batch.prompts)])
                batch.run(pipe, negative_prompt=without, **material.call)
    return recorder.seen


def _trained(
    model: torch.nn.Module,
    names: Sequence[str],
    seen: Sequence[tuple[dict[str, Any], torch.Tensor]],
    lr: float,
    steps: int,
    batch_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The named parameters after training; the model's own are left alone."""
    copies = {name: model.get_parameter(name).detach().clone() for name in names}
    generator = torch.Generator().manual_seed(seed)
    with training(model, copies) as trained:
        optimizer = torch.optim.Adam(trained, lr=lr)
        for _ in range(steps):
            number = int(torch.randint(len(seen), (), generator=generator))
            arguments, target = seen[number]
            chosen = torch.randperm(len(target), generator=generator)[:batch_size]
            some = rows(arguments, chosen)
            loss = (model(**some)[0] - target[chosen]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return copies
