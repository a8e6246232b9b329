"""Unlearning by guidance: away from the concept's words in every step.

B images, T text tokens, J features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from imgdit.benchmarks.unlearning.methods.denoiser import PER_SAMPLE, CallHook, placed, rows
from imgdit.benchmarks.unlearning.methods.material import Material, Unlearned
from imgdit.layout import FrameLayout
from imgdit.sae.calls import DenoiserCall


def _negative_text(material: Material, concepts: Sequence[str]) -> str:
    return ", ".join(material.words[concept] for concept in concepts)


def nothing(pipe: Any, concepts: Sequence[str], material: Material) -> Unlearned:
    """The model as it is."""

    @contextmanager
    def attach(pipe: Any) -> Iterator[dict[str, Any]]:
        yield {}

    return Unlearned(attach, 0)


def negative_prompt(pipe: Any, concepts: Sequence[str], material: Material) -> Unlearned:
    """The concepts' words in the place of the empty prompt of classifier-free guidance."""
    text = _negative_text(material, concepts)

    @contextmanager
    def attach(pipe: Any) -> Iterator[dict[str, Any]]:
        yield {"negative_prompt": text} if text else {}

    return Unlearned(attach, 0)


def safe_latent_guidance(
    pipe: Any,
    concepts: Sequence[str],
    material: Material,
    *,
    scale: float = 1000.0,
    threshold: float = 0.01,
    momentum_scale: float = 0.3,
    momentum_beta: float = 0.4,
    warmup: float = 0.2,
) -> Unlearned:
    """A third prediction, for the concepts' words, from which the guided one is pushed away where they are near
    (Safe Latent Diffusion, arXiv 2211.05105, equations 3 to 8; the defaults are its "medium").

    The prediction here is a velocity, whose differences are those of the noise up to a factor of the noise level.

    Args:
        scale: of the push, before it is clamped to 1.
        threshold: difference of the prompt's and the concepts' prediction below which a value is pushed.
        momentum_scale, momentum_beta: of the running mean of the push.
        warmup: fraction of the schedule, from pure noise, in which nothing is pushed; 10 of 50 steps as published.
    """

    @contextmanager
    def attach(pipe: Any) -> Iterator[dict[str, Any]]:
        if not concepts:
            yield {}
            return
        hook = _SafeGuidance(
            pipe,
            _negative_text(material, concepts),
            scale,
            threshold,
            momentum_scale,
            momentum_beta,
            1000 * (1 - warmup),
        )
        with placed(hook):
            yield {}

    return Unlearned(attach, 0)


class _SafeGuidance(CallHook):
    """Adds the concepts' rows to the batch and takes the push from the prompt's prediction, which guidance scales."""

    def __init__(
        self,
        pipe: Any,
        text: str,
        scale: float,
        threshold: float,
        momentum_scale: float,
        momentum_beta: float,
        begin: float,
    ) -> None:
        super().__init__(pipe)
        with torch.no_grad():
            embeds, _, pooled, _, mask, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        self.text = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "encoder_attention_mask": mask}
        self.scale, self.threshold, self.begin = scale, threshold, begin
        self.momentum_scale, self.momentum_beta = momentum_scale, momentum_beta
        self.momentum: torch.Tensor | float = 0.0
        self.last = 0.0
        self.call: DenoiserCall | None = None

    def before(self, arguments: dict[str, Any], call: DenoiserCall) -> dict[str, Any]:
        self.call = None
        if call.conditional is None or call.unconditional is None:
            return arguments
        if call.timestep > self.last:  # a new run begins
            self.momentum = 0.0
        self.call, self.last = call, call.timestep
        concept = rows(arguments, call.conditional)
        count = len(concept["hidden_states"])
        concept |= {name: value.expand(count, *value.shape[1:]) for name, value in self.text.items()}
        joined = dict(arguments)
        if joined.get("encoder_attention_mask") is None:
            text = joined["encoder_hidden_states"]
            joined["encoder_attention_mask"] = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        before = joined["encoder_hidden_states"].shape[1]
        length = max(before, concept["encoder_hidden_states"].shape[1])
        for part in (joined, concept):
            missing = length - part["encoder_hidden_states"].shape[1]
            part["encoder_hidden_states"] = F.pad(part["encoder_hidden_states"], (0, 0, 0, missing))
            part["encoder_attention_mask"] = F.pad(part["encoder_attention_mask"], (0, missing))
        for name in PER_SAMPLE:
            if joined.get(name) is not None:
                joined[name] = torch.cat([joined[name], concept[name].to(joined[name])])
        layout = joined.get("layout")
        if layout is not None and length > before:
            joined["layout"] = FrameLayout.build(
                layout.frames, length, visible=layout.visible, main_adapters=layout.main_adapters
            )
        return joined

    def after(self, prediction: torch.Tensor) -> torch.Tensor:
        call = self.call
        if call is None:
            return prediction
        assert call.conditional is not None and call.unconditional is not None
        prediction, concept = prediction[: call.batch], prediction[call.batch :]
        prompt = prediction[call.conditional]
        near = prompt - concept
        weight = torch.where(near < self.threshold, (self.scale * near).abs().clamp(max=1.0), 0.0)
        push = (concept - prediction[call.unconditional]) * weight + self.momentum_scale * self.momentum
        self.momentum = self.momentum_beta * self.momentum + (1 - self.momentum_beta) * push
        if call.timestep > self.begin:
            return prediction
        out = prediction.clone()
        out[call.conditional] = prompt - push
        return out
