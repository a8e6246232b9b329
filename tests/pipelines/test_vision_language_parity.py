"""Answers about images against recorded ones of LLaDA-V and LaViDa, and logits with LaViDa's prefix."""

from functools import cache

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import rotate_half
from vision_cases import CASES, FIXTURES, assert_near, model_of, named, picture, recorded, settings_of

from imgdit.models.image_rows import ImageVectors
from imgdit.models.masked_text_passes import BlockPasses, sees_prefix
from imgdit.pipelines.vision_language import LaViDaPipeline, LLaDAVPipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler, TextDraws

REMASKING = {"entrophy": "entropy"}
"""As published -> ours."""


def replaying(owner):
    """The pipeline with recorded draws."""

    class Replay(owner):
        gumbel = None

        def _draws(self, run, step, revealed):
            if self.gumbel is None:
                return TextDraws(revealed=revealed)
            return TextDraws(revealed=revealed, gumbel=self.gumbel[run.calls][:, : run.stop - run.prompt_length])

    return Replay


@cache
def pipe_of(name):
    model = model_of(name)
    owner = replaying(LaViDaPipeline if name == "lavida" else LLaDAVPipeline)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FIXTURES / name / "model")
    pipe = owner(
        model.language_model, model.vision_tower, model.projector, MaskedTextScheduler(threshold=2.0), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_of(options):
    shift = options.get("schedule_kwargs", {}).get("shift", 3.0)
    return MaskedTextScheduler(threshold=2.0, **reveal_of(options.get("schedule"), shift))


def reveal_of(schedule, shift):
    """Settings of the scheduler for a published schedule."""
    known = {
        None: {"reveal": "even"},
        "shift": {"reveal": "shift", "shift": shift},
        "linear": {"reveal": "shift", "shift": 1.0},
    }
    return known.get(schedule, {"reveal": schedule})


def write(name):
    """The answer's tokens, and those after each step."""
    case, given = CASES[name], recorded(name, "in")
    options = case["options"]
    pipe = pipe_of(case["set"])
    pipe.scheduler = scheduler_of(options)
    pipe.gumbel = given.get("uniform_f64")
    new, block = options.get("gen_length", options.get("max_new_tokens")), options["block_length"]
    if "steps" in options:
        steps = options["steps"] // (new // block)
    else:
        steps = int(min(options.get("step_per_block") or block, block) * options.get("step_ratio", 1.0))
    history, remasking = [], options.get("remasking")
    with settings_of(case["set"], options["picture"]):
        output = pipe(
            picture(case["set"], options["picture"]), input_ids=given["prompt_ids"].reshape(1, -1).tolist(),
            gen_length=new, block_length=block, num_inference_steps=steps, temperature=options["temperature"],
            guidance_scale=options.get("cfg_scale", 0.0) + 1, cache="prompt" if options.get("prefix_lm") else None,
            remasking=REMASKING.get(remasking, remasking), stop_strings=options.get("stop") or (),
            suffix=options.get("generation_suffix"), draft=given.get("draft_tokens"), eos_early_stop=False,
            allow_mask_token=True,
            callback_on_step_end=lambda pipe, step, timestep, given: history.append(given["answer"].clone()),
            callback_on_step_end_tensor_inputs=["answer"],
        )  # fmt: skip
    return output.sequences, history


@pytest.mark.parametrize("name", named("generate"))
def test_answers(name):
    tokens, history = write(name)
    options, want = CASES[name]["options"], recorded(name, "out")
    kept = want["tokens"].shape[1]  # it is cut before a stop string
    assert torch.equal(tokens[:, :kept], want["tokens"])
    assert (tokens[:, kept:] == CASES[name]["meta"]["special_ids"]["eos"]).all()
    assert len(history) + bool(options.get("prefix_lm")) == options["forwards"]
    if "history" in want:
        assert torch.equal(torch.cat(history), want["history"])
    if "transfer_counts" in want:
        masks = [int((grid == CASES[name]["meta"]["special_ids"]["mask"]).sum()) for grid in history]
        first = options["gen_length"]
        revealed = [before - after for before, after in zip([first, *masks], masks)]
        assert revealed == want["transfer_counts"].flatten().tolist()


@pytest.mark.parametrize("name", named("schedule"))
def test_counts(name):
    options = CASES[name]["options"]
    scheduler = MaskedTextScheduler(**reveal_of(options["schedule"], options["shift"] or options["default_shift"]))
    scheduler.set_timesteps(options["steps"])
    want = recorded(name, "out")["counts"].tolist()
    counts = scheduler.counts(options["masked"]).tolist()
    assert counts[: len(want)] == want and not any(counts[len(want) :])


def unrotated(keys, theta=500000.0):
    """Keys (B, H, L, D) without the rotation of places 0 to L - 1."""
    size = keys.shape[-1]
    angles = torch.arange(keys.shape[2])[:, None] / theta ** (torch.arange(0, size, 2) / size)
    angles = torch.cat([angles, angles], 1)
    return keys * angles.cos() - rotate_half(keys) * angles.sin()


@pytest.mark.parametrize("name", named("prefix"))
def test_prefix(name):
    case, want = CASES[name], recorded(name, "out")
    tolerance = case["meta"]["tolerances"]["prefix"]
    model, embeds = model_of(case["set"]).language_model, recorded(name, "in")["inputs_embeds"]
    rows, length = embeds.shape[:2]
    prefix = case["options"]["prefix"]
    masks = {
        "full": None,
        "masked": sees_prefix(torch.full((rows,), prefix), length),
        "ragged": sees_prefix(torch.tensor(case["options"]["prefix_lengths"]), length),
    }
    with torch.no_grad():
        for key, mask in masks.items():
            assert_near(model(inputs_embeds=embeds, attention_mask=mask).logits, want[key], tolerance)
        everywhere = torch.ones(rows, length, dtype=torch.bool)
        passes = BlockPasses(
            model, "prompt", None, 1.0, ~everywhere, 0, images=ImageVectors(embeds, everywhere), prompt_length=prefix
        )
        passes.begin(prefix, length)
        for _ in range(2):  # the second pass reads what the first one kept
            assert_near(passes(torch.zeros(rows, length, dtype=torch.long)), want["cached"], tolerance)
    layers = passes.cache.layers
    assert_near(unrotated(layers[0].keys), want["key_layer0"], tolerance)
    assert_near(layers[1].values, want["value_layer1"], tolerance)
