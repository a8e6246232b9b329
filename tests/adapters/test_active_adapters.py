"""Of several LoRAs that are loaded, those that are active act, layer by layer, and no others."""

import pytest
import tiny_flux2
import tiny_z_image
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_control import flux, image, lora_file, make, text
from tiny_families import differs, loaded, near, used

from imgdit import Condition, OmniControl

CASES = {"FLUX.2": tiny_flux2.CASES["FLUX.2 klein"], "Z-Image": next(iter(tiny_z_image.CASES.values()))}
STYLES = ("style_1", "style_2", "style_3")
FIRST, SECOND, THIRD = STYLES


def with_styles(model, targets, tmp_path, names=STYLES):
    for seed, name in enumerate(names):
        file = lora_file(tmp_path / f"{name}.safetensors", model, targets, seed=20 + seed, std=0.2)
        model.load_lora_adapter(load_file(file), adapter_name=name)


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def without_inactive(model):
    """Every style acts again; weights of those that did not are 0."""
    with torch.no_grad():
        for layer in layers(model):
            for name in STYLES:
                if name in layer.lora_B and name not in layer.active_adapters:
                    layer.lora_B[name].weight.zero_()
    model.set_adapters(list(STYLES))


@pytest.mark.parametrize(("name", "mode", "steps"), [("FLUX.2", "joint", 1), ("Z-Image", "independent", 2)])
def test_the_active_ones_act(name, mode, steps, tmp_path):
    case = CASES[name]
    control = loaded(case, case.pipeline(), tmp_path)
    with_styles(control.transformer, case.style, tmp_path)
    condition, call = Condition(image(), "canny"), {"steps": steps}

    def run():
        return used(case, control, condition, mode=mode, call=call)

    everything = run()
    control.transformer.set_adapters([FIRST, THIRD])
    two = run()
    differs(two, everything)
    different = [layer for layer in layers(control.transformer) if SECOND in layer.lora_A][::3]
    for layer in different:
        layer.set_adapter([SECOND])
    mixed = run()
    differs(mixed, two)
    without_inactive(control.transformer)
    near(run(), mixed)


def test_loading_leaves_the_active_ones_of_each_layer(tmp_path):
    pipe = flux()
    with_styles(pipe.transformer, ".*attn.to_[qk]", tmp_path, STYLES[:2])
    pipe.transformer.set_adapters([FIRST])
    first, second, *_ = layers(pipe.transformer)
    first.set_adapter([SECOND])
    second.set_adapter([])
    plain = make(pipe, **text(pipe))
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer, ".*attn.to_[qkv]"))
    assert (first.active_adapters, second.active_adapters) == ([SECOND], [])
    assert torch.equal(make(pipe, **text(pipe)), plain)
    bad = lora_file(tmp_path / "bad.safetensors", pipe.transformer, ".*attn.to_q")
    with pytest.raises(ValueError, match="is loaded already"):
        control.load(bad, adapter_name="canny")
    assert (first.active_adapters, second.active_adapters) == ([SECOND], [])


def test_kept_keys_follow_the_active_ones(tmp_path):
    """A style acts on the tokens of conditions too in layers that OminiControl does not switch."""
    pipe = flux()
    with_styles(pipe.transformer, ".*ff.net.0.proj|.*norm1.linear", tmp_path, STYLES[:2])
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer, ".*attn.to_[qkv]"))
    pipe.transformer.set_adapters([FIRST])
    with control.use(Condition(image(), "canny"), mode="independent"):
        one = make(pipe, **text(pipe))
        pipe.transformer.set_adapters([SECOND])
        other = make(pipe, **text(pipe))
    differs(one, other)
    with control.use(Condition(image(), "canny"), mode="independent"):
        near(other, make(pipe, **text(pipe)))
