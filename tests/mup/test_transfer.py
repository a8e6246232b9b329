"""Learning-rate sweeps: the arithmetic of the optimum, a tiny sweep that is interrupted, and the quick one."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.mup.optimum import Curve, NoOptimum, curve, find_optimum, loss_at, shift
from imgdit.recipes import packaged_recipes
from imgdit.training import load_recipe
from imgdit.training.transfer import Run, Sweep, analyse, run_sweep, sweep_table, transfer_lines

SCENES_LOG2LR, SCENES_STANDARD = tuple(map(float, range(-10, -3))), tuple(map(float, range(-12, -5)))
GRIDS = {"log2lr": SCENES_LOG2LR, "standard-log2lr": SCENES_STANDARD}


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


def test_parametrisations_may_have_their_own_rates(tmp_path):
    """At the base width one run serves both, whatever rates each of them has."""
    grids = {"log2lr": (-9.0, -8.0, -7.0), "standard_log2lr": (-10.0, -9.0, -8.0)}
    sweep = tiny_sweep(tmp_path, widths=(32, 64), **grids)
    at = {width: sorted(run.log2lr for run in sweep.runs() if run.width == width) for width in (32, 64)}
    assert at == {32: [-10.0, -9.0, -8.0, -7.0], 64: sorted([*grids["log2lr"], *grids["standard_log2lr"]])}
    assert len(tiny_sweep(tmp_path, widths=(32, 64), **grids, parametrisations=("mup",)).runs()) == 6
    for run in sweep.runs():  # parabolas: under the standard parametrisation the best rate halves with the width
        best = -8.0 if run.parametrisation == "mup" else -9.0
        made = {"loss": parabola(best, low=32 / run.width)(run.log2lr), "cpu_seconds": 1.0}
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / f"{run.name}.json").write_text(json.dumps(made))
    result = analyse(sweep)
    assert [c.log2lr for c in result.curves["standard"]] == [grids["standard_log2lr"]] * 2
    assert result.wider_is_better == {"mup": True, "standard": None}  # its narrow one is best at the edge
    table = list(sweep_table(result.curves))
    assert table[0].split()[:4] == ["-10", "-9", "-8", "-7"]
    assert [table[row][16 + 9 * place :][:9].strip() for row, place in ((1, 0), (3, 3))] == ["", ""]
    assert list(transfer_lines(result)) == [
        "mup: the optimum moves by +0.00 in log2 over 2x the width",
        "mup: at the best rate of width 32 width 64 loses 0.0% against its own best",
        "mup: at the best rate of width 32 wider is never worse: 1.0000, 0.5000",
        "standard: the optimum moves by ? in log2 over 2x the width",
    ]


def test_wider_may_be_worse(tmp_path):
    sweep = tiny_sweep(tmp_path, widths=(32, 64), log2lr=(-9.0, -8.0, -7.0), parametrisations=("mup",))
    (tmp_path / "runs").mkdir()
    for run in sweep.runs():
        loss = parabola(-8.0, low=run.width / 32)(run.log2lr)
        (tmp_path / "runs" / f"{run.name}.json").write_text(json.dumps({"loss": loss, "cpu_seconds": 1.0}))
    result = analyse(sweep)
    assert result.wider_is_better == {"mup": False}
    assert list(transfer_lines(result))[-1].endswith("wider is somewhere worse: 1.0000, 2.0000")


def test_the_recipe_on_scenes():
    """Its command is a sweep that can be made, with base width and shape as the head says."""
    recipe = load_recipe("mup/transfer_scenes")
    sweep = Sweep(recipe, (64, 128, 256, 512), SCENES_LOG2LR, 1, Path("nowhere"), standard_log2lr=SCENES_STANDARD)
    assert sweep.base_width == 64 and len(sweep.runs()) == 4 * 7 + 3 * 7 + len(
        set(SCENES_STANDARD) - set(SCENES_LOG2LR)
    )
    said = packaged_recipes()["mup/transfer_scenes"].read_text().splitlines()[0]
    rates = (f"--{name}={grid[0]:g}:{grid[-1]:g}" for name, grid in GRIDS.items())
    assert said == f"# imgdit mup transfer mup/transfer_scenes --widths 64,128,256,512 {' '.join(rates)}"
    assert recipe.schedule.factor(recipe.run.steps - 1, recipe.run.steps) < 0.01
    assert recipe.run.evaluate_every == recipe.run.steps and recipe.data.arguments["probabilities"] == {"images": 1.0}
    model = recipe.model.arguments
    assert (model["num_layers"], model["num_single_layers"], model["attention_head_dim"]) == (2, 2, 32)


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
        ({"standard_log2lr": (-8.0,)}, r"at least three learning rates, got standard_log2lr=\[-8.0\]"),
        ({"standard_log2lr": (-8.0, -9.0, -7.0)}, "standard_log2lr must ascend without repetition"),
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
