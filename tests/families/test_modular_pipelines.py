"""`OmniControl` on modular pipelines of diffusers: attached to their transformer, counting their steps."""

import pytest
import tiny_krea2
import tiny_z_image
import torch
from diffusers import ClassifierFreeGuidance, Krea2AutoBlocks, ZImageAutoBlocks
from tiny_control import image, quiet
from tiny_families import differs, loaded, near, passes

from imgdit import Condition, OmniControl
from imgdit.sae.hooks import hooked

BLOCKS = {"Krea 2": Krea2AutoBlocks, "Z-Image": ZImageAutoBlocks}
CASES = {**tiny_krea2.CASES, **tiny_z_image.CASES}


def modular(name):
    plain, blocks = CASES[name].pipeline(), BLOCKS[name]()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=plain.transformer, vae=plain.vae, scheduler=plain.scheduler)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    return quiet(pipe)


def run(case, pipe):
    given = {name: value for name, value in case.prompts(1).items() if name != "guidance_scale"}
    generator = torch.Generator().manual_seed(5)
    return pipe(**given, height=16, width=16, num_inference_steps=3, generator=generator, output="latents")


@pytest.mark.parametrize("name", BLOCKS)
def test_conditions_act_in_their_steps(name, tmp_path):
    case, pipe = CASES[name], modular(name)
    plain = run(case, pipe)
    control = loaded(case, pipe, tmp_path)
    found, riding = passes(case, control, [Condition(image(), "canny", start=0.3, end=0.7)], run=run)
    assert len(found) == 6  # two calls in a step, for the prompt and the negative one
    for number, (given, out) in enumerate(found):
        near(out, case.dense(control.transformer, given, riding if number // 2 == 1 else ()))
    with control.use(Condition(image(), "canny"), mode="independent"):
        differs(run(case, pipe), plain)
    control.remove()
    assert torch.equal(run(case, pipe), plain)


@pytest.mark.parametrize("name", BLOCKS)
def test_activations_tell_the_negative_prompts_call(name):
    case, pipe, calls = CASES[name], modular(name), []
    with hooked(pipe, {f"transformer.{case.hookpoints[0]}": lambda tokens: calls.append(tokens.call)}):
        run(case, pipe)
    assert [call.conditional for call in calls] == [slice(0, 1), None] * 3
    assert [call.unconditional for call in calls] == [None, slice(0, 1)] * 3


def test_a_pipeline_without_its_models_is_refused():
    pipe = Krea2AutoBlocks().init_pipeline()
    with pytest.raises(ValueError, match=r"Krea2ModularPipeline without transformer and vae; load it by load_comp"):
        OmniControl(pipe)
