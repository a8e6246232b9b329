"""Losses and likelihoods, against recorded numbers of LLaDA's code."""

import re
from functools import partial

import pytest
import torch
from masked_text_cases import CASES, model_of, named, recorded

from imgdit.models.masked_lm import LLADA_KEYS, load_masked_lm, masked_logits
from imgdit.training.masked_text_loss import (
    log_likelihood,
    mask_tokens,
    masked_text_loss,
    pretrain_loss,
    sft_loss,
)


def renamed(key: str) -> str:
    """A parameter's name in the loaded model."""
    for pattern, name in LLADA_KEYS.items():
        key = re.sub(pattern, name, key)
    return key


@pytest.mark.parametrize("name", named("train"))
def test_losses_and_gradients_are_the_recorded_ones(name):
    case, found = CASES[name], recorded(name)
    model = load_masked_lm(model_of(name).name_or_path)
    mask, ids = model.config.mask_token_id, found["input_ids"]
    draws = {"times": found["t"], "uniforms": found["mask_uniform"]}
    maskable = None
    if case["objective"] == "sft":
        lengths = found["prompt_lengths"]
        maskable = torch.arange(ids.shape[1]) >= lengths[:, None]
        loss = sft_loss(partial(masked_logits, model), ids, lengths, mask, **draws)
    else:
        loss = pretrain_loss(partial(masked_logits, model), ids, mask, **draws)
    noised = mask_tokens(ids, mask, maskable=maskable, eps=case["eps"], **draws)
    assert torch.equal(noised.ids, found["noisy"]) and torch.equal(noised.masked, found["masked"].bool())
    torch.testing.assert_close(noised.rate[:, None].expand(ids.shape), found["p_mask"])
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    loss.backward()
    parameters = dict(model.named_parameters())
    for key, norm in case["grad_norms"].items():
        assert parameters[renamed(key)].grad.norm().item() == pytest.approx(norm, rel=1e-5), key
    for key, gradient in found.items():
        if key.startswith("grad."):
            mine = parameters[renamed(key.removeprefix("grad."))].grad
            torch.testing.assert_close(mine, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", named("likelihood"))
def test_the_likelihood_is_the_recorded_one(name):
    case, found = CASES[name], recorded(name)
    model, seen = model_of(name), []

    def predict(ids):
        seen.append(ids)
        return masked_logits(model, ids)

    guidance = case["cfg_scale"] + 1
    options = {"samples": case["mc_num"], "batch_size": case["batch_size"], "guidance_scale": guidance}
    value = log_likelihood(
        predict, found["prompt"], found["answer"], model.config.mask_token_id, counts=found["k"],
        permutations=found["permutations"], **options,
    )  # fmt: skip
    assert value.item() == pytest.approx(case["log_likelihood"], abs=1e-4)
    assert torch.equal(torch.stack(seen[:: 2 if guidance > 1 else 1]), found["noisy"])


def uniform(ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model that knows nothing, of 10 tokens."""
    return torch.zeros(*ids.shape, 10)


def test_estimates_of_a_model_that_knows_nothing():
    ids = torch.arange(8).repeat(64, 1)
    generator = torch.Generator().manual_seed(0)
    nats = torch.tensor(10.0).log()
    for complement in (False, True):
        plain = pretrain_loss(uniform, ids, 9, weight="none", complement=complement, generator=generator)
        assert plain == pytest.approx(nats)
    for samples, batch_size in ((8, 4), (1, 16), (5, 2)):
        rows = []

        def predict(ids, rows=rows):
            rows.append(len(ids))
            return uniform(ids)

        likely = log_likelihood(
            predict, ids[0, :3], ids[0, 3:], 9, samples=samples, batch_size=batch_size, generator=generator
        )
        assert likely.item() == pytest.approx(-5 * nats.item(), rel=1e-6) and sum(rows) == samples


def test_complements_mask_each_answer_token_once():
    ids = torch.arange(8).repeat(3, 1)
    maskable = torch.arange(8) >= torch.tensor([[2], [4], [0]])
    noised = mask_tokens(ids, 9, maskable=maskable, complement=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noised.masked[:3] ^ noised.masked[3:], maskable)
    assert torch.equal(noised.ids[3:] == 9, noised.masked[3:]) and noised.rate.shape == (6,)


def test_the_same_seed_masks_the_same():
    ids = torch.arange(8).repeat(3, 1)
    first, again, other = (mask_tokens(ids, 9, generator=torch.Generator().manual_seed(n)).ids for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_batch_without_masks_has_no_loss():
    ids = torch.arange(8)[None]
    noised = mask_tokens(ids, 9, maskable=torch.zeros_like(ids, dtype=torch.bool))
    for weight in ("none", "rate"):
        assert masked_text_loss(uniform(ids), ids, noised, weight=weight) == 0


def test_what_means_nothing_is_refused():
    ids = torch.arange(8)[None]
    with pytest.raises(ValueError, match="leave no answer"):
        sft_loss(uniform, ids, torch.tensor([8]), 9)
    with pytest.raises(ValueError, match="weight must be one of"):
        pretrain_loss(uniform, ids, 9, weight="p")
    with pytest.raises(ValueError, match="lengths are what"):
        masked_text_loss(uniform(ids), ids, mask_tokens(ids, 9), weight="rate_and_length")
    with pytest.raises(ValueError, match="the answer is empty"):
        log_likelihood(uniform, ids[0], ids[0, :0], 9)
    with pytest.raises(ValueError, match="at least 1"):
        log_likelihood(uniform, ids[0], ids[0], 9, samples=0)
