"""Losses, gradients and batches of dialogues about images against recorded ones of LLaDA-V and LaViDa."""

import re
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast
from vision_cases import (
    CASES,
    FIXTURES,
    RECORDS,
    assert_near,
    model_of,
    named,
    picture,
    recorded,
    settings_of,
    tiling_of,
)

from imgdit.images.tiles import cut_tiles
from imgdit.models.image_rows import embed_rows
from imgdit.models.image_tokens import tower_features
from imgdit.models.masked_lm import LLADA_KEYS
from imgdit.pipelines.dialogues import SpecialTokens, label
from imgdit.training.masked_text_loss import logit_normal_times, mask_tokens, masked_text_loss
from imgdit.training.objectives.vision_language import join_batch, noised_logits, visible
from imgdit.training.vision_language import VisionRows

STRIDE = 101
"""Of recorded rows of embeddings and logits."""


def batch_of(name):
    """The case's batch: images in order, rows without one take none (they consume a dummy in the published code)."""
    case, given = CASES[name], recorded(name, "in")
    ids, labels = given["input_ids"], given["labels"]
    special = case["meta"]["special_ids"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FIXTURES / case["set"] / "model")
    marks = SpecialTokens.of(tokenizer)
    images = (ids == -200).sum(1).tolist()
    names, used = iter(case["options"]["pictures"]), []
    for count in images:
        taken = [next(names) for _ in range(max(count, 1))]
        used += taken if count else []
    pictures = [picture(case["set"], one) for one in used]
    aspects = [RECORDS[case["set"]]["meta"]["pictures"][one]["image_aspect_ratio"] for one in used]
    tiles = [cut_tiles(one, tiling_of(case["set"], aspect)) for one, aspect in zip(pictures, aspects)]
    answers = labels != -100
    if case["set"] == "lavida":  # there padding becomes a target inside the model
        answers |= ids == special["eos"]
        answers &= ids != special["fim"]
    turns = torch.tensor([label(tokenizer, row, marks, "turns").turns for row in ids.tolist()])
    return VisionRows(
        ids, answers, turns, torch.cat(tiles), tuple(map(len, tiles)), tuple(one.size for one in pictures),
        tuple(images),
    )  # fmt: skip


@contextmanager
def visible_padding(model, real):
    """Padding as the published code has it: vectors of zeros that everything sees."""

    def blank(module, args, options):
        embeds = options["inputs_embeds"]
        copies = len(embeds) // len(real)
        return args, options | {"inputs_embeds": embeds * real.repeat(copies, 1)[..., None]}

    hook = model.language_model.register_forward_pre_hook(blank, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def settings(case):
    """Of the images of a case: they all have the same pooling."""
    return settings_of(case["set"], case["options"]["pictures"][0])


@pytest.mark.parametrize("name", named("assembly"))
def test_batches(name):
    case, want = CASES[name], recorded(name, "out")
    model, batch = model_of(case["set"]), batch_of(name)
    with torch.no_grad(), settings(case):
        joined, targets, _ = join_batch(model, batch)
        features = [tower_features(model.vision_tower, tiles) for tiles in batch.tiles.split(batch.counts)]
        vectors = joined.vectors(model.projector(features, batch.shown))
        embeds = embed_rows(model.language_model, joined.ids, vectors) * joined.real[..., None]
    assert joined.ids.shape[1] == case["options"]["length"]
    assert torch.equal(joined.ids.masked_fill(~targets, -100), want["labels"])
    tolerance = case["meta"]["tolerances"]["assembly"]
    assert_near(embeds[:, ::STRIDE], want["embeds_rows"], tolerance)
    assert_near(embeds.mean(1), want["embeds_mean"], tolerance)


def published_names(model, lavida):
    """Published name -> parameter, of the trained parts."""
    found = {f"model.{name}": p for name, p in model.projector.named_parameters()}
    own = dict(model.language_model.named_parameters())
    if not lavida:
        return found | own
    tensors = safe_open(FIXTURES / "lavida/model/model.safetensors", "pt").keys()
    for name in tensors:
        for theirs, ours in LLADA_KEYS.items():
            if re.match(theirs, name):
                found[name] = own[re.sub(theirs, ours, name)]
    return found


@pytest.mark.parametrize("name", named("loss"))
def test_losses(name):
    case, given, want = CASES[name], recorded(name, "in"), recorded(name, "out")
    options, lavida = case["options"], case["set"] == "lavida"
    model, batch = model_of(case["set"]), batch_of(name)
    times = given["t_draws"]
    if options.get("policy") == "logit_normal":
        times = logit_normal_times(len(times), 0.0, 1.0, normals=times)
    attention = "prefix" if options.get("prefix_lm") else "dialogue" if options.get("conversation_mask") else None
    with settings(case):
        joined, targets, turns = join_batch(model, batch)
        assert joined.ids.shape[1] == options["length"]
        noised = mask_tokens(
            joined.ids, case["meta"]["special_ids"]["mask"], maskable=targets, complement=lavida, smallest=lavida,
            times=times, uniforms=given["mask_draws"],
        )  # fmt: skip
        seen = None if attention is None else visible(joined, targets, turns, attention)
        everywhere = joined._replace(real=torch.ones_like(joined.real))
        with visible_padding(model, joined.real):
            logits = noised_logits(model, batch, everywhere, noised, seen)
    lengths = None if lavida else targets.sum(1)
    wanted = joined.ids.repeat(len(noised.ids) // len(joined.ids), 1)
    weight = "none" if lavida else "rate_and_length"
    loss = masked_text_loss(logits, wanted, noised, weight=weight, lengths=lengths)
    if lavida:
        assert torch.equal(noised.masked, want["masked"])
        assert torch.equal(wanted.masked_fill(~noised.masked, -100), want["labels"])
        assert_near(noised.rate[: len(times), None], want["p_mask"], 1e-6)
    tolerances = case["meta"]["tolerances"]
    assert_near(loss[None], want["loss"], tolerances["loss"])
    assert_near(logits[:, ::STRIDE], want["logits_rows"], 1e-4)
    parameters = published_names(model, lavida)
    assert parameters.keys() == options["grad_norms"].keys()
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
    for key, norm in options["grad_norms"].items():
        assert float(gradients[key].norm()) == pytest.approx(norm, rel=tolerances["gradients"]), key
    for key, tensor in want.items():
        if key.startswith("grad."):
            assert_near(gradients[key.removeprefix("grad.")], tensor, tolerances["gradients"])
