"""Exact likelihoods of text under block diffusion with small blocks (BD3-LM, arXiv 2503.09573).

A block of n tokens is written in a random order, one token per pass, as the first-hitting sampler does. With the
masks S that are left, and the model's probabilities p_i(S) of the right tokens,

    bound:  N(S) = mean over i in S of  -ln p_i(S) + N(S without i)
    exact:  E(S) = -ln mean over i in S of  p_i(S) exp(-E(S without i))

so that a block has the negative log-likelihood E(all), and N(all) is the bound of the paper's equation 8 without any
draw: its mean over masking rates t is one over orders. One token per block, both are the autoregressive likelihood.

B rows, L tokens, n tokens of a block, m blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from imgdit.models.bd3lm import BD3LM

LARGEST = 8
"""Tokens of a block up to which all 2^n - 1 sets of masks are computed."""


class BlockLikelihood(NamedTuple):
    """Nats (B, m) of the blocks of texts, 0 where none of a block's tokens counts."""

    bound: torch.Tensor
    """The bound on the negative log-likelihood."""
    exact: torch.Tensor
    """The negative log-likelihood of what the first-hitting sampler writes."""


@torch.no_grad()
def block_likelihood(model: BD3LM, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BlockLikelihood:
    """Negative log-likelihoods of blocks, without their first token, which is given.

    Args:
        model: with `cross_attn` and a block size of at most `LARGEST`; 2^n - 1 passes.
        ids: (B, L), beginning with the token that begins every text; L a multiple of the block size.
        attention_mask: (B, L), 1 on tokens that are counted. A block of which one counts is counted as a whole: what
            pads its end is written with it.

    Raises:
        ValueError: another model, larger blocks, or a length that they do not divide.
    """
    size = model.config.block_size
    if model.config.parameterization != "subs" or not model.config.cross_attn or size > LARGEST:
        raise ValueError(
            f"the exact likelihood needs parameterization='subs', cross_attn=True and block_size <= {LARGEST}, got "
            f"{model.config.parameterization!r}, {model.config.cross_attn} and {size}; block_diffusion_loss estimates "
            "the others"
        )
    if ids.shape[1] % size:
        raise ValueError(f"blocks of {size} tokens do not divide rows of {ids.shape[1]}")
    counted = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    blocks = counted.unflatten(1, (-1, size)).any(-1)  # (B, m)
    zero = torch.zeros(blocks.shape, dtype=torch.float64, device=ids.device)
    bound, exact = {0: zero}, {0: zero}
    for masks in range(1, 2**size):
        places = [i for i in range(size) if masks >> i & 1]
        nats = _masked_nats(model, ids, places)[..., places].double()  # (B, m, masks)
        before = torch.stack([bound[masks ^ 1 << i] for i in places], -1)
        bound[masks] = (nats + before).mean(-1)
        before = torch.stack([exact[masks ^ 1 << i] for i in places], -1)
        exact[masks] = -(-nats - before).logsumexp(-1) + torch.tensor(float(len(places))).log()
    return BlockLikelihood(bound[2**size - 1] * blocks, exact[2**size - 1] * blocks)


def _masked_nats(model: BD3LM, ids: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Nats (B, m, n) of the tokens with these places of every block masked, 0 at others and at the first token."""
    size = model.config.block_size
    masked = torch.zeros_like(ids, dtype=torch.bool).unflatten(1, (-1, size))
    masked[..., places] = True
    masked = masked.flatten(1)
    masked[:, 0] = False
    noisy = ids.masked_fill(masked, model.mask_token_id)
    log_probs = model.log_probs(model(noisy, clean_ids=ids, block_size=size).logits, noisy)
    return -log_probs.gather(-1, ids[..., None])[..., 0].unflatten(1, (-1, size))
