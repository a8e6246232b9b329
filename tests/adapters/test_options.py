"""Options of conditions: what no model takes is refused where the options are made."""

import math

import pytest
import torch

from imgdit.adapters.options import ConditionOptions

REFUSED = {
    "an unknown mode": ({"mode": "both"}, "mode must be one of 'joint', 'independent', got 'both'"),
    "a scale per image": ({"image_guidance_scale": [1.0, 2.0]}, "one finite number for all images, got"),
    "an endless scale": ({"image_guidance_scale": math.inf}, "one finite number for all images, got inf"),
    "a seed": ({"generator": 3}, "torch.Generator draws the latents of all conditions, got int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_model_takes_is_refused(case):
    values, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ConditionOptions(**values)


@pytest.mark.parametrize(
    "given, expected", [(None, None), ((), ()), ("style", ("style",)), (["a", "b"], ("a", "b"))], ids=str
)
def test_main_adapters_are_one_or_several(given, expected):
    assert ConditionOptions(given, generator=torch.Generator()).main_adapters == expected
