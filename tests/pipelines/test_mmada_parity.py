"""Rows, images and texts against recorded runs of MMaDA."""

import pytest
import torch
from mmada_cases import CASES, META, Replay, make_pipe, named, recorded
from PIL import Image

from imgdit.pipelines.masked_text import MaskedTextPipeline
from imgdit.pipelines.mmada import pixels_of
from imgdit.pipelines.mmada_rows import (
    language_rows,
    question_rows,
    reasoning_rows,
    text_to_image_rows,
    understanding_rows,
)
from imgdit.schedulers.mask_schedule import masked_fraction
from imgdit.schedulers.masked_text import MaskedTextScheduler

TOLERANCES = META["tolerances"]
SPECIAL = {
    "bos": "bos", "eos": "eos", "mask": "mask", "image_start": "<|soi|>", "image_end": "<|eoi|>",
    "text_to_image": "<|t2i|>", "understanding": "<|mmu|>", "padding": "[iPAD]", "reasoning": "<|r2i|>",
    "header_end": "<|end_header_id|>",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return make_pipe(Replay)


def close(mine, theirs, tolerance):
    assert (mine - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def published_mask(attention_mask, soft=False):
    """Additive mask (B, 1, L, L) of the published code: padding sees nothing, and with `soft` it is seen a little."""
    seen = (attention_mask[:, :, None] * attention_mask[:, None, :])[:, None].float()
    return seen if soft else torch.where(seen > 0, 0.0, torch.finfo(torch.float32).min)


def test_special_tokens_are_looked_up(pipe):
    expected = {role: META["special_ids"][name] for role, name in SPECIAL.items()}
    assert {role: getattr(pipe.tokens, role) for role in expected} == expected
    assert pipe.tokens.first_code == META["image_token_offset"]
    assert pipe.tokens.codebook_size == META["codebook_size"]


@pytest.mark.parametrize("name", named("preprocess"))
def test_images_are_prepared_as_published(name):
    given, found = recorded(name)
    side = CASES[name]["options"]["resolution"]
    image = Image.fromarray(given["image"].numpy())
    for fit in ("crop", "squash"):
        close(pixels_of(image, (side, side), fit), found[fit], TOLERANCES["preprocess"])


def rows_of(tokens, name):
    """The case's rows, by what it has recorded."""
    case, (given, found) = CASES[name], recorded(name)
    options, images = case["options"], given.get("image_ids")
    texts = options["token_ids"]
    length = options.get("max_text_len", options.get("max_seq_len"))
    first = int(found["input_ids"][0][found["input_ids"][0] != tokens.padding][0])
    if first == tokens.text_to_image:
        draws = given.get("dropout_draws", torch.ones(len(texts))).tolist()
        kept = [[] if draw < options.get("cond_dropout_prob", 0) else text for draw, text in zip(draws, texts)]
        return text_to_image_rows(tokens, kept, images, length + 1)
    if images is None:
        return language_rows(tokens, texts, length)
    make = reasoning_rows if first == tokens.reasoning else understanding_rows
    return make(tokens, texts, images, length)


@pytest.mark.parametrize("name", named("prompting"))
def test_rows_are_the_published_ones(pipe, name):
    options, (given, found) = CASES[name]["options"], recorded(name)
    assert [pipe._ids(text) for text in options["texts"]] == options["token_ids"]
    rows = rows_of(pipe.tokens, name)
    assert torch.equal(rows.ids, found["input_ids"])
    if "attention_mask" in found:
        assert torch.equal(rows.attention_mask, found["attention_mask"])
    if "prompt_mask" in found:
        assert torch.equal(rows.prompt.long(), found["prompt_mask"].long())
    if "labels" in found:
        labels = rows.ids.masked_fill(rows.attention_mask == 0, -100)
        if "image_labels" in given:
            labels[:, rows.image] = given["image_labels"]
        elif rows.image.start == 2:
            labels[:, : rows.image.stop + 1] = -100
        assert torch.equal(labels, found["labels"])


@pytest.mark.parametrize("name", named("schedule"))
def test_schedules(name):
    options, (given, found) = CASES[name]["options"], recorded(name)
    for schedule, expected in found.items():
        mine = masked_fraction(given["t"], options["pow"] if schedule == "pow" else schedule)
        close(mine, expected, TOLERANCES["schedule"])


@pytest.mark.parametrize("name", named("forward"))
@torch.no_grad()
def test_logits(pipe, name):
    given, found = recorded(name)
    ids, mask = given["input_ids"], given["attention_mask"]
    masks = {"hard": published_mask(mask), "none": None, "soft": published_mask(mask, soft=True)}
    for kind, one in masks.items():
        close(pipe.model(input_ids=ids, attention_mask=one).logits, found[f"logits_{kind}"], TOLERANCES["forward"])
    # What real tokens see is the same with the two-dimensional mask that pipelines use.
    plain = pipe.model(input_ids=ids, attention_mask=mask).logits
    close(plain[mask.bool()], found["logits_hard"][mask.bool()], TOLERANCES["forward"])


@pytest.mark.parametrize("draws", ["recorded", "seeded"])
@pytest.mark.parametrize("name", named("t2i_generate"))
def test_images_are_the_published_ones(pipe, name, draws):
    case, (given, found) = CASES[name], recorded(name)
    options, ids, tokens = case["options"], given["input_ids"], pipe.tokens
    assert options["temperatures_used"] == pytest.approx(temperatures(options))
    places = slice(options["max_text_len"] + 2, -1)
    image = ids[:, places]
    known = torch.where(image == tokens.mask, -1, image - tokens.first_code)
    pipe.scheduler = MaskedTextScheduler.from_config(pipe.scheduler.config, mask_schedule=options["schedule"])
    pipe.draws = given if draws == "recorded" else {}
    told = []
    side = int(known.shape[1] ** 0.5)
    output = pipe(
        options["prompts"], codes=known.view(len(ids), side, -1), num_inference_steps=options["timesteps"],
        guidance_scale=options["guidance_scale"] + 1, order_noise=options["temperature"],
        sampling_method="gumbel" if draws == "recorded" else "auto", max_sequence_length=options["max_text_len"],
        generator=torch.Generator().manual_seed(options["seed"]), output_type="latent",
        height=side * 4, width=known.shape[1] // side * 4,
        callback_on_step_end_tensor_inputs=["codes", "sampled_probs"],
        callback_on_step_end=lambda pipe, step, timestep, given: told.append(given),
    )  # fmt: skip
    assert torch.equal(output.codes.flatten(1), found["codes"])
    inputs = found["model_inputs"]
    # Published loops go on where nothing is left to do.
    assert all((ids[:, places] != tokens.mask).all() for ids in inputs[len(pipe.seen) :])
    length = pipe.seen[0].shape[1] if pipe.seen else 0
    for seen, expected in zip(pipe.seen, inputs):
        assert torch.equal(seen[: len(ids)], expected[:, -length:])
        assert (expected[:, :-length] == tokens.padding).all()
        if "uncond_input_ids" in given and options["guidance_scale"]:
            free = given["uncond_input_ids"].clone()
            free[:, places] = expected[:, places]
            assert torch.equal(seen[len(ids) :], free[:, -length:])
    for step, one in enumerate(told):
        masked = found["masking"][step] if step < len(told) - 1 else torch.zeros_like(found["masking"][step])
        assert torch.equal(one["codes"] < 0, masked)
        drawn = found["selected_probs"][step] <= 1  # 2 where a code is known
        close(one["sampled_probs"][drawn], found["selected_probs"][step][drawn], 1e-4)


def temperatures(options):
    found, scale = [], options["temperature"]
    for step in range(options["timesteps"]):
        scale *= 1 - (step + 1) / options["timesteps"]
        found.append(scale)
    return found


class ReplayText(MaskedTextPipeline):
    """Takes draws over all places of the grid, as they were recorded."""

    draws: dict[str, torch.Tensor] = {}

    def _draws(self, run, step, revealed):
        at = (run.passes.start - run.prompt_length) // run.options.block_length * run.options.steps + step
        found = {name: tensor[at][:, run.passes.start : run.passes.stop] for name, tensor in self.draws.items()}
        return type(super()._draws(run, step, revealed))(revealed=revealed, **found)


@pytest.mark.parametrize("name", named("mmu_generate"))
def test_answers_are_the_published_ones(pipe, name):
    options, (given, found) = CASES[name]["options"], recorded(name)
    ids, blocks = given["idx"], options["max_new_tokens"] // options["block_length"]
    text = ReplayText(pipe.model, MaskedTextScheduler(), pipe.tokenizer)
    text.set_progress_bar_config(disable=True)
    names = {"gumbel": "uniform_f64", "order": "uniform"}
    text.draws = {key: given[kind] for key, kind in names.items() if kind in given}
    grids = [torch.cat([ids, torch.full((len(ids), options["max_new_tokens"]), pipe.tokens.mask)], 1)]

    def keep(pipe, step, timestep, told):
        block = told["block_x"]
        grids.append(torch.cat([block, grids[-1][:, block.shape[1] :]], 1))
        whole = not (block == pipe.mask_token_id).any()
        if options["eot_token"] is not None and whole and (block[:, -1] == options["eot_token"]).all():
            pipe._interrupt = True

    mask = given.get("attention_mask")
    text(
        input_ids=ids, gen_length=options["max_new_tokens"], block_length=options["block_length"],
        # The published code forgets the mask in guided steps.
        attention_mask=None if mask is None or options["cfg_scale"] else mask[:, : ids.shape[1]],
        num_inference_steps=options["steps"] // blocks, temperature=options["temperature"], sampling_method="gumbel",
        threshold=2.0, guidance_scale=options["cfg_scale"] + 1, remasking=options["remasking"], eos_early_stop=False,
        allow_mask_token=True, callback_on_step_end=keep,
    )  # fmt: skip
    states = [*found["states"], found["sequence"]]
    # Passes that find nothing masked are left out here and recorded there.
    mine, kept = (
        [grid for n, grid in enumerate(some) if n == 0 or not torch.equal(grid, some[n - 1])]
        for some in (grids, states)
    )
    assert len(mine) == len(kept) and all(map(torch.equal, mine, kept))
    asked = question_rows(pipe.tokens, pipe._chats([options["question"]]), ids[-1:, -1:])  # of any image
    assert asked[0][0, 4:].tolist() == ids[0, -len(asked[0][0, 4:]) :].tolist()


def test_no_kind_of_case_is_left_out():
    """The other kinds are those of the image tokenizer, and of masks and losses in training."""
    here = {"preprocess", "prompting", "schedule", "forward", "t2i_generate", "mmu_generate"}
    assert {case["kind"] for case in CASES.values()} == here | {"magvit", "masking", "losses"}
