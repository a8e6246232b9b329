"""In the last single-stream block, what nobody reads afterwards gives its keys and values and is not computed."""

import pytest
import torch
from tiny import rope_config, tiny_mmdit

from imgdit import Frame, FrameLayout
from imgdit.benchmarks.speed.timing import flops_of
from imgdit.models.blocks import BlockPlan

LAYOUTS = {
    "conditioning frame": [Frame((4, 4)), Frame((2, 4), sigma=0.0, index=1.0)],
    "condition": [Frame((4, 4)), Frame((4, 4), sigma=0.0, adapter="c", sees="joint", index=1.0)],
    "two that see themselves": [Frame((4, 4)), *(Frame((2, 2), sigma=0.1, sees="self", index=i) for i in (1.0, 2.0))],
    "given before made": [Frame((2, 4), sigma=0.0), Frame((4, 4), index=1.0), Frame((2, 2), sigma=0.0, index=2.0)],
}


def inputs(layout, batch=2):
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, layout.image_length, 16, generator=draw),
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=draw),
        "pooled_projections": torch.randn(batch, 32, generator=draw),
        "timestep": torch.full((batch,), 0.5),
        "layout": layout,
    }


def predict(model, layout):
    """Prediction, and the gradients of every weight."""
    model.zero_grad()
    sample = model(**inputs(layout)).sample
    sample.square().sum().backward()
    return sample.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name,fused", [*((name, False) for name in LAYOUTS), ("conditioning frame", True)])
def test_the_same_prediction_and_gradients_for_less(name, fused, monkeypatch):
    model = tiny_mmdit(rope_config())
    if fused:
        model.fuse_qkv_projections()
    layout = FrameLayout.build(LAYOUTS[name], 5)
    got, gradients = predict(model, layout)
    work = flops_of(lambda: model(**inputs(layout)))
    monkeypatch.setattr(BlockPlan, "last", lambda self, layout: self)
    layout = FrameLayout.build(LAYOUTS[name], 5)
    expected, all_gradients = predict(model, layout)
    torch.testing.assert_close(got, expected)
    assert len(gradients) == len(all_gradients)
    for a, b in zip(gradients, all_gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert work < flops_of(lambda: model(**inputs(layout)))


@pytest.mark.parametrize("frames", [[Frame((4, 4))], [Frame((2, 2), sigma=0.0), Frame((4, 4), index=1.0)]])
def test_where_everything_is_read_the_plan_stays(frames):
    layout = FrameLayout.build(frames, 5)
    plan = BlockPlan(layout.text_lengths, layout.lengths, layout.groups, layout.image_groups)
    assert plan.last(layout) is plan
