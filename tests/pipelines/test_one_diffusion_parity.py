"""OneDiffusionPipeline on the recorded tiny folder, in the published layout, against the reference's numbers."""

import json

import pytest
import torch
from onediffusion_fixtures import TINY, assert_near, case, named, tensors

import imgdit
from imgdit import MultiFrameFlowMatchScheduler, NextDiT, OneDiffusionPipeline
from imgdit.cameras import orbit_cameras
from imgdit.models.functional import pack
from imgdit.tasks import frames_of_mask

RAY_SCALE = 1.658  # the reference returns its latents divided by it


@pytest.fixture(scope="module")
def pipe() -> OneDiffusionPipeline:
    pipe = OneDiffusionPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_published_layout_loads():
    """It has no entry for the transformer."""
    assert "transformer" not in json.loads((TINY / "model_index.json").read_text())
    for cls in (OneDiffusionPipeline, imgdit.DiffusionPipeline):
        pipe = cls.from_pretrained(TINY, torch_dtype=torch.bfloat16)
        assert type(pipe) is OneDiffusionPipeline and type(pipe.transformer) is NextDiT
        assert pipe.transformer.dtype == torch.bfloat16
        assert type(pipe.scheduler) is MultiFrameFlowMatchScheduler and pipe.scheduler.config.use_dynamic_shifting


@pytest.mark.parametrize("name", named("schedule"))
def test_schedules_are_the_recorded_ones(pipe, name):
    it = case(name)
    options, want = it["options"], tensors(it, "outputs")
    changes = {"use_dynamic_shifting": options["scheduler"]["dynamic"]}
    if "shift" in options["scheduler"]:
        changes["shift"] = options["scheduler"]["shift"]
    scheduler = MultiFrameFlowMatchScheduler.from_config(pipe.scheduler.config, **changes)
    for i, row in enumerate(options["rows"]):
        tokens = row["noise_scale"] * row["denoised_frames"] * row["latent_h"] * row["latent_w"] / row["patch"] ** 2
        assert tokens == row["tokens"]
        mu = scheduler.mu(tokens)
        if mu is not None:
            assert mu == pytest.approx(row["mu"], abs=1e-6)
        steps = row["steps"]
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
        assert_near(scheduler.timesteps, want[f"timesteps{i}"], 1e-5, "timesteps")
        assert_near(scheduler.sigmas, want[f"sigmas{i}"], 1e-5, "sigmas")
        assert float(scheduler.timesteps[-1]) == pytest.approx(row["condition_timestep"], rel=1e-5)


@pytest.mark.parametrize("name", named("text"))
def test_texts_are_the_recorded_ones(pipe, name):
    it = case(name)
    options, given, want = it["options"], tensors(it, "inputs"), tensors(it, "outputs")["prompt_embeds"]
    with torch.no_grad():
        positive, negative, _, _, mask, negative_mask = pipe.encode_prompt(
            options["prompts"], options["negative_prompts"], max_sequence_length=options["max_length"]
        )
    rows = [(negative, negative_mask), (positive, mask)]
    got = [(x[i], m[i]) for x, m in rows for i in range(2)]
    for (embeds, real), recorded, attention in zip(got, want, given["attention_mask"].bool(), strict=True):
        assert_near(embeds[real], recorded[attention], 5e-5, "prompt_embeds")


def call(pipe, it, **changes):
    """The pipeline's raw call of a case, and what its steps saw."""
    options = it["options"]
    arguments = {
        name: options[name]
        for name in ("prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale")
    }
    given = tensors(it, "inputs")
    if "denoise_mask" in options:
        arguments["denoise_mask"] = options["denoise_mask"]
        images = [given[f"image{i}"].numpy() for i in range(9) if f"image{i}" in given]
        arguments["images"] = images or None
    if options.get("is_multiview"):
        cameras = orbit_cameras(
            options["multiview_azimuths"], options["multiview_elevations"], options["multiview_distances"]
        )
        # As many as there are places for: None entries of the reference's lists are left out.
        arguments["cameras"] = list(cameras)
    steps, calls = [], []

    def keep(pipe, step, timestep, state):
        steps.append(state["latents"].clone())
        return {}

    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        output = pipe(**{**arguments, **changes}, callback_on_step_end=keep, output_type="np")
    finally:
        hook.remove()
    return output, torch.stack(steps), calls


def check(pipe, it, output, steps, calls):
    want = tensors(it, "outputs")
    mask = it["options"].get("denoise_mask", [1])
    made = [i for i, m in enumerate(mask) if m]
    assert_near(pipe.scheduler.timesteps, want["timesteps"], 1e-5, "timesteps")
    assert_near(pipe.scheduler.sigmas, want["sigmas"], 1e-5, "sigmas")
    recorded = want["latents_per_step"]
    assert_near(steps, recorded if recorded.ndim == 6 else recorded[:, :, None], 2e-4, "latents_per_step")
    if "latents_returned" in want:
        assert_near(output.latents / RAY_SCALE, want["latents_returned"], 2e-4, "latents_returned")
    first = pack(want["model_output_step0"][:, made].flatten(0, 1), 2)
    assert_near(calls[0][1], first.view(len(calls[0][1]), -1, first.shape[-1]), 5e-5, "model_output_step0")
    if "latents_step0_input" in want:
        tokens = pack(want["latents_step0_input"].flatten(0, 1), 2)
        copies = len(calls[0][1])
        assert_near(calls[0][0]["hidden_states"], tokens.view(1, -1, 64).repeat(copies, 1, 1), 5e-5, "step0_input")
    if "frame_timesteps_per_step" in want:
        for (kwargs, _), levels in zip(calls, want["frame_timesteps_per_step"], strict=True):
            held = [None if f.sigma is None else f.sigma * 1000 for f in kwargs["layout"].frames]
            assert_near(kwargs["layout"].expand(kwargs["timestep"], held)[0], levels, 1e-5, "frame_timesteps")
    for name in ("image", "images"):
        if name in want:
            assert_near(torch.as_tensor(output.images), want[name], 5e-4, name)


def text_of(it) -> dict:
    """The recorded text as the call's arguments; negative rows stand first."""
    given = tensors(it, "inputs")
    embeds, mask = given["encoder_hidden_states"], given["encoder_attention_mask"].bool()
    arguments = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": embeds[-1:],
        "prompt_embeds_mask": mask[-1:],
    }
    if len(embeds) > 1:
        arguments |= {"negative_prompt_embeds": embeds[:1], "negative_prompt_embeds_mask": mask[:1]}
    return arguments


@pytest.mark.parametrize("name", named("t2i", "img2img", "multiview"))
def test_runs_from_the_seed_are_the_recorded_ones(pipe, name):
    it = case(name)
    check(pipe, it, *call(pipe, it, generator=torch.Generator().manual_seed(it["options"]["seed"])))


@pytest.mark.parametrize("name", named("t2i", "img2img", "multiview"))
def test_runs_from_given_tensors_are_the_recorded_ones(pipe, name):
    it = case(name)
    given = tensors(it, "inputs")
    changes = text_of(it) | {"latents": given["latents"] if "latents" in given else given["noise"]}
    if "denoise_mask" in it["options"]:
        changes |= {"task": "views"} if it["options"].get("is_multiview") else {"task": "identity"}
        if "condition_latents" in given:
            changes["images"] = list(given["condition_latents"][0])
        if not it["options"].get("is_multiview"):  # the text says the task; the frames' kinds do not matter
            changes |= {"frames": frames_of_mask(it["options"]["denoise_mask"], changes.pop("images"))}
            changes |= {"denoise_mask": None, "images": None}
    check(pipe, it, *call(pipe, it, **changes))


def test_pose_is_read_from_the_made_rays(pipe):
    it = case("mv_pose_estimation")
    output, *_ = call(pipe, it, generator=torch.Generator().manual_seed(it["options"]["seed"]))
    assert output.cameras.shape == (1, 2, 4, 4)
    assert torch.allclose(output.cameras[0, 0], torch.eye(4), atol=1e-4)
    assert len(output.images) == 0 and output.maps is None  # rays are no images
