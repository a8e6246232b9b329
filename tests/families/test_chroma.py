"""Chroma beside what all families have: its padding masks, LoRA names."""

import pytest
import tiny_flux_kin
import torch
from safetensors.torch import save_file
from tiny_control import image
from tiny_families import differs, loaded, near, passes
from torch.nn import Linear

from imgdit import Condition, OmniControl
from imgdit.families.chroma import FAMILY
from imgdit.lora.files import adapter_pairs

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


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_files_by_the_repositorys_names_are_read_whole(prefix, tmp_path):
    """Fused projections and the network of the modulation too."""
    pipe = CASE.pipeline()
    shapes = {name: module.weight.shape for name, module in pipe.transformer.named_modules() if type(module) is Linear}
    layers = {
        f"{own}.1.{name}": [f"{blocks}.1.{part}" for part in parts]
        for own, (blocks, table) in FAMILY.lora.blocks.items()
        for name, parts in table.items()
    }
    layers |= {own: parts for own, parts in FAMILY.lora.root.items() if parts[0] in shapes}
    tensors, expected = {}, {}
    for own, parts in layers.items():
        down = torch.randn(2, shapes[parts[0]][1])
        ups = [torch.randn(shapes[part][0], 2) for part in parts]
        stem = prefix + (own.replace(".", "_") if prefix.endswith("_") else own)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": torch.cat(ups)}
        expected |= {part: up @ down for part, up in zip(parts, ups, strict=True)}
    save_file(tensors, tmp_path / "own.safetensors")
    report = OmniControl(pipe).load(tmp_path / "own.safetensors")
    assert not report.unused and len(expected) > 20
    pairs = adapter_pairs(pipe.transformer, "own")
    assert pairs.keys() == expected.keys()
    for name, pair in pairs.items():
        torch.testing.assert_close(pair.up @ pair.down, expected[name])
