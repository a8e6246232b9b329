"""Which rows the layers of every family compute: each its base product once, and an adapter its own rows."""

import diffusers
import pytest
import torch
from peft.tuners.lora import LoraLayer

from imgdit import Condition, OmniControl
from imgdit.benchmarks.speed import families

CASES = families.CASES
SIZE = families.TINY
CONDITION = SIZE.side**2
"""Tokens of the condition."""


def under_control(case):
    """A case's model with an adapter that is loaded, and the arguments of a call."""
    torch.manual_seed(0)
    model, inputs = case.model(SIZE).eval(), case.inputs(SIZE)
    families.add_adapter(model)
    parts = {"transformer": model, "vae": case.vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return OmniControl(families.stock_pipeline(getattr(diffusers, case.pipeline), parts)), inputs


def counted(control, inputs):
    """Calls of each layer with an adapter in a pass: rows of its base product, and rows of its adapter."""
    found, handles = {}, []
    for name, layer in control.transformer.named_modules():
        if isinstance(layer, LoraLayer):
            found[name] = ([], [])
            for part, rows in zip((layer.base_layer, layer.lora_A["adapter"]), found[name], strict=True):
                handles.append(
                    part.register_forward_pre_hook(lambda part, given, rows=rows: rows.append(rows_of(part, given[0])))
                )
    try:
        with torch.no_grad():
            control.transformer(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def rows_of(layer, x):
    """Tokens, patches or vectors of one sample that a layer computes."""
    return x.numel() // layer.weight[0].numel()


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_computes_the_rows_of_its_condition_alone(name):
    control, inputs = under_control(CASES[name])
    plain = counted(control, inputs)
    assert all(len(base) <= 1 and not own for base, own in plain.values())
    condition = Condition(torch.rand(3, 4 * SIZE.side, 4 * SIZE.side), "adapter")
    with control.use(condition, mode="joint"):
        joint = counted(control, inputs)
    with control.use(condition, mode="independent"):
        written, read = counted(control, inputs), counted(control, inputs)
    for layer, (base, _) in plain.items():
        for found in (joint, written):
            (whole,), (own,) = found[layer]
            # A token, a vector of modulation, or nothing of a query in a block after which nobody reads conditions.
            assert own in (CONDITION, 1, 0), (layer, own)
            # Text and image share a vector of modulation, or have one each.
            others = (1, 2) if own == 1 else (sum(base),)
            assert whole - own in others, layer
            assert sum(read[layer][0]) in others and not read[layer][1], layer
    assert {own for _, (own,) in joint.values()} >= {CONDITION}
