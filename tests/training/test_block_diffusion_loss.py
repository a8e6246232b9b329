"""Losses of block diffusion: the likelihood they bound, resampling, prompts."""

import pytest
import torch
from block_text_cases import FIXTURES

from imgdit.models.bd3lm import load_bd3lm
from imgdit.training.block_diffusion_loss import block_diffusion_loss


def ids(rows=3, seed=0):
    text = torch.randint(0, 38, (rows, 16), generator=torch.Generator().manual_seed(seed))
    text[:, 0] = 39
    return text


def test_blocks_of_one_masked_token_are_an_exact_likelihood():
    """Each token's cross entropy given all before it."""
    model, text = load_bd3lm(FIXTURES / "bd3lm"), ids()
    found = block_diffusion_loss(model, text, block_size=1, low=1.0, high=1.0)
    with torch.no_grad():
        for place in (1, 9, 15):
            row = text[:, : place + 1].clone()
            row[:, place] = model.mask_token_id
            logits = model(row, block_size=1).logits[:, -1:]
            expected = -model.log_probs(logits, row[:, -1:])[:, 0].gather(-1, text[:, place : place + 1])[:, 0]
            torch.testing.assert_close(found.nlls[:, place], expected, rtol=0, atol=1e-4)


def test_masked_fractions_are_within_bounds_when_resampled():
    model = load_bd3lm(FIXTURES / "bd3lm").train()
    for seed in range(5):
        found = block_diffusion_loss(
            model, ids(), low=0.4, high=0.8, resample=True, keep_first=False,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        fraction = (found.noisy_ids == model.mask_token_id).unflatten(1, (-1, 4)).float().mean(-1)
        assert ((fraction >= 0.4) & (fraction <= 0.8)).all()


def test_bounds_that_no_block_meets_are_refused():
    model = load_bd3lm(FIXTURES / "bd3lm").train()
    with pytest.raises(ValueError, match="widen the bounds"):
        block_diffusion_loss(model, ids(), low=0.6, high=0.7, resample=True)


def test_prompts_are_neither_masked_nor_counted():
    model, text = load_bd3lm(FIXTURES / "bd3lm").train(), ids()
    prompt = torch.arange(16).expand(3, -1) < torch.tensor([[3], [8], [5]])
    found = block_diffusion_loss(model, text, prompt_mask=prompt, low=0.9, high=1.0)
    assert torch.equal(found.noisy_ids[prompt], text[prompt])
    assert not found.nlls[prompt].any() and torch.equal(found.counted, ~prompt)


def test_the_bound_is_taken_over_all_rates_in_evaluation():
    model, text = load_bd3lm(FIXTURES / "bd3lm"), ids()
    model.register_to_config(sampling_eps_min=0.45, sampling_eps_max=0.5)
    masks = [
        (block_diffusion_loss(model.train(training), text).noisy_ids == 40).float().mean(1).std()
        for training in (True, False)
    ]
    assert masks[0] < masks[1]
