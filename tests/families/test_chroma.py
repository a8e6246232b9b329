"""Chroma's padding masks beside what all families have."""

import tiny_flux_kin
import torch
from tiny_control import image
from tiny_families import differs, loaded, near, passes

from imgdit import Condition

CASE = tiny_flux_kin.CASES["Chroma"]


def test_boolean_masks_hide_padding_and_floating_ones_do_not(tmp_path):
    """Of prompts that are given as text the pipeline makes floating masks, which diffusers adds to the logits."""
    control = loaded(CASE, CASE.pipeline(), tmp_path)
    condition = Condition(image(), "canny", strength=0.5)
    outputs = []
    for dtype in (torch.bool, torch.float32):
        call = {"batch": 2, "steps": 2, **tiny_flux_kin.chroma_prompts(2, dtype)}
        for mode in ("joint", "independent"):
            found, riding = passes(CASE, control, [condition], mode=mode, call=call)
            for given, out in found:
                near(out, CASE.dense(control.transformer, given, riding))
        outputs.append(found[0][1])
    differs(outputs[0][1], outputs[1][1])  # whose prompt is padded
