"""`make gpu` without a GPU: every piece with tiny models, kept and taken up again."""

import json

import pytest
import torch
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.benchmarks.speed import gpu, shapes
from imgdit.benchmarks.speed.families import CASES
from imgdit.benchmarks.speed.shapes import Row


def bench(out, *arguments):
    command = ["bench", "gpu", "--device", "cpu", "--tiny", "--rounds", "1", "--compiler", "eager", "--out", str(out)]
    return CliRunner().invoke(app, [*command, *map(str, arguments)])


COMPILED = [name for name in gpu.PIECES if name.endswith("-compiled")]
"""Pieces whose tracing takes longer than all others together."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All pieces that compile nothing."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    tests = out.parent / "test_one.py"
    tests.write_text("def test_one():\n    pass\n", encoding="utf-8")
    result = bench(out, "--tests", tests, "--only", ",".join(name for name in gpu.PIECES if name not in COMPILED))
    assert result.exit_code == 0, result.output
    return out, result.output


def test_every_piece_runs(measured):
    out, output = measured
    pieces = json.loads((out / "gpu.json").read_text())
    assert [*pieces, *COMPILED] == list(gpu.PIECES) and not any("error" in piece for piece in pieces.values())
    works = [row.work for row in gpu.collect(out)]
    assert len(works) == len(set(works))
    for part in (
        "test_one.py",
        "FLUX.1: forward, FluxTransformer2DModel",
        "FLUX.2: forward, LoRA loaded",
        "FLUX.1: forward, 2 condition(s), joint",
        "FLUX.2: forward, 2 condition(s), cached",
        "FLUX.1: 1 condition(s), cached over joint",
        "FLUX.1: LoRA training step, no condition",
        "FLUX.2: LoRA training step, 2 condition(s)",
        "MMDiT: training step, 2 condition(s), joint, eager",
        "MMDiT: forward, 1 condition(s), cached, eager",
        "FLUX.1: 2 steps, offload sequential, 1 condition(s), SAE",
        "SAE: learned threshold",
        "training step of the embedded model, 2 images",
    ):
        assert part in works and f"| {part} |" in output, part
    assert sum("offload" in work for work in works) == len(shapes.OFFLOADS) * 4
    rows = {row.work: row for row in gpu.collect(out)}
    assert all(row.seconds > 0 for row in rows.values())
    assert all(row.memory and row.fraction for work, row in rows.items() if work.startswith("FLUX.1: forward"))
    assert rows["test_one.py"].note.startswith("1 passed")


@pytest.mark.slow
def test_every_shape_is_compiled(tmp_path):
    result = bench(tmp_path, "--only", ",".join(COMPILED))
    torch.compiler.reset()
    assert result.exit_code == 0, result.output
    for name in ("FLUX.1", "FLUX.2"):
        for work in ("stock", "LoRA", "1 condition(s), joint", "1 condition(s), cached"):
            assert f"| {name}: forward, {work}, compiled |" in result.output
    assert "| MMDiT: forward, 1 condition(s), cached, compiled |" in result.output


def test_what_is_there_is_not_run_again(measured, monkeypatch):
    out, output = measured
    monkeypatch.setattr(gpu, "PIECES", dict.fromkeys(name for name in gpu.PIECES if name not in COMPILED))
    again = bench(out)
    assert again.exit_code == 0 and again.output.count(": there") == len(gpu.PIECES)
    assert again.output[again.output.index(gpu.HEAD) :] == output[output.index(gpu.HEAD) :]
    other = bench(out, "--dtype", "float32")
    words = " ".join(other.output.replace("│", " ").split())
    assert other.exit_code == 2 and "take another folder with --out" in words


def test_a_piece_that_fails_is_kept_and_tried_again(tmp_path, monkeypatch):
    broken = [True]

    def piece(job):
        yield Row("first", "", 1.0)
        if broken:
            raise RuntimeError("out of memory")
        yield Row("second", "", 2.0, note="fine")

    monkeypatch.setattr(gpu, "PIECES", {"a": piece, "b": lambda job: iter([Row("third", "x", 3.0, 0.5, bar=0.4)])})
    result = bench(tmp_path)
    assert result.exit_code == 1 and "a: RuntimeError: out of memory" in result.output
    assert "run it again for a" in result.output and "| third | x | 3000.0 ms | 0.500 |" in result.output
    assert [row.work for row in gpu.collect(tmp_path)] == ["first", "third"]
    late = bench(tmp_path, "--minutes", "0")
    assert late.exit_code == 1 and "a: no time left" in late.output and "b: there" in late.output
    broken.clear()
    result = bench(tmp_path)
    assert result.exit_code == 0 and [row.work for row in gpu.collect(tmp_path)] == ["first", "second", "third"]
    assert bench(tmp_path, "--only", "b", "--again").output.count("b: done") == 1


def test_bars_are_upper_bounds_of_ratios_or_seconds():
    assert Row("a", "b", 9.0, 1.01, bar=1.02).met and not Row("a", "b", 0.1, 1.03, bar=1.02).met
    assert Row("a", "", 0.2, bar=0.24).met and Row("a", "", 0.2).met is None
    assert gpu.line(Row("a", "", 0.2, bar=0.24)).endswith("| ≤ 0.240 s | met |")


@pytest.mark.parametrize(("name", "size"), [("FLUX.1", shapes.FLUX1), ("FLUX.2", shapes.KLEIN)])
def test_shapes_have_the_published_sizes_and_smaller_gpus_hold_fewer_blocks(name, size):
    case, half = CASES[name], torch.bfloat16
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in case.model(size).parameters())
    assert weights == pytest.approx({"FLUX.1": 11.9e9, "FLUX.2": 3.9e9}[name], rel=0.03)
    assert shapes.fitting(case, size, half, None) == shapes.fitting(case, size, half, 80 << 30) == size
    small = shapes.fitting(case, size, half, 14 << 30)
    assert small.double < size.double and small.single < size.single
    with torch.device("meta"):
        held = 2 * sum(weight.numel() for weight in case.model(small).parameters())
    assert held < 7 << 30


def test_without_a_gpu_the_command_says_what_runs_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "gpu"])
    assert result.exit_code == 2 and "--device cpu --tiny" in result.output
