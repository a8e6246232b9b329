"""diffusers' step caches beside conditions: nothing skipped is the identity, something skipped has an effect, removed
all is as before; what a cache cannot do is refused."""

import pytest
import torch
from tiny import rope_config, tiny_mmdit, tiny_pipeline
from tiny_caches import STEP_CACHES, STEPS
from tiny_control import flux, lora_file, picture
from tiny_control import make as make_flux
from tiny_pictures import picture as drawn

from imgdit import Condition, OmniControl, OneDiffusionPipeline, PictureFrame
from imgdit.lora_files import AdapterInfo

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
    conditions = [Condition(picture(), "own", end=0.7)]
    check(pipe.transformer, STEP_CACHES[cache](pipe), lambda: make(pipe, conditions))


@MODES
@pytest.mark.parametrize("cache", ["first block", "mag"])
def test_with_conditions_of_a_diffusers_pipeline(cache, mode, tmp_path):
    pipe = flux()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer))

    def call():
        pipe.transformer._reset_stateful_cache()  # this pipeline leaves it to the caller
        with control.use([Condition(picture(), "canny", end=0.7)], mode=mode):
            return make_flux(pipe, num_inference_steps=STEPS)

    check(pipe.transformer, STEP_CACHES[cache](pipe), call)


@pytest.mark.parametrize("cache", ["taylor", "pyramid"])
def test_a_cache_of_attentions_that_are_not_called_is_refused(cache, tmp_path):
    pipe = flux()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer))
    pipe.transformer.enable_cache(STEP_CACHES[cache](pipe)[1])
    with (
        pytest.raises(ValueError, match="enable FirstBlockCache or MagCache"),
        control.use([Condition(picture(), "canny")]),
    ):
        make_flux(pipe)
    make_flux(pipe)


@pytest.mark.parametrize("cache", STEP_CACHES)
def test_with_given_frames_that_see_only_themselves(cache):
    components = {**tiny_pipeline().components, "transformer": tiny_mmdit(rope_config(num_layers=1))}
    pipe = OneDiffusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    frames = [PictureFrame.make(), PictureFrame.given(drawn(0, (16, 16)), "depth", sees="self")]

    def call():
        options = {"frames": frames, "height": 16, "width": 16, "num_inference_steps": STEPS}
        return pipe("a red cube", generator=torch.Generator().manual_seed(0), output_type="latent", **options).images

    check(pipe.transformer, STEP_CACHES[cache](pipe), call)
