"""Losses of block diffusion against recorded ones, with their gradients."""

import pytest
import torch
from block_text_cases import CASES, TOLERANCE, model_of, named, recorded

from imgdit.schedulers.text_noise import block_times
from imgdit.training.block_diffusion_loss import block_diffusion_loss


def our_name(name):
    return {"backbone.vocab_embed.embedding": "vocab_embed.weight"}.get(name, name.removeprefix("backbone."))


@pytest.mark.parametrize("name", named("loss"))
def test_losses_and_gradients_are_as_recorded(name):
    case, found = CASES[name], recorded(name)
    model = model_of(name).train(case["training"])
    options = {}
    if case["algo"] != "ar":
        low, high = case["eps_min"], case["eps_max"]
        drawn = found["t_uniform"]
        times = block_times(
            *found["x_0"].shape, found["x_0"].shape[1] // drawn.shape[1], low=low, high=high, uniforms=drawn
        )
        rounds = sorted((key for key in found if key.startswith("mask_uniform")), key=lambda key: int(key[13:]))
        options = {
            "block_size": case["block_size"], "noise": case["noise"], "low": low, "high": high, "times": times,
            "resample": case["resample"], "sigma_weight": case["mdlm_loss_scale"],
            "uniforms": [found[key] for key in rounds],
        }  # fmt: skip
    output = block_diffusion_loss(model, found["x_0"], found["attention_mask"], **options)
    if "x_t" in found:
        assert torch.equal(output.noisy_ids, found["x_t"])
    torch.testing.assert_close(output.nlls, found["nlls"], **TOLERANCE)
    assert torch.equal(output.counted.float(), found["token_mask"])
    assert float(output.loss) == pytest.approx(case["loss"], rel=1e-5)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    for key, norm in case["grad_norms"].items():
        gradient = parameters[our_name(key)].grad
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7), key
    for key in (key for key in found if key.startswith("grad.")):
        gradient = parameters[our_name(key.removeprefix("grad."))].grad
        torch.testing.assert_close(gradient, found[key], rtol=0, atol=1e-4 * float(found[key].abs().max()))
