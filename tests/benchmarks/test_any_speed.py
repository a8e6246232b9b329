"""The reference's way of the benchmark computes what NextDiT computes."""

import torch

from imgdit import NextDiT
from imgdit.benchmarks.speed.any_to_any import any_comparisons


def test_both_ways_agree():
    torch.manual_seed(0)
    model = NextDiT(
        hidden_size=48,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        caption_channels=24,
        input_size=(1, 32, 32),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = list(any_comparisons(rounds=1, model=model.eval()))
    assert [row.difference < 1e-5 for row in rows] == [True, True]
    assert "cache" in rows[1].work
