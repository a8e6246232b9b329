"""Learning-rate sweeps: the arithmetic of the optimum, a tiny sweep that is interrupted, and the quick one."""

import dataclasses
import json
import math
import os

import pytest
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.mup.optimum import Curve, NoOptimum, curve, find_optimum, loss_at, shift
from imgdit.training import load_recipe
from imgdit.training.transfer import Run, Sweep, analyse, run_sweep, sweep_table


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state()


def parabola(best, low=0.5, steepness=0.1):
    return lambda x: low + steepness * (x - best) ** 2


def test_the_vertex_of_a_parabola():
    rates = [-8.0, -7.0, -6.0, -5.0]
    found = find_optimum(rates, [parabola(-6.3)(x) for x in rates])
    assert (found.log2lr, found.loss) == pytest.approx((-6.3, 0.5))
    half = math.sqrt(0.01 * 0.5 / 0.1)
    assert (found.low, found.high) == pytest.approx((-6.3 - half, -6.3 + half))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ([1.0, 2.0, 3.0], r"at the edge of the grid, 2\^-8; add lower"),
        ([3.0, 2.0, 1.0], r"at the edge of the grid, 2\^-6; add higher"),
        ([3.0, 2.0, math.inf], r"next to the lowest loss, 2\^-7, diverged; use a finer grid"),
        ([3.0, 2.0, math.nan], r"next to the lowest loss, 2\^-7, diverged"),
        ([math.inf] * 3, "every learning rate diverged"),
    ],
)
def test_curves_without_an_optimum(loss, message):
    with pytest.raises(NoOptimum, match=message):
        find_optimum([-8.0, -7.0, -6.0], loss)
    refused = curve(64, {0: dict(zip([-8.0, -7.0, -6.0], loss))})
    assert refused.optimum is None and refused.refusal and refused.seeds == ()


def test_curves_over_seeds():
    rates = [-8.0, -7.0, -6.0, -5.0]
    made = curve(64, {seed: {x: parabola(best)(x) for x in rates} for seed, best in enumerate((-6.2, -6.4))})
    assert made.optimum.log2lr == pytest.approx(-6.3) and made.seeds == pytest.approx((-6.2, -6.4))
    assert loss_at(made, -7.0) == made.loss[1]
    assert loss_at(made, -6.3) == pytest.approx(made.optimum.loss)
    wide = Curve(128, made.log2lr, made.loss, made.optimum._replace(log2lr=-7.3), "", ())
    assert shift([made, wide]) == pytest.approx(-1.0)
    assert shift([made, Curve(128, made.log2lr, made.loss, None, "no", ())]) is None


def tiny_sweep(folder, **changes):
    recipe = load_recipe("mup/transfer").replace(
        run={"steps": 3, "batch_size": 4, "evaluate_sigmas": (0.5,)}, schedule={"warmup": 1, "decay": 1}
    )
    return Sweep(recipe, **{"widths": (16, 32), "log2lr": (-9.0, -8.0, 9.0), "seeds": 1, "folder": folder, **changes})


def test_a_sweep_goes_on_and_is_shared(tmp_path, monkeypatch):
    sweep = tiny_sweep(tmp_path)
    # 32 is the base width, where both parametrisations are the same: 3 runs of 12 less.
    assert len(sweep.runs()) == 9 and sweep.runs()[0].width == 32
    assert sweep.stand_in(Run("standard", 32, -8.0, 0)) == Run("mup", 32, -8.0, 0)
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    assert not run_sweep(sweep, progress=made.append)  # half of it
    assert len(made) == 5 and os.environ["WORLD_SIZE"] == "2"
    monkeypatch.setenv("RANK", "1")
    assert run_sweep(sweep, progress=made.append) and len(made) == 9
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert run_sweep(sweep, progress=made.append) and len(made) == 9
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert not (tmp_path / "working").exists()
    result = analyse(sweep)
    lines = list(sweep_table(result.curves))
    assert len(lines) == 5 and lines[1].startswith("mup 16")
    assert result.curves["standard"][1].loss == result.curves["mup"][1].loss
    json.dumps(result.to_dict())
    with pytest.raises(ValueError, match=r"holds runs of another recipe: .*objective.* differ"):
        recipe = sweep.recipe.replace(objective={"arguments": {"text_dropout": 0.5}})
        run_sweep(dataclasses.replace(sweep, recipe=recipe))


@pytest.mark.slow  # starts two processes
def test_a_run_is_the_same_wherever_it_is_made(tmp_path):
    first, second = (tiny_sweep(tmp_path / name, widths=(16,), parametrisations=("mup",)) for name in "ab")
    run_sweep(first), run_sweep(second, jobs=2)
    assert analyse(first).curves == analyse(second).curves


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (16, 40)}, "width must be a multiple of the head dimension 16, got 40"),
        ({"widths": (32, 16)}, "widths must ascend without repetition"),
        ({"log2lr": (-8.0, -7.0)}, "an optimum needs at least three learning rates"),
    ],
)
def test_sweeps_that_cannot_be_made(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_sweep(tmp_path, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mup/transfer"], "give --widths and --log2lr, or --quick"),
        (["--quick", "--widths", "16"], "--quick brings its own widths"),
        (["--widths", "16,32", "--log2lr", "-9:x"], "--log2lr takes numbers such as"),
        (["scenes/autoencoder", "--widths", "16,32", "--log2lr=-9:-7"], "has no μP parametrisation"),
    ],
)
def test_commands_that_cannot_be_run(arguments, message):
    done = CliRunner().invoke(app, ["mup", "transfer", *arguments], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and message in done.output, done.output


def test_recipes_whose_schedule_sets_absolute_rates_are_refused(tmp_path):
    text = "run: {folder: out, steps: 4, batch_size: 4}\nschedule: {kind: one_cycle, max_lr: 0.1}\n"
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"unknown key in schedule 'max_lr'.*"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.slow
def test_the_quick_sweep_transfers(tmp_path):
    done = CliRunner().invoke(app, ["mup", "transfer", "--quick", "--jobs", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "transfer.json").read_text())
    assert abs(result["shifts"]["mup"]) <= 0.5 and result["shifts"]["standard"] <= -1.0
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    assert "suggested optimizer.lr" in done.output
