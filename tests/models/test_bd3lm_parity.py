"""BD3LM against recorded logits of BD3-LM, MDLM, SEDD and the autoregressive baseline."""

import pytest
import torch
from block_text_cases import CASES, TOLERANCE, model_of, named, recorded

from imgdit.models.bd3lm import block_groups, dense_mask


@pytest.mark.parametrize("name", named("mask"))
def test_who_sees_whom_is_as_recorded(name):
    case = CASES[name]
    groups = block_groups(case["length"], case["block_size"], noisy=True)
    assert torch.equal(dense_mask(groups, 2 * case["length"]), recorded(name)["mask"])


def compare(output, found):
    torch.testing.assert_close(output.logits, found["logits"], **TOLERANCE)
    for n, state in enumerate(output.hidden_states):
        torch.testing.assert_close(state, found[f"hidden_states.{n}"], **TOLERANCE)


@pytest.mark.parametrize("name", named("forward"))
@torch.no_grad()
def test_all_blocks_in_one_pass_are_as_recorded(name):
    model, found = model_of(name), recorded(name)
    output = model(
        found["x_t"], clean_ids=found["x_0"], block_size=CASES[name]["block_size"], output_hidden_states=True
    )
    compare(output, found)
    mine, expected = model.log_probs(output.logits, found["x_t"]), found["log_probs"]
    torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-4)


@pytest.mark.parametrize("name", named("forward_sample"))
@torch.no_grad()
def test_a_block_behind_clean_ones_is_as_recorded(name):
    model, found = model_of(name), recorded(name)
    logits = model(found["x"], block_size=CASES[name]["block_size"]).logits
    torch.testing.assert_close(logits, found["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", named("forward_plain"))
@torch.no_grad()
def test_mdlm_sedd_and_the_autoregressive_model_are_as_recorded(name):
    model, found = model_of(name), recorded(name)
    sigma = found.get("sigma")
    output = model(found["x"], sigma, output_hidden_states=True)
    mine = model.log_probs(output.logits, found["x"], sigma)
    torch.testing.assert_close(mine, found["parameterised"], rtol=1e-7, atol=1e-4)
    compare(output, found)
