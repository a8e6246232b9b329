"""A run that begins at an image under noise: how many steps are left, where it begins, and what is refused."""

import math
from types import SimpleNamespace

import diffusers
import PIL.Image
import pytest
import torch
from tiny import tiny_pipeline

import imgdit
from imgdit.images.fitting import fit_pixels
from imgdit.images.latents import encode_images
from imgdit.pipelines.image_to_image import late_start
from imgdit.schedulers.schedule import set_schedule


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def photo(seed=0, size=(24, 16)):
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(*reversed(size), 3, generator=generator) * 255).byte().numpy()
    return PIL.Image.fromarray(pixels)


def run(pipe, prompt="a red cube", seed=0, **kwargs):
    options = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipe(prompt, **{**options, **kwargs}).images


@torch.no_grad()
def latents_of(pipe, image):
    return encode_images(pipe.vae, fit_pixels(image, (16, 16)) * 2 - 1)


def test_at_full_strength_nothing_is_left_of_the_image(pipe):
    assert torch.equal(run(pipe, image=photo(), strength=1.0), run(pipe))


def test_it_is_the_rest_of_the_schedule_from_the_image_under_the_seeds_noise(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append(float(timestep))
        return {}

    got = run(pipe, image=photo(), strength=0.5, callback_on_step_end=watch)
    whole = set_schedule(pipe.scheduler, 4, None, 16)
    assert seen == whole[2:].tolist()
    sigma = float(pipe.scheduler.sigmas[2])
    start = (1 - sigma) * latents_of(pipe, photo()) + sigma * noise
    expected = run(pipe, latents=start, sigmas=[0.5, 0.25], generator=None)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_the_weaker_the_nearer_to_the_image(pipe):
    image = latents_of(pipe, photo())
    far = [
        float((run(pipe, image=photo(), strength=s, num_inference_steps=20) - image).norm()) for s in (0.05, 0.5, 1)
    ]
    assert far == sorted(far) and far[0] < 0.2 * far[2]


def test_images_of_prompts_and_samples(pipe):
    images = [photo(0), photo(1)]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    both = run(pipe, ["a cube", "a cone"], image=images, num_images_per_prompt=2, generator=generators)
    for row, (prompt, image) in enumerate(zip(["a cube", "a cube", "a cone", "a cone"], [0, 0, 1, 1])):
        alone = run(pipe, prompt, seed=row, image=images[image])
        torch.testing.assert_close(both[row : row + 1], alone, atol=2e-5, rtol=2e-5)
    array = torch.cat([fit_pixels(one, (16, 16)) for one in images])
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    again = run(pipe, ["a cube", "a cone"], image=array, num_images_per_prompt=2, generator=generators)
    torch.testing.assert_close(again, both, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 4, 10, 28])
@pytest.mark.parametrize("strength", [0.01, 0.25, 0.3, 0.6, 0.75, 1.0])
def test_as_many_steps_are_left_as_in_diffusers(pipe, steps, strength):
    timesteps = set_schedule(pipe.scheduler, steps, None, 16)
    theirs = diffusers.FluxImg2ImgPipeline.get_timesteps
    expected, left = theirs(SimpleNamespace(scheduler=pipe.scheduler), steps, strength, "cpu")
    found, sigma = late_start(pipe.scheduler, timesteps, strength)
    assert torch.equal(found, expected) and len(found) == left >= 1
    assert math.isclose(sigma, float(expected[0]) / 1000, rel_tol=1e-5)


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_other_schedulers(name):
    pipe = tiny_pipeline()
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name.startswith("Uni") else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **flow)
    image = latents_of(pipe, photo())
    near, far = (run(pipe, image=photo(), strength=s, num_inference_steps=20) - image for s in (0.05, 1.0))
    assert float(near.norm()) < 0.2 * float(far.norm())
    full = run(pipe, image=photo(), strength=1.0)  # diffusers' solvers begin a little below 1
    torch.testing.assert_close(full, run(pipe), atol=1e-3, rtol=1e-3)


def test_diffusers_finds_it_by_its_task(pipe):
    again = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(again) is imgdit.ImgDiTPipeline
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, image=photo()), run(pipe, image=photo()))


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), "much", None, True])
def test_other_strengths_are_refused(pipe, strength):
    with pytest.raises(ValueError, match=r"strength must be above 0 and at most 1, .* got"):
        run(pipe, image=photo(), strength=strength)


def test_other_images_are_refused(pipe):
    with pytest.raises(ValueError, match=r"image holds 3 images for 1 prompt\(s\) and 2 sample\(s\)"):
        run(pipe, image=[photo()] * 3, num_images_per_prompt=2)
    with pytest.raises(ValueError, match="image is an empty list"):
        run(pipe, image=[])
    with pytest.raises(ValueError, match="is a PIL image, an array or a tensor, got str"):
        run(pipe, image="photo.png")
