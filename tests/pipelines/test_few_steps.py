"""Few-step LoRAs in pipelines: nothing else changes, other steps are refused, and live images use them."""

import threading

import pytest
import torch
from tiny import tiny_pipeline
from tiny_control import lora_file

from imgdit.live import Latest, live
from imgdit.lora.files import AdapterInfo, active_adapters
from imgdit.pipelines.few_steps import TURBO, few_steps, load_few_steps
from imgdit.pipelines.load_options import LoadOptions
from imgdit.pipelines.loading import add_loras

TARGETS = r".*attn\.to_[qkv]|x_embedder|.*proj_out"


@pytest.fixture
def pipe():
    return tiny_pipeline(stochastic_sampling=True)


@pytest.fixture
def file(pipe, tmp_path):
    return lora_file(tmp_path / TURBO, pipe.transformer, TARGETS, info=AdapterInfo(num_inference_steps=4))


def image(pipe, **call):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    return pipe("a red cube", generator=torch.Generator().manual_seed(0), **options | call).images


def test_in_use_it_changes_images_and_afterwards_nothing(pipe, file):
    plain, scheduler = image(pipe), pipe.scheduler
    turbo = load_few_steps(pipe, file)
    assert turbo.num_inference_steps == 4
    assert torch.equal(image(pipe), plain)
    with few_steps(pipe, turbo) as call:
        assert not pipe.scheduler.config.stochastic_sampling
        fast = image(pipe, **call)
        assert torch.equal(image(pipe, **call), fast)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert pipe.scheduler is scheduler
    assert not active_adapters(pipe.transformer)
    assert torch.equal(image(pipe), plain)
    assert not torch.allclose(image(pipe, num_inference_steps=4, guidance_scale=1.0), fast, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        ({"num_inference_steps": 8, "guidance_scale": 1.0}, "num_inference_steps=8"),
        ({"num_inference_steps": 4, "guidance_scale": 3.0}, r"guidance_scale=3\.0"),
        ({"sigmas": [1.0, 0.5, 0.4, 0.3], "guidance_scale": 1.0}, "sigmas="),
    ],
)
def test_other_steps_levels_and_guidance_are_refused(pipe, file, call, got):
    with few_steps(pipe, load_few_steps(pipe, file)), pytest.raises(ValueError, match=rf"=4 without sigmas.*{got}"):
        image(pipe, **call)


def test_what_is_no_few_step_lora_is_named(pipe, tmp_path):
    other = lora_file(tmp_path / "other.safetensors", pipe.transformer, TARGETS)
    with pytest.raises(ValueError, match="is no few-step LoRA"):
        load_few_steps(pipe, other)
    for nothing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ValueError, match="there is no few-step LoRA"):
            load_few_steps(pipe, nothing)


def test_it_is_no_lora_like_others(pipe, file):
    with pytest.raises(ValueError, match="use --turbo"):
        add_loras(pipe, LoadOptions(lora=(str(file),)))


def test_live_images_show_the_latest_input(pipe, file):
    turbo, inputs = load_few_steps(pipe, file), Latest()
    call = {"height": 16, "width": 16, "output_type": "pt"}
    for prompt in ("a blue cube", "a red cone", "a red cube"):
        inputs.put({"prompt": prompt})
    shown, follow = [], live(pipe, inputs, turbo=turbo, **call)
    shown.append(next(follow))
    threading.Timer(0.05, lambda: (inputs.put({"prompt": "a red cube"}), inputs.close())).start()
    shown += follow
    assert [one.asked["prompt"] for one in shown] == ["a red cube", "a red cube"]
    assert inputs.replaced == 2
    with few_steps(pipe, turbo) as few:
        assert torch.equal(shown[0].image, image(pipe, **few)[0])
    assert torch.equal(shown[0].image, shown[1].image)
    assert [one.asked for one in live(pipe, [{"prompt": "a cube"}], num_inference_steps=1, **call)]
    with pytest.raises(ValueError, match="closed"):
        inputs.put({})
