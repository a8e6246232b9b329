"""Unlearning by projecting prompt tokens away from the concept's subspace (SAFREE, arXiv 2410.12761).

B texts, T tokens, n tokens of one text, J text features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook

from imgdit import compat
from imgdit.benchmarks.unlearning.methods.denoiser import CallHook, placed
from imgdit.benchmarks.unlearning.methods.material import Material, Unlearned
from imgdit.benchmarks.unlearning.methods.weights import size_of
from imgdit.sae.calls import DenoiserCall, bind

_STEPS = 50
"""Of the published runs; steps are counted as fractions of them."""
_HOOK = "imgdit_unlearning_safree"


def filtered_tokens(
    pipe: Any,
    concepts: Sequence[str],
    material: Material,
    *,
    alpha: float = 0.01,
    last: float = 10.0,
    slope: float = 50.0,
    middle: float = 0.5333,
) -> Unlearned:
    """Tokens without which a prompt would be further from the concepts lose what they share with them.

    P_C projects on the span of the concepts' pooled texts, P_I on that of the prompt's pooled texts with one token
    masked each. A token is a trigger if the prompt without it is further from the concepts, |(I - P_C) p_without|,
    than (1 + alpha) times the mean of the prompts without another one. Its embedding e becomes (I - P_C) P_I e, in the
    first steps up to number t' = last * sigmoid(slope (beta - middle)) of 50, where beta is 1 - the mean cosine of all
    tokens and their projections. The pooled text is that of the tokens in use.

    The published third part re-weights low frequencies of a UNet's skip connections; a transformer has none.

    Args:
        alpha: margin of a trigger.
        last: the highest t'.
        slope, middle: of the sigmoid.
    """
    basis = torch.zeros(0)
    if concepts:
        with torch.no_grad():
            texts = [material.words[concept] for concept in concepts]
            _, _, pooled, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        basis = span(pooled.float())

    @contextmanager
    def attach(pipe: Any) -> Iterator[dict[str, Any]]:
        if not concepts:
            yield {}
            return
        texts = _Filter(pipe, basis, alpha, lambda beta: last / (1 + math.exp(-slope * (beta - middle))))
        compat.add_hook(pipe.text_encoder, texts, _HOOK)
        try:
            with placed(_Steps(pipe, texts)):
                yield {}
        finally:
            compat.remove_hook(pipe.text_encoder, _HOOK)

    return Unlearned(attach, size_of({"basis": basis}))


def span(vectors: torch.Tensor) -> torch.Tensor:
    """(r, J) orthonormal rows that span the rows of (N, J) vectors."""
    _, values, basis = torch.linalg.svd(vectors, full_matrices=False)
    return basis[values > 1e-5 * values[0]]


def triggers(without: torch.Tensor, concepts: torch.Tensor, alpha: float) -> torch.Tensor:
    """Whether each of n tokens is a trigger (n,).

    Args:
        without: (n, J) the prompt's pooled text without each token.
        concepts: (r, J) orthonormal.
    """
    distance = (without - without @ concepts.T @ concepts).norm(dim=1)  # (n,)
    others = (distance.sum() - distance) / max(len(distance) - 1, 1)
    return (distance >= (1 + alpha) * others) & (len(distance) > 1)


class _Text(NamedTuple):
    """A text that the filter changed."""

    before: torch.Tensor
    """(n, J)"""
    after: torch.Tensor
    """(n, J)"""
    until: float
    """Lowest timestep of the steps that get it changed."""


class _Filter(ModelHook):
    """On the text encoder: changes its output, and keeps what it changed."""

    def __init__(self, pipe: Any, concepts: torch.Tensor, alpha: float, last_step: Callable[[float], float]) -> None:
        super().__init__()
        self.special = set(pipe.tokenizer.all_special_ids)
        self.concepts, self.alpha, self.last_step = concepts, alpha, last_step
        self.texts: list[_Text] = []
        self.asked: tuple[torch.Tensor, torch.Tensor] | None = None
        self.masking = False
        """Whether the encoder is called by the hook itself."""

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        if not self.masking:
            arguments = bind(module, args, kwargs)
            ids = arguments["input_ids"]
            mask = arguments.get("attention_mask")
            self.asked = (ids, torch.ones_like(ids) if mask is None else mask)
        return args, kwargs

    @torch.no_grad()
    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        if self.masking or self.asked is None:
            return output
        (ids, masks), self.asked = self.asked, None
        states = output[0].clone()
        for row, (tokens, mask) in enumerate(zip(ids, masks)):
            valid = mask.bool()
            places = [i for i, token in enumerate(tokens.tolist()) if valid[i] and token not in self.special]
            if len(places) < 2:
                continue
            changed = self._changed(module, tokens, mask, places, output[0][row])
            if changed is not None:
                states[row, valid] = changed.after.to(states)
                self.texts.append(changed)
        output["last_hidden_state"] = states
        return output

    def _changed(
        self,
        module: torch.nn.Module,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        places: list[int],
        states: torch.Tensor,
    ) -> _Text | None:
        """A text of (T,) tokens with `states` (T, J) after the filter; `None`: no token is a trigger."""
        masks = mask.repeat(len(places), 1)
        masks[range(len(places)), places] = 0
        self.masking = True
        try:
            masked = module(tokens.expand_as(masks), attention_mask=masks)[0].float()
        finally:
            self.masking = False
        weight = masks[..., None].to(masked)
        without = (masked * weight).sum(1) / weight.sum(1)  # (n, J)
        concepts = self.concepts.to(without)
        chosen = triggers(without, concepts, self.alpha)
        if not bool(chosen.any()):
            return None
        own = span(without)
        kept = states[mask.bool()].float()
        projected = kept @ own.T @ own
        projected = projected - projected @ concepts.T @ concepts
        beta = 1 - float(F.cosine_similarity(projected, kept).mean())
        after = states.float().clone()
        after[mask.bool()] = projected
        is_trigger = torch.zeros(len(states), 1, dtype=torch.bool, device=states.device)
        is_trigger[torch.tensor(places, device=states.device)[chosen]] = True
        after = torch.where(is_trigger, after, states.float())[mask.bool()].to(states)
        return _Text(states[mask.bool()], after, 1000 * (1 - round(self.last_step(beta)) / _STEPS))


class _Steps(CallHook):
    """On the transformer: puts the text of the encoder back where the filter's steps are over."""

    def __init__(self, pipe: Any, texts: _Filter) -> None:
        super().__init__(pipe)
        self.texts = texts

    def before(self, arguments: dict[str, Any], call: DenoiserCall) -> dict[str, Any]:
        over = [text for text in self.texts.texts if call.timestep < text.until]
        if not over:
            return arguments
        states, pooled = arguments["encoder_hidden_states"].clone(), arguments["pooled_projections"].clone()
        for row in range(len(states)):
            for text in over:
                length = len(text.after)
                if length <= states.shape[1] and torch.equal(states[row, :length], text.after.to(states)):
                    states[row, :length] = text.before.to(states)
                    pooled[row] = text.before.mean(0).to(pooled)
                    break
        return {**arguments, "encoder_hidden_states": states, "pooled_projections": pooled}
