"""What the benchmarks of speed compute besides the clock's numbers."""

import json
import math

import pytest
import torch
from tiny import rope_config, tiny_mmdit, tiny_pipeline
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.benchmarks.speed import command_line as speed_bench
from imgdit.benchmarks.speed import families, growth
from imgdit.benchmarks.speed import pipeline as image_speed
from imgdit.benchmarks.speed import timing as speed
from imgdit.benchmarks.speed.large import TINY, large_costs
from imgdit.benchmarks.speed.training import training_cost
from imgdit.family import known_classes


def test_memory_is_what_is_held_at_once():
    def call():
        a = torch.zeros(1000, dtype=torch.float32)
        b = a + 1
        del a
        return b + 1

    assert speed.peak_memory(call) == pytest.approx(8000, abs=200)


def test_costs_of_families_are_of_every_family_with_conditions():
    rows = list(families.family_costs(rounds=1, size=families.TINY))
    assert {row.against for row in rows} == {*known_classes("conditions")}
    for row in rows:
        name, _, work = row.work.partition(": ")
        assert name in families.CASES and (row.difference == 0.0) == (work == families.LOADED)
        assert families.BARS[work] > 1.0 and row.low <= row.ratio <= row.high


def test_flops_of_a_product():
    a = torch.randn(8, 16)
    assert speed.flops_of(lambda: a @ a.T) == 2 * 8 * 16 * 8


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power):
    x = [1.0, 2.0, 8.0, 64.0]
    assert growth.exponent(x, [3 * v**power for v in x]) == pytest.approx(power)


def test_growth_measures_every_axis_and_draws_it(tmp_path):
    axes = {name: values[:2] for name, values in growth.AXES.items()}
    points = list(growth.measure({**axes, "tokens": (64, 256)}, rounds=1))
    assert {(p.work, p.axis, p.value) for p in points} == {
        (work, axis, value)
        for work in ("forward", "training step")
        for axis, values in {**axes, "tokens": (64, 256)}.items()
        for value in values
    }
    by = {(p.work, p.axis, p.value): p for p in points}
    for axis in axes:
        small, large = (p for p in points if (p.work, p.axis) == ("forward", axis))
        assert large.flops > small.flops and large.memory > small.memory
    assert by["training step", "batch", 2].flops == 3 * by["forward", "batch", 2].flops
    assert by["training step", "batch", 2].memory > by["forward", "batch", 2].memory
    assert len(growth.growth(points)) == 10
    assert growth.plot(points, tmp_path / "growth.png").stat().st_size > 1000


def test_the_image_of_diffusers_pipeline_is_ours():
    row = image_speed.image_comparison(tiny_pipeline(), steps=3, rounds=1)
    assert row.difference < 1e-4


def test_caches_are_compared_with_the_same_images():
    rows = list(image_speed.cache_table(tiny_pipeline(), count=1, steps=8, rounds=1))
    assert [row.cache.split(",")[0] for row in rows] == (
        ["FirstBlockCache"] * 3 + ["TaylorSeer"] * 2 + ["MagCache"] * 2 + ["PyramidAttentionBroadcast"] * 2
    )
    assert len({round(row.psnr, 3) for row in rows}) > 3


def test_the_training_loop_is_the_plain_one():
    cost = training_cost(tiny_mmdit(rope_config()), batch_size=2, rounds=2)
    assert cost.time.difference == 0.0
    assert 0.9 < cost.memory < 1.2


def test_packing_computes_only_what_is_there():
    row = speed.packing_comparison(tiny_mmdit(rope_config()), rounds=1)
    assert row.ours > 0 and math.isnan(row.difference)


@pytest.mark.parametrize("variant", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_large_model_in_small(variant):
    options = {"device": "cpu", "dtype": torch.float32, "compiler": "eager", "rounds": 1}
    rows = list(large_costs(TINY, backends=("native",), variants=(variant,), **options))
    assert len(rows) == 8
    assert [row.against for row in rows].count("FluxTransformer2DModel") == 2
    assert {row.recompiled + row.graph_breaks for row in rows} == {0}


def test_a_row_says_whether_its_bar_is_reached(tmp_path):
    fast = speed_bench.Row("a", "b", 0.5, 0.4, 0.6, "x", 0.9, 1.0, 2.0)
    shares = [speed_bench.Row("a", "", value, value, value, "of GEMM", 0.88) for value in (0.9, 0.8)]
    assert [row.met for row in (fast, *shares)] == [True, True, False]
    assert speed_bench.line(fast).endswith("| 0.500 x | 0.400 - 0.600 | ≤ 0.900 x | met |")
    speed_bench.write(tmp_path / "rows.json", [fast, *shares], {"cores": 1})
    assert [row["met"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [True, True, False]


def test_commands_refuse_what_they_do_not_know():
    for arguments, said in (
        (["bench", "speed", "--only", "forwards"], "forward"),
        (["bench", "large-speed", "--device", "cpu", "--variants", "egger"], "eager"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and said in result.output
