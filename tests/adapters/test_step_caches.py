"""diffusers' step caches beside conditions: nothing skipped is the identity, something skipped has an effect, removed
all is as before; what a cache cannot do is refused."""

import pytest
import torch
from diffusers import FasterCacheConfig, TaylorSeerCacheConfig, TextKVCacheConfig
from onediffusion_fixtures import TINY
from tiny import rope_config, tiny_mmdit, tiny_pipeline
from tiny_caches import STEP_CACHES, STEPS
from tiny_control import flux, image, lora_file
from tiny_control import make as make_flux
from tiny_images import image as drawn

from imgdit import Condition, ImageFrame, OmniControl, OneDiffusionPipeline
from imgdit.lora.files import AdapterInfo

MODES = pytest.mark.parametrize("mode", ["joint", "independent"])


def make(pipe, conditions):
    call = {"prompt": "a red cube", "height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(**call, conditions=conditions, generator=torch.Generator().manual_seed(3)).images


def check(transformer, configs, call):
    plain = call()
    nothing, something = configs
    for config, changes in ((nothing, False), (something, True)):
        transformer.enable_cache(config)
        first, second = call(), call()
        transformer.disable_cache()
        assert torch.equal(first, second), "a second run starts afresh"
        assert ((first - plain).abs().max() > 1e-5) == changes
    assert torch.equal(call(), plain)


@MODES
@pytest.mark.parametrize("cache", STEP_CACHES)
def test_with_conditions_of_our_pipeline(cache, mode, tmp_path):
    pipe = tiny_pipeline()
    file = lora_file(tmp_path / "own.safetensors", pipe.transformer, info=AdapterInfo(mode=mode))
    pipe.load_control(file, adapter_name="own")
    conditions = [Condition(image(), "own", end=0.7)]
    check(pipe.transformer, STEP_CACHES[cache](pipe), lambda: make(pipe, conditions))


@MODES
@pytest.mark.parametrize("cache", STEP_CACHES)
def test_with_conditions_of_a_diffusers_pipeline(cache, mode, tmp_path):
    pipe = flux()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer))

    def call():
        pipe.transformer._reset_stateful_cache()  # this pipeline leaves it to the caller
        with control.use([Condition(image(), "canny", end=0.7)], mode=mode):
            return make_flux(pipe, num_inference_steps=STEPS)

    check(pipe.transformer, STEP_CACHES[cache](pipe), call)


@pytest.mark.parametrize("cache", STEP_CACHES)
def test_with_given_frames_that_see_only_themselves(cache):
    components = {**tiny_pipeline().components, "transformer": tiny_mmdit(rope_config(num_layers=1))}
    pipe = OneDiffusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    frames = [ImageFrame.generate(), ImageFrame.clean(drawn(0, (16, 16)), "depth", sees="self")]

    def call():
        options = {"frames": frames, "height": 16, "width": 16, "num_inference_steps": STEPS}
        return pipe("a red cube", generator=torch.Generator().manual_seed(0), output_type="latent", **options).images

    check(pipe.transformer, STEP_CACHES[cache](pipe), call)


TAYLOR = {"cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1}


def next_dit():
    pipe = OneDiffusionPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_any(pipe):
    call = {"height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe("a cat", frames=[ImageFrame.generate()], generator=torch.Generator().manual_seed(0), **call).latents


FIND_NOTHING = {
    "text keys": (tiny_pipeline, lambda pipe: TextKVCacheConfig()),
    "text keys of NextDiT": (next_dit, lambda pipe: TextKVCacheConfig()),
    "taylor lite": (next_dit, lambda pipe: TaylorSeerCacheConfig(**TAYLOR, use_lite_mode=True)),
    "taylor of other names": (
        tiny_pipeline,
        lambda pipe: TaylorSeerCacheConfig(**TAYLOR, cache_identifiers=["blocks"]),
    ),
}


@pytest.mark.parametrize("case", FIND_NOTHING)
def test_a_cache_that_finds_nothing_is_refused(case):
    build, config = FIND_NOTHING[case]
    model = (pipe := build()).transformer
    with pytest.raises(ValueError, match=rf"found nothing in {type(model).__name__}.*FirstBlockCacheConfig"):
        model.enable_cache(config(pipe))
    assert not model.is_cache_enabled
    assert not any(getattr(part, "_diffusers_hook", None) and part._diffusers_hook.hooks for part in model.modules())


def test_faster_cache_finds_the_attentions_of_next_dit():
    """Where guidance is distilled; otherwise it splits a batch whose parts are named as in diffusers' models."""
    pipe = next_dit()

    def config(within):
        return FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=within,
            current_timestep_callback=lambda: pipe.current_timestep,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
            is_guidance_distilled=True,
        )

    check(pipe.transformer, (config((-2, -1)), config((-1, 901))), lambda: make_any(pipe))


@pytest.mark.parametrize("names", [None, [r"layers\.\d+\.attention"]])
def test_taylor_seer_finds_the_attentions_of_next_dit(names):
    pipe = next_dit()
    nothing = TaylorSeerCacheConfig(cache_interval=100, disable_cache_before_step=100, cache_identifiers=names)
    check(
        pipe.transformer, (nothing, TaylorSeerCacheConfig(**TAYLOR, cache_identifiers=names)), lambda: make_any(pipe)
    )
