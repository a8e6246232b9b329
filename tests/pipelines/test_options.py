"""Options of a call: what no model takes is refused where the options are made; the batch size is counted once."""

import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback

from imgdit.adapters.pairing import Samples
from imgdit.pipelines.options import FrameOptions, SamplingOptions

SAMPLING = {"num_inference_steps": 2, "sigmas": None, "guidance_scale": 3.0}
REFUSED = {
    "a scale per image": (SamplingOptions, {"guidance_scale": [1.0]}, "guidance_scale is one number for all images"),
    "a negative scale": (SamplingOptions, {"true_cfg_scale": -1.0}, "true_cfg_scale must not be negative, got -1"),
    "no number": (SamplingOptions, {"guidance_scale": float("nan")}, "guidance_scale must not be negative, got nan"),
    "an interval upside down": (SamplingOptions, {"guidance_interval": (0.9, 0.1)}, "guidance_interval must be 0"),
    "no image": (SamplingOptions, {"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
    "an output nobody knows": (SamplingOptions, {"output_type": "jpg"}, "output_type must be one of 'pil', 'np'"),
    "a level between": (
        FrameOptions,
        {"conditioning_level": "first"},
        "conditioning_level must be one of 'last', 'clean', None",
    ),
    "no tokens to shift by": (FrameOptions, {"noise_scale": 0.0}, "noise_scale must be above 0, got 0.0"),
    "positions times 0": (FrameOptions, {"scale_factor": 0}, "scale_factor must be above 0, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_model_takes_is_refused(case):
    kind, values, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        kind(**(SAMPLING if kind is SamplingOptions else {}) | values)


def test_a_callback_gets_the_tensors_that_it_names():
    assert SamplingOptions(**SAMPLING).callback_tensors == ["latents"]
    assert SamplingOptions(**SAMPLING, callback_on_step_end_tensor_inputs=[]).callback_tensors == []
    official = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    options = SamplingOptions(**SAMPLING, callback_on_step_end=official, callback_on_step_end_tensor_inputs=["x"])
    assert options.callback_tensors == official.tensor_inputs


def test_a_call_makes_its_images_prompt_by_prompt():
    samples = Samples.of_prompts(2, 3)
    assert (samples.count, samples.prompts) == (6, 2)
    assert samples.order(2) == (0, 0, 0, 1, 1, 1)
    assert torch.arange(6)[list(samples.order(6))].tolist() == [0, 1, 2, 3, 4, 5]
