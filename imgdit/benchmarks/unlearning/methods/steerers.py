"""Unlearning by steering the text along a concept's sparse code (Concept Steerers, arXiv 2501.19066).

n tokens, L latents, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from imgdit.benchmarks.unlearning.methods.material import Material, Unlearned
from imgdit.benchmarks.unlearning.methods.weights import size_of
from imgdit.sae.hooks import hooked, site
from imgdit.sae.streams import Tokens


def steered_away(
    pipe: Any, concepts: Sequence[str], material: Material, *, strength: float = -0.5, stream: str = "text"
) -> Unlearned:
    """Each token of the prompt gets strength · D z(c): z is the k-sparse code of the concept's words, said alone, and
    D the decoder; each token of the negative prompt gets the negative.

    Published is an autoencoder of a layer of the text encoder, whose code of the concept's token i is added at the
    prompt's token i, as both are padded to one length. Here it reads the embedding of the tokens in the transformer,
    and the codes of the words' tokens are averaged, as texts are not padded.

    Args:
        strength: λ; below zero takes the concept away.
        stream: "text", for the catalogue: the method has no other.
    """
    changes: dict[str, torch.Tensor] = {}
    for hookpoint in material.streams(pipe).get("text", ()) if concepts else ():
        codes = [concept_code(pipe, material, concept, hookpoint) for concept in concepts]
        decoder = material.saes[hookpoint].W_dec.detach()
        changes[hookpoint] = strength * torch.stack(codes).sum(0) @ decoder

    @contextmanager
    def attach(pipe: Any) -> Iterator[dict[str, Any]]:
        with hooked(pipe, {hookpoint: _Adding(change) for hookpoint, change in changes.items()}):
            yield {}

    return Unlearned(attach, size_of(changes))


@torch.no_grad()
def concept_code(pipe: Any, material: Material, concept: str, hookpoint: str) -> torch.Tensor:
    """(L,) mean over the tokens of a concept's words of their k-sparse codes at a hookpoint of the text."""
    sae = material.saes[hookpoint]
    embeds, *_ = pipe.encode_prompt(material.words[concept], do_classifier_free_guidance=False)
    rows = site(pipe, hookpoint).module(embeds.to(pipe.transformer.dtype))[0]  # (n, d)
    code = sae.encode(sae.normalize(rows.to(sae.W_dec.dtype))[0])
    return code._replace(acts=code.acts.float()).mean(len(rows))[0].to(sae.W_dec)


class _Adding:
    """Adds a vector to the tokens of the prompt and takes it from those of the negative prompt."""

    def __init__(self, change: torch.Tensor) -> None:
        self.change = change

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        x = tokens.values.clone()
        change = self.change.to(x)
        if tokens.call.conditional is not None:
            x[tokens.call.conditional] += change
        if tokens.call.unconditional is not None:
            x[tokens.call.unconditional] -= change
        return x
