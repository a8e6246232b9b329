"""Pipelines of ours under diffusers' flow-matching schedulers."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from onediffusion_fixtures import TINY
from tiny import rope_config, tiny_mmdit, tiny_pipeline
from tiny_control import flux, quiet

import imgdit
from imgdit import MMDiT, MultiFrameFlowMatchScheduler
from imgdit.pipelines.text_to_image import pack, unpack

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def one_diffusion():
    pipe = quiet(imgdit.OneDiffusionPipeline.from_pretrained(TINY))
    pipe.register_modules(transformer=tiny_mmdit(rope_config(in_channels=64)))
    pipe.scheduler = MultiFrameFlowMatchScheduler(shift=2.0)
    return pipe


def text_to_image():
    return tiny_pipeline(shift=2.0)


@pytest.fixture(params=[text_to_image, one_diffusion], ids=["text to image", "one diffusion"])
def pipe(request):
    return request.param()


def run(pipe, steps=4, **options):
    out = pipe(
        ["a red cube", "a cone"], height=16, width=16, num_inference_steps=steps, output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in range(2)], **options,
    )  # fmt: skip
    return out.images


@pytest.mark.parametrize("options", [{}, {"use_dynamic_shifting": True}, {"stochastic_sampling": True}])
def test_eulers_of_diffusers_and_ours_make_one_image(pipe, options):
    made = []
    for kind in (MultiFrameFlowMatchScheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = kind(shift=2.0, **options)
        made.append(run(pipe))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("kind", "options", "predictions"),
    [
        (FlowMatchHeunDiscreteScheduler, {}, 7),
        (FlowMatchLCMScheduler, {}, 4),
        (UniPCMultistepScheduler, FLOW, 4),
        (DPMSolverMultistepScheduler, FLOW, 4),
    ],
)
def test_swapped_as_everybody_does(pipe, kind, options, predictions):
    """`pipe.scheduler = Kind.from_config(pipe.scheduler.config)`: as many predictions as it takes, at its levels, and
    near the same image where nothing is drawn."""
    expected = run(pipe, steps=40)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    levels = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, named: levels.append(float(named["timestep"].flatten()[0])), with_kwargs=True
    )
    run(pipe)
    handle.remove()
    assert len(levels) == predictions == pipe.num_timesteps
    scale = 1000 / pipe.transformer.config.timestep_scale
    for level, sigma in zip(levels, pipe.scheduler.sigmas.tolist()):
        assert level == pytest.approx(scale * sigma, abs=scale / 1000)
    if kind is not FlowMatchLCMScheduler:
        made = run(pipe, steps=40)
        assert (made - expected).norm() / expected.norm() < 0.05


def test_what_is_no_flow_matching_is_refused_before_anything(pipe):
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    with pytest.raises(
        ValueError, match=r"EulerDiscreteScheduler .* no flow-matching .* These work: .*UniPCMultistep"
    ):
        run(pipe)


def test_rising_noise_levels_are_refused(pipe):
    with pytest.raises(ValueError, match=r"sigmas are noise levels that fall .* got \[0\.25, 0\.5, 1\.0\]"):
        run(pipe, sigmas=[0.25, 0.5, 1.0])
    assert torch.equal(run(pipe, sigmas=[1.0, 0.75, 0.5, 0.25]), run(pipe))


@pytest.mark.parametrize("kind", [FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler])
def test_one_diffusion_keeps_the_scheduler_it_is_made_with(kind):
    scheduler = kind(**(FLOW if kind is UniPCMultistepScheduler else {}))
    pipe = imgdit.OneDiffusionPipeline(**{**one_diffusion().components, "scheduler": scheduler})
    assert pipe.scheduler is scheduler


def test_true_guidance_of_a_distilled_model_is_fluxs():
    """A negative prompt and `true_cfg_scale`: two predictions, each with the guidance scale as an input."""
    theirs = flux(guidance_embeds=True)
    ours = tiny_pipeline()
    ours.register_modules(transformer=MMDiT.from_diffusers(theirs.transformer))
    ours.scheduler = theirs.scheduler
    generator = torch.Generator().manual_seed(3)
    texts = {
        f"{kind}{name}": torch.randn(2, *shape, generator=generator)
        for kind in ("", "negative_")
        for name, shape in (("prompt_embeds", (5, 32)), ("pooled_prompt_embeds", (32,)))
    }
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    options = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.5}
    made = {}
    for scale in (1.0, 3.0):
        own = texts if scale > 1 else {name: texts[name] for name in texts if not name.startswith("negative")}
        expected = theirs(**texts, **options, latents=pack(noise, 2), true_cfg_scale=scale).images
        made[scale] = ours(**own, **options, latents=noise, true_cfg_scale=scale).images
        torch.testing.assert_close(made[scale], unpack(expected, 2, (4, 4)), atol=1e-4, rtol=1e-4)
    assert (made[3.0] - made[1.0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, {"true_cfg_scale": 2.0}, "this model is guided by guidance_scale; leave out true_cfg_scale=2.0"),
        (rope_config(guidance_embeds=True), {"true_cfg_scale": 2.0}, "give negative_prompt, which may be empty"),
        (rope_config(guidance_embeds=True), {"negative_prompt": "sketch"}, "no use for a negative prompt, unless"),
    ],
)
def test_guidance_that_would_do_nothing_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_pipeline(config), **options)


def test_defaults_of_the_embedded_model():
    """28 steps and guidance 3 in both pipelines over an `MMDiT`; OneDiffusion's published ones over its `NextDiT`."""
    for pipe, steps, scale in ((text_to_image(), 28, 3.0), (one_diffusion(), 28, 3.0)):
        pipe("a cone", height=16, width=16, output_type="latent")
        assert (pipe.num_timesteps, pipe.guidance_scale) == (steps, scale)
    published = quiet(imgdit.OneDiffusionPipeline.from_pretrained(TINY))
    published("a cone", height=16, width=16, output_type="latent")
    assert (published.num_timesteps, published.guidance_scale) == (50, 4.0)
