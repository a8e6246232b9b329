"""`ImgDiTPipeline(prompt, conditions=[…])`: identity, effect, caches, completion and refusals."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny import rope_config, sincos_config, tiny_pipeline
from tiny_control import SD3_TARGETS, image, lora_file

from imgdit import Condition
from imgdit.lora.files import AdapterInfo
from imgdit.models.functional import pack


@pytest.fixture(params=["rope", "sincos"])
def pipe(request, tmp_path):
    made = tiny_pipeline(rope_config() if request.param == "rope" else sincos_config(dual_attention_layers=(0,)))
    targets = {} if request.param == "rope" else {"targets": SD3_TARGETS}
    made.load_control(lora_file(tmp_path / "canny.safetensors", made.transformer, **targets))
    info = AdapterInfo(mode="independent")
    made.load_control(lora_file(tmp_path / "own.safetensors", made.transformer, seed=1, info=info, **targets))
    return made


def make(pipe, *conditions, seed=3, **changes):
    call = {"prompt": "a red cube", "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "latent"}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**call | changes, conditions=list(conditions), generator=generator).images


def same(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


def differs(a, b, least=1e-3):
    assert (a - b).abs().max() > least


def test_identity_effect_and_removal(pipe):
    plain = make(pipe)
    one = make(pipe, Condition(image(), "canny"))
    differs(one, plain)
    differs(make(pipe, Condition(image(1), "canny")), one)
    differs(make(pipe, Condition(image(), "canny"), guidance_scale=1.0), one)
    assert torch.equal(make(pipe, Condition(image(), "canny", strength=0.0)), plain)
    assert torch.equal(make(pipe, Condition(image(), "canny", end=0.0)), plain)
    for changes in ({"strength": 0.5}, {"position": "subject"}, {"start": 0.5}, {"mask": torch.eye(4)}):
        differs(make(pipe, Condition(image(), "canny", **changes)), one, 1e-4)
    assert torch.equal(make(pipe), plain)
    pipe.unload_lora_weights()
    same(make(pipe), plain)


def test_one_condition_needs_no_list(pipe):
    condition, generator = Condition(image(), "canny"), torch.Generator().manual_seed(3)
    call = {"prompt": "a red cube", "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "latent"}
    assert torch.equal(pipe(**call, conditions=condition, generator=generator).images, make(pipe, condition))


def test_cached_conditions_equal_computed_ones(pipe):
    own = [Condition(image(), "own"), Condition(image(1), "own", position="subject", end=0.7)]
    same(make(pipe, *own), make(pipe, *own, cache=False))
    mixed = [own[0], Condition(image(1), "canny")]
    same(make(pipe, *mixed), make(pipe, *mixed, cache=False))
    interval = {"guidance_interval": (0.0, 0.6)}
    same(make(pipe, *own, **interval), make(pipe, *own, cache=False, **interval))


def test_a_step_cache_beside_conditions(pipe):
    conditions = [Condition(image(), "own", end=0.7)]
    expected = make(pipe, *conditions)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    same(make(pipe, *conditions), expected)


def test_image_guidance(pipe):
    one, black = Condition(image(), "own"), Condition(torch.zeros(3, 16, 16), "own")
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    a, b = make(pipe, one, **options), make(pipe, black, **options)
    same(make(pipe, one, image_guidance_scale=2.0, **options), b + 2 * (a - b), 1e-4)


def test_completion_keeps_what_is_known(pipe):
    known = torch.ones(4, 4, dtype=torch.bool)
    known[1:3, 1:] = False
    results = [make(pipe, Condition(image(), "canny", mask=known, complement=True), seed=seed) for seed in (3, 4)]
    tokens = [pack(x, 2) for x in results]
    keep = known.flatten()
    assert torch.equal(tokens[0][:, keep], tokens[1][:, keep])
    differs(tokens[0][:, ~keep], tokens[1][:, ~keep])


def test_refusals(pipe):
    with pytest.raises(ValueError, match="'cany' is not loaded; loaded are: canny, own"):
        make(pipe, Condition(image(), "cany"))
    with pytest.raises(ValueError, match="not trained independently"):
        make(pipe, Condition(image(), "canny"), cache=True)
