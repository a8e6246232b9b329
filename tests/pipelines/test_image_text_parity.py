"""`ImageTextPipeline` against recorded runs of Dual Diffusion."""

import re

import numpy as np
import pytest
import torch
from dual_diffusion_cases import CASES, META, Replay, assert_near, named, pipeline, recorded

from imgdit.images.latents import decode_latents, scale_latents

TOLERANCES = META["tolerances"]


@pytest.mark.parametrize("name", named("text"))
@torch.no_grad()
def test_texts_are_read_as_recorded(name):
    options, (given, expected) = CASES[name]["options"], recorded(name)
    pipe, length = pipeline(), options["max_length"]
    assert pipe.mask_token_id == META["mask_id"]
    found = pipe.tokenizer(options["texts"], padding="max_length", max_length=length, return_tensors="pt").input_ids
    assert torch.equal(found, expected["input_ids"])
    embeds, _ = pipe._encode_text(options["texts"], length, torch.device("cpu"))
    assert_near(embeds, expected["embeds_clean"], TOLERANCES["text"])
    assert_near(pipe._embed(given["masked_ids"]), expected["embeds"], TOLERANCES["text"])


def check_writing(replay, found, expected, steps):
    """Tokens, and the grids that were read; the recorded code reads the finished grid once more."""
    assert torch.equal(found.sequences, expected["tokens"])
    distinct = [expected["states"][0]]
    distinct += [after for before, after in zip(expected["states"], expected["states"][1:]) if not before.equal(after)]
    masked = [state for state in distinct if (state == META["mask_id"]).any()]
    assert len(replay.states) == len(masked) and all(map(torch.equal, replay.states, masked))


@pytest.mark.parametrize("name", named("text_sample"))
def test_texts_are_written_as_recorded(name):
    options, (given, expected) = CASES[name]["options"], recorded(name)
    with Replay(given["uniform"]) as replay:
        replay.pipe.text_scheduler.register_to_config(eps=options["eps"])
        found = replay.pipe.complete(
            given["prompt_ids"], ~given["prompt_mask"], latents=given["latents"], num_inference_steps=options["steps"]
        )
    check_writing(replay, found, expected, options["steps"])


@pytest.mark.parametrize("name", named("t2i"))
@torch.no_grad()
def test_images_are_generated_as_recorded(name, monkeypatch):
    """The recorded schedule shifts its last noise level twice, which `sigmas` says; the default here does not."""
    options, (given, expected) = CASES[name]["options"], recorded(name)
    pipe, velocities, latents = pipeline(), [], []
    step = pipe.scheduler.step
    monkeypatch.setattr(
        pipe.scheduler, "step", lambda v, *args, **rest: velocities.append(v) or step(v, *args, **rest)
    )
    last = float(pipe.scheduler.sigma_min)

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"].clone())
        assert float(timestep) == pytest.approx(options["timesteps"][step], rel=1e-5)

    height, width = (side * META["vae_factor"] for side in given["latents"].shape[2:])
    found = pipe(
        options["prompts"], options["negative"], height, width, sigmas=np.linspace(1, last, options["steps"]).tolist(),
        guidance_scale=options["guidance_scale"], latents=given["latents"], max_sequence_length=options["max_length"],
        output_type="latent", callback_on_step_end=keep,
    ).images  # fmt: skip
    assert_near(torch.stack(velocities), expected["velocities"], TOLERANCES["t2i"]["velocities"])
    assert_near(torch.stack(latents), expected["latents_per_step"], TOLERANCES["t2i"]["latents"])
    assert_near(decode_latents(pipe.vae, found), expected["images"], TOLERANCES["t2i"]["images"])


@pytest.mark.parametrize("name", named("i2t"))
@torch.no_grad()
def test_images_are_read_and_described_as_recorded(name):
    """The recorded code draws latents, and keeps the end token behind a question; here neither is so by default."""
    options, (given, expected) = CASES[name]["options"], recorded(name)
    pipe, length = pipeline(), options["sequence_length"]
    pixels = pipe.preprocess_image(given["image"].numpy(), options["resolution"])
    assert_near(pixels, expected["pixel_values"], TOLERANCES["i2t"]["pixel_values"])
    posterior = pipe.vae.encode(pixels).latent_dist
    latents = scale_latents(pipe.vae, posterior.mean + posterior.std * given["posterior_noise"])
    assert_near(latents, expected["latents"], TOLERANCES["i2t"]["latents"])
    asked = [] if options["prompt"] is None else pipe.tokenizer(options["prompt"]).input_ids
    ids = torch.tensor([[*asked, *[META["mask_id"]] * (length - len(asked))]])
    holes = torch.arange(length)[None] >= len(asked)
    assert torch.equal(holes, ~expected["prompt_mask"])
    assert torch.equal(ids.masked_fill(holes, 0), expected["prompt_ids"].masked_fill(holes, 0))
    with Replay(given["uniform"]) as replay:
        replay.pipe.text_scheduler.register_to_config(eps=1e-5)
        found = replay.pipe.complete(ids, holes, latents=latents, num_inference_steps=options["steps"])
    assert torch.equal(found.sequences, expected["tokens"])
    # The recording's tokenizer did not take T5's sentinels for special tokens.
    text = pipe.tokenizer.batch_decode(found.sequences, skip_special_tokens=True)[0]
    assert text.split() == re.sub(r"<extra_id_\d+>", " ", options["text"]).split()
