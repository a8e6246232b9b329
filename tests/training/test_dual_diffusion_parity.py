"""Losses and rows of Dual Diffusion's training, against recorded ones."""

import math

import pytest
import torch
from dual_diffusion_cases import CASES, META, PIPELINE, assert_near, named, pipeline, recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from imgdit import Frame, FrameLayout, MMDiT
from imgdit.models.functional import pack
from imgdit.training.batches import Batch, Text
from imgdit.training.masked_text_loss import likelihood_bound
from imgdit.training.objectives.flow_matching import flow_matching
from imgdit.training.text_rows import question_row

TOLERANCES = META["tolerances"]
THEIR_NAMES = {"norm_out.linear": "image_norm_out.linear", "proj_out": "image_proj_out"}


def fresh() -> MMDiT:
    return MMDiT.from_pretrained(PIPELINE, subfolder="transformer").train()


def text_loss(model, given, options, latents="latents"):
    """The image is clean at timestep 0, T5 has no gradients."""
    pipe, rows = pipeline(), len(given["input_ids"])

    def predict(ids):
        with torch.no_grad():
            text = pipe.text_encoder(ids)[0]
        return model(given[latents], text, None, torch.zeros(rows)).text_logits

    return likelihood_bound(
        predict, given["input_ids"], META["mask_id"], maskable=given["label_mask"].bool(),
        antithetic=options.get("antithetic", True), importance=options.get("importance", False),
        times=given["t_draws"], uniforms=given["mask_draws"],
    )  # fmt: skip


def image_loss(model, given, options):
    """The recorded code draws one of 1000 timesteps, and compares clean images."""
    index = (1000 * torch.sigmoid(given["u_draws"])).long()
    dropped = given["dropout_draws"] < options.get("dropout", 0.1)
    text = torch.where(dropped[:, None, None], given["null_embeds"], given["text_embeds"])
    latents = given["latents"]
    size = (latents.shape[2] // 2, latents.shape[3] // 2)
    batch = Batch(
        pack(latents, 2), FrameLayout.build([Frame(size)], text.shape[1]), Text(text, None),
        sigmas=((1000 - index) / 1000)[:, None], noise=pack(given["noise"], 2),
    )  # fmt: skip
    return flow_matching(model, None, batch, None, text_dropout=0.0, weighting="x0").loss


def check_gradients(model, loss, expected, options):
    loss.backward()
    theirs = {}
    for name, parameter in model.named_parameters():
        stem, _, leaf = name.rpartition(".")
        theirs[f"{THEIR_NAMES.get(stem, stem)}.{leaf}".removeprefix(".")] = parameter.grad
    for name, norm in options["grad_norms"].items():
        assert float(theirs[name].norm()) == pytest.approx(norm, abs=TOLERANCES["gradients"] * max(1.0, norm)), name
    for key, gradient in expected.items():
        if key.startswith("grad."):
            assert_near(theirs[key.removeprefix("grad.")], gradient, TOLERANCES["gradients"])


@pytest.mark.parametrize("name", named("text_loss"))
def test_the_loss_of_texts_is_as_recorded(name):
    model, options, (given, expected) = fresh(), CASES[name]["options"], recorded(name)
    loss = text_loss(model, given, options)
    assert_near(loss.detach()[None], expected["loss"], TOLERANCES["losses"])
    check_gradients(model, loss, expected, options)


@pytest.mark.parametrize("name", named("image_loss"))
def test_the_loss_of_images_is_as_recorded(name):
    model, options, (given, expected) = fresh(), CASES[name]["options"], recorded(name)
    loss = image_loss(model, given, options)
    assert_near(loss.detach()[None], expected["loss"], TOLERANCES["losses"])
    check_gradients(model, loss, expected, options)


@pytest.mark.parametrize("name", named("joint_loss"))
def test_the_loss_of_a_training_step_is_as_recorded(name):
    model, options, (given, expected) = fresh(), CASES[name]["options"], recorded(name)
    of_image, of_text = image_loss(model, given, options), text_loss(model, given, options, "latents_text")
    loss = of_image + options["weight"] * of_text
    for found, key in ((of_image, "image_loss"), (of_text, "text_loss"), (loss, "loss")):
        assert_near(found.detach()[None], expected[key], TOLERANCES["losses"])
    check_gradients(model, loss, expected, options)


@pytest.mark.parametrize("name", named("sft"))
def test_rows_of_questions_are_as_recorded(name):
    options, (_, expected) = CASES[name]["options"], recorded(name)
    found = question_row(
        pipeline().tokenizer, options["question"], options["answer"], options["max_length"], options["reverse"]
    )
    assert torch.equal(found.ids[0], expected["input_ids"])
    assert torch.equal(found.counted[0].long(), expected["label_mask"])
    assert torch.equal(found.prompt, ~found.counted)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_bound_is_that_of_its_definition(rows, length, antithetic, importance, seed):
    """Sum over masked targets of cross entropy / t, over all tokens; of a prediction that depends on nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (rows, length), generator=generator)
    maskable = torch.rand(rows, length, generator=generator) < 0.7
    draws, uniforms = torch.rand(rows, generator=generator), torch.rand(rows, length, generator=generator)
    logits = torch.randn(rows, length, 10, generator=generator)
    found = likelihood_bound(
        lambda noisy: logits, ids, 9, maskable=maskable, antithetic=antithetic, importance=importance, times=draws,
        uniforms=uniforms,
    )  # fmt: skip
    t = ((draws + torch.arange(rows)) / rows % 1 if antithetic else draws) * (1 - 1e-3) + 1e-3
    if importance:
        sigma_of_one = -math.log(1e-3)
        high, low = (math.log(-math.expm1(-s)) for s in (sigma_of_one, 1e-3))
        t = torch.exp(t * high + (1 - t) * low) / (1 - 1e-3)
    masked = (uniforms < ((1 - 1e-3) * t)[:, None]) & maskable
    log_p = logits[..., :9].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    expected = (-log_p / t[:, None] * masked).sum() / (rows * length)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
