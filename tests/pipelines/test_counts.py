"""Lists of generators, texts and latents that do not fit the batch: one prompt in every pipeline of ours."""

import numpy as np
import pytest
import torch
from onediffusion_fixtures import TINY
from tiny import rope_config, tiny_mmdit, tiny_pipeline
from tiny_control import flux, sd3, with_texts

import imgdit
from imgdit import ImageFrame
from imgdit.cameras import orbit_cameras

SIZE = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}


def one_diffusion(backbone="nextdit"):
    pipe = imgdit.OneDiffusionPipeline.from_pretrained(TINY)
    if backbone == "mmdit":
        pipe.register_modules(transformer=tiny_mmdit(rope_config(in_channels=64)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {
    "imgdit": tiny_pipeline,
    "one diffusion": one_diffusion,
    "flux": lambda: imgdit.FluxOmniControlPipeline.from_pipe(with_texts(flux())),
    "sd3": lambda: imgdit.StableDiffusion3OmniControlPipeline.from_pipe(with_texts(sd3())),
}
NOISE = {"imgdit": (4, 8, 8), "one diffusion": (1, 16, 2, 2), "flux": (16, 16), "sd3": (4, 8, 8)}
"""Shape of one sample's starting noise, at 16x16 pixels."""


@pytest.fixture(params=PIPELINES)
def named(request):
    pipe = PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


def seeds(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_other_counts_than_the_batch(named):
    name, pipe = named
    prompts = ["a red cube", "a blue cone"]
    for count in (1, 3, 5):
        with pytest.raises(
            ValueError, match=rf"got {count} generators for 4 (images|scenes); give one, or one for each"
        ):
            pipe(prompts, generator=seeds(count), num_images_per_prompt=2, **SIZE)
    for negative in (["a", "b", "c"], ("a", "b", "c"), ["a"]):
        with pytest.raises(ValueError, match=f"got {len(negative)} negative prompts for 2 prompts"):
            pipe(prompts, negative_prompt=negative, **SIZE)
    with pytest.raises(ValueError, match=r"generator must be a torch.Generator or a list of them, got int 0"):
        pipe(prompts, generator=0, **SIZE)
    for side in ("height", "width"):
        with pytest.raises(ValueError, match=r"pixels, got (0|16x0)"):
            pipe(prompts, **{**SIZE, side: 0})
    if name == "sd3":
        with pytest.raises(ValueError, match="got 3 negative_prompt_3 for 2 prompts"):
            pipe(prompts, negative_prompt="x", negative_prompt_3=["a", "b", "c"], **SIZE)


def test_starting_noise_of_another_kind(named):
    name, pipe = named
    shape = (2, *NOISE[name])
    noise = torch.randn(shape)
    assert torch.isfinite(torch.as_tensor(pipe(["a cube", "a cone"], latents=noise.double(), **SIZE)[0])).all()
    for latents, message in (
        (noise[:1], r"latents must be \(2, .* got \(1, "),
        (noise[..., :1], r"latents must be \(2, "),
        (noise.to(torch.uint8), "must be floating-point numbers, .* got torch.uint8"),
        (noise.to("meta"), "on the device 'meta'"),
        (np.zeros(shape), "latents must be a tensor .* got ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(["a cube", "a cone"], latents=latents, **SIZE)


def test_tuples_count_as_lists(named):
    name, pipe = named
    options = {**SIZE, "negative_prompt": ("a cone", "a cube")}
    if name == "flux":
        options["true_cfg_scale"] = 2.0
    latents = torch.randn(2, *NOISE[name])
    by_tuple = pipe(["a cube", "a red cone"], latents=latents, **options)[0]
    options["negative_prompt"] = list(options["negative_prompt"])
    assert torch.equal(by_tuple, pipe(["a cube", "a red cone"], latents=latents, **options)[0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"prompt": None, "pooled_prompt_embeds": torch.zeros(3, 32)}, r"pooled_prompt_embeds must be \(2, 32\), got"),
        ({"negative_prompt_embeds": torch.zeros(3, 5, 32)}, r"negative_prompt_embeds must be \(2, tokens, 32\), got"),
        ({"negative_pooled_prompt_embeds": torch.zeros(1, 32)}, r"negative_pooled_prompt_embeds must be \(2, 32\)"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale is one number for all images, got list"),
        ({"height": 0}, "multiples of"),
        ({"width": 0}, "multiples of"),
        ({"height": 16.0}, "whole number of pixels, got 16.0"),
    ],
)
@pytest.mark.parametrize("make", [tiny_pipeline, one_diffusion], ids=["imgdit", "one diffusion"])
def test_other_misfits_are_told_by_both(make, texts, message):
    call = {"prompt": ["a cube", "a cone"], **SIZE, **texts}
    if call["prompt"] is None:
        call["prompt_embeds"] = torch.zeros(2, 5, 32)
    with pytest.raises(ValueError, match=message):
        make()(**call)


def latents_of(count, *first):
    return torch.randn(count, *first, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("backbone", ["nextdit", "mmdit"])
@pytest.mark.parametrize("given", ["per prompt", "per scene", "one", "cameras"])
def test_given_latents_with_a_generator_per_scene(backbone, given):
    """Each scene is what it would be alone, with its prompt's or its own latents."""
    pipe = one_diffusion(backbone)
    prompts, samples = ["a cat", "a dog on the table"], 4
    options = {
        "num_images_per_prompt": 2,
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    if given == "cameras":
        cameras = orbit_cameras([0.0, 30.0], [0.0, 10.0])
        frames = [ImageFrame.generate(), ImageFrame.clean(cameras, "rays")]
        alone = [[ImageFrame.generate(), ImageFrame.clean(cameras[i // 2], "rays")] for i in range(samples)]
    else:
        count = {"per prompt": 2, "per scene": samples, "one": 1}[given]
        content = latents_of(count, 16, 4, 4)
        frames = [ImageFrame.generate(), ImageFrame.clean(content, "depth")]
        alone = [
            [ImageFrame.generate(), ImageFrame.clean(content[i * count // samples], "depth")] for i in range(samples)
        ]
    out = pipe(prompts, frames=frames, generator=seeds(samples), **options).latents
    for i in range(samples):
        options["num_images_per_prompt"] = 1
        single = pipe(prompts[i // 2], frames=alone[i], generator=seeds(samples)[i], **options).latents
        torch.testing.assert_close(out[i : i + 1], single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (torch.zeros(3, 16, 4, 4), "depth", r"frame 1 is given as 3 latent grids for 2 prompt\(s\)"),
        (torch.eye(4).expand(3, 4, 4), "rays", r"frame 1 is given as 3 cameras for 2 prompt\(s\)"),
    ],
)
@pytest.mark.parametrize("generators", [1, 2])
def test_given_frames_of_another_number(content, kind, message, generators):
    frames = [ImageFrame.generate(), ImageFrame.clean(content, kind)]
    generator = seeds(2) if generators == 2 else None
    with pytest.raises(ValueError, match=message):
        one_diffusion()(["a cat", "a dog"], frames=frames, height=32, width=32, generator=generator)
