"""Masks of image codes, losses and gradients against recorded runs of MMaDA."""

import re

import pytest
import torch
from mmada_cases import CASES, FIXTURES, META, named, recorded

from imgdit.models.masked_lm import LLADA_KEYS, load_masked_lm
from imgdit.training.masked_text_loss import Noised, mask_codes, masked_text_loss

TOLERANCES = META["tolerances"]
KINDS = ("t2i", "lm", "mmu", "r2i")
MASK = META["special_ids"]["mask"]


@pytest.fixture(scope="module")
def model():
    return load_masked_lm(FIXTURES / "lm")


def close(mine, theirs, tolerance):
    theirs = torch.as_tensor(theirs)
    assert (mine - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("name", named("masking"))
def test_codes_are_masked_as_published(name):
    options, (given, found) = CASES[name]["options"], recorded(name)
    codes = given["image_ids"]
    noised = mask_codes(
        codes, MASK, schedule=options["schedule"], least=options["min_masking_rate"], times=given["timesteps"],
        order=given["order_draws"],
    )  # fmt: skip
    assert torch.equal(noised.ids, found["input_ids"])
    assert torch.equal(codes.masked_fill(~noised.masked, -100), found["labels"])
    close(noised.rate, found["mask_prob"], TOLERANCES["masking"] if TOLERANCES["masking"] != "exact" else 1e-6)


def losses_of(logits, case, given):
    """The case's losses by their names, of logits for all its rows."""
    options = CASES[case]["options"]
    ids, labels, found, first = given["input_ids"], given["labels"], {}, 0
    for kind in KINDS:
        rows = slice(first, first := first + options.get(f"batch_size_{kind}", 0))
        if rows.start == rows.stop:
            continue
        if kind == "t2i":
            # The published code also counts the marks around an image, which are always seen.
            counted = labels[rows] != -100
            counted[:, : options["max_seq_length"] + 1] = False
            noised = Noised(ids[rows], counted, torch.ones(len(counted)))
            found["loss_t2i"] = masked_text_loss(logits[rows], labels[rows], noised, weight="none")
            continue
        noised = Noised(ids[rows], ids[rows] == MASK, given[f"p_mask_{kind}"][:, 0])
        lengths = given.get("answer_lengths" if kind == "mmu" else f"answer_lengths_{kind}")
        found[f"loss_{kind}"] = masked_text_loss(
            logits[rows], labels[rows], noised, weight="rate" if lengths is None else "rate_and_length",
            lengths=None if lengths is None else lengths[:, 0],
        )  # fmt: skip
    return found


def renamed(name):
    for pattern, ours in LLADA_KEYS.items():
        if re.search(pattern, name):
            return re.sub(pattern, ours, name)
    raise KeyError(name)


@pytest.mark.parametrize("name", named("losses"))
def test_losses_and_gradients_are_the_published_ones(model, name):
    options, (given, found) = CASES[name]["options"], recorded(name)
    ids, padding = given["input_ids"], given["t2i_masks"]
    real = torch.ones_like(ids)
    real[: len(padding)] = padding
    added = (real[:, :, None] * real[:, None, :])[:, None].float()  # the published mask: padding is seen a little
    model.zero_grad()
    losses = losses_of(model(input_ids=ids, attention_mask=added).logits, name, given)
    for kind, loss in losses.items():
        close(loss, found[kind], TOLERANCES["losses"])
    total = sum(scale * losses[kind] for kind, scale in options["coefficients"].items() if kind in losses)
    close(total, found["loss"], TOLERANCES["losses"])
    close(losses["loss_t2i"], found["loss_forward_t2i"], TOLERANCES["losses"])
    total.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    norms = {renamed(key): norm for key, norm in options["grad_norms"].items()}
    assert norms.keys() == gradients.keys()
    for key, norm in norms.items():
        close(gradients[key].norm(), norm, TOLERANCES["gradients"])
    for key, expected in found.items():
        if key.startswith("grad."):
            close(gradients[renamed(key.removeprefix("grad."))], expected, TOLERANCES["gradients"])
    with torch.no_grad():
        hidden = losses_of(model(input_ids=ids, attention_mask=real).logits, name, given)
    close(hidden["loss_t2i"], found["loss_t2i_hard_mask"], TOLERANCES["losses"])
