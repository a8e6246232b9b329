"""`imgdit bench training`: one change per row, resumed, as a table."""

import json

import pytest
from tiny_runs import small_cache
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.benchmarks.scenes import ablation
from imgdit.benchmarks.scenes.ablation import QUICK, ROWS, AblationPlan, row_recipe, table
from imgdit.training.build import build_model


def bench(out, *options):
    arguments = ["bench", "training", "--quick", "--only", "map-alignment", "--out", str(out), *options]
    with small_cache():
        return CliRunner().invoke(app, arguments)


def test_quick(tmp_path, monkeypatch):
    """A row that was interrupted goes on, is measured and written; one that is done is read."""
    recipe = row_recipe("map-alignment", tmp_path, QUICK)
    with small_cache():
        batches, held_out = ablation.training_batches(recipe)
        ablation.train(recipe, model=build_model(recipe), batches=batches, held_out=held_out, stop_at=2)
    done = bench(tmp_path)
    assert done.exit_code == 0, done.output
    steps = [json.loads(line)["step"] for line in (tmp_path / "map-alignment/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 2, 4, 4]  # loss and held-out loss, before and after it went on
    written = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["name"] for row in written] == ["map-alignment"] and 0 < written[0]["loss"] < 5
    assert all(row["held_out"].keys() == {"held_out", *(f"held_out_0.{n}" for n in (3, 6, 9))} for row in written)
    lines = done.output.splitlines()
    assert any(line.split()[:2] == ["row", "held-out"] for line in lines)
    monkeypatch.setattr(ablation, "train", None)
    again = bench(tmp_path)
    assert again.exit_code == 0 and again.output.splitlines()[-3:] == lines[-3:]


def test_a_row_of_another_plan_is_refused(tmp_path):
    (tmp_path / "muon").mkdir()
    (tmp_path / "muon/row.json").write_text('{"name": "muon", "plan": {"steps": 3}}')
    with pytest.raises(ValueError, match="is of another plan"):
        ablation.run(tmp_path, tmp_path, QUICK, ["muon"])


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_a_recipe_that_builds(name, tmp_path):
    recipe = row_recipe(name, tmp_path, QUICK)
    assert recipe.run.seed == 0 and recipe.run.steps == 4
    baseline = row_recipe("baseline", tmp_path, QUICK)
    assert name == "baseline" or recipe.replace(run={"folder": baseline.run.folder}) != baseline
    assert sum(p.numel() for p in build_model(recipe).parameters()) > 0
    whole = row_recipe(name, tmp_path, AblationPlan())
    assert whole.run.steps == 2000 and whole.data.arguments["scenes"] == 2048 and whole.schedule.decay == 400


def test_table():
    score = [{"task": task, "metric": metric, "estimate": [0.5, 0, 1]} for task, metric in ablation.METRICS.values()]
    rows = [
        {"name": name, "held_out": {"held_out": loss}, "seconds_per_step": 0.5, "scores": score}
        for name, loss in (("baseline", 0.5), ("muon", 0.45))
    ]
    assert table(rows).splitlines()[2].split()[:5] == ["muon", "0.4500", "-0.0500", "0.50", "0.500"]


def test_unknown_rows(tmp_path):
    with pytest.raises(ValueError, match="unknown row 'muo'"):
        ablation.run(tmp_path, tmp_path, QUICK, ["muo"])
