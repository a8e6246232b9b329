"""Exact likelihoods of blocks: over all orders, the bound's many draws, the autoregressive case."""

import math
from itertools import permutations

import pytest
import torch
from block_text_cases import FIXTURES

from imgdit.models.bd3lm import BD3LM, load_bd3lm
from imgdit.training.block_diffusion_loss import block_diffusion_loss
from imgdit.training.block_likelihood import block_likelihood


def ids(rows=2, seed=0):
    text = torch.randint(0, 38, (rows, 16), generator=torch.Generator().manual_seed(seed))
    text[:, 0] = 39
    return text


def test_the_likelihood_is_over_all_orders_of_a_block():
    model, text = load_bd3lm(FIXTURES / "bd3lm"), ids()
    found = block_likelihood(model, text)
    nats = []
    with torch.no_grad():
        for order in permutations(range(8, 12)):
            row, total = text.clone(), 0.0
            row[:, 8:12] = model.mask_token_id
            for place in order:
                logits = model(row, clean_ids=text).logits
                total = total - model.log_probs(logits, row)[:, place].gather(-1, text[:, place, None])[:, 0].double()
                row[:, place] = text[:, place]
            nats.append(total)
    orders = torch.stack(nats)  # (24, B)
    torch.testing.assert_close(found.bound[:, 2], orders.mean(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.exact[:, 2], math.log(24) - (-orders).logsumexp(0), rtol=1e-4, atol=0)
    assert (found.exact < found.bound).all()


@pytest.mark.parametrize("fixed_counts", [False, True])
def test_the_bound_is_the_mean_of_the_loss(fixed_counts):
    model, text = load_bd3lm(FIXTURES / "bd3lm"), ids(1)
    generator, draws = torch.Generator().manual_seed(0), 128
    with torch.no_grad():
        found = block_diffusion_loss(model, text.repeat(draws, 1), fixed_counts=fixed_counts, generator=generator)
    nats = found.nlls.sum(1)
    error = nats.std() / math.sqrt(draws)
    assert abs(nats.mean() - block_likelihood(model, text).bound.sum()) < 4 * error


def test_a_fixed_number_of_masks_varies_less():
    model, text = load_bd3lm(FIXTURES / "bd3lm"), ids(1).repeat(64, 1)
    with torch.no_grad():
        spread = [
            block_diffusion_loss(
                model, text, fixed_counts=fixed, generator=torch.Generator().manual_seed(0)
            ).nlls.sum(1).std()
            for fixed in (False, True)
        ]  # fmt: skip
    assert spread[1] < 0.5 * spread[0]


def test_every_number_of_masks_is_as_frequent_and_prompts_keep_their_tokens():
    model, text = load_bd3lm(FIXTURES / "bd3lm").train(), ids(64)
    prompt = torch.arange(16).expand(64, -1) < 6
    found = block_diffusion_loss(
        model, text, fixed_counts=True, prompt_mask=prompt, generator=torch.Generator().manual_seed(0)
    )
    masked = found.noisy_ids == model.mask_token_id
    assert not masked[:, :6].any()
    number = masked.unflatten(1, (-1, 4)).sum(-1)  # (B, 4)
    assert set(number[:, 1].tolist()) == {1, 2}
    counts = number[:, 2:].flatten().bincount(minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 0.7 * counts[1:].max()


def test_one_token_per_block_is_the_autoregressive_likelihood():
    model, text = load_bd3lm(FIXTURES / "bd3lm"), ids()
    expected = block_diffusion_loss(model, text, block_size=1, low=1.0, high=1.0).nlls
    model.register_to_config(block_size=1)
    mask = torch.arange(16).expand(2, -1) < 9
    found = block_likelihood(model, text, mask)
    torch.testing.assert_close(found.exact, found.bound)
    torch.testing.assert_close(found.exact.float(), expected * mask, rtol=1e-4, atol=1e-5)


def test_models_and_lengths_without_it_are_refused():
    small = {"vocab_size": 8, "hidden_dim": 8, "n_blocks": 1, "n_heads": 2, "cond_dim": 4, "model_length": 16}
    with pytest.raises(ValueError, match="block_size <= 8"):
        block_likelihood(BD3LM(**small, block_size=16), ids())
    with pytest.raises(ValueError, match="do not divide"):
        block_likelihood(BD3LM(**small, block_size=4), ids()[:, :6])
