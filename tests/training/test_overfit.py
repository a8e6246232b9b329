"""`imgdit train --check`, `--set` and `--extend`."""

import json

import pytest
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.recipes import read_changes, with_values
from imgdit.training import load_recipe
from imgdit.training.overfit import Overfit, overfit

RECIPE = """
data: {name: toy, arguments: {seed: 0}}
model:
  kind: mmdit
  arguments:
    in_channels: 16
    num_layers: 1
    num_single_layers: 1
    attention_head_dim: 16
    num_attention_heads: 2
    joint_attention_dim: 32
    pooled_projection_dim: 32
    axes_dims_rope: [4, 6, 6]
optimizer: {lr: 0.01}
run: {folder: outputs/toy, steps: 2, batch_size: 4, checkpoint_every: 2}
"""


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return "toy.yaml"


def test_fields_are_set_by_their_path(recipe):
    changes = read_changes(["run.steps=7", "optimizer.lr=1e-3", "data.arguments.seed=3", "run.folder=a=b"])
    found = load_recipe(recipe, changes)
    assert (found.run.steps, found.optimizer.lr, found.run.folder) == (7, 1e-3, "a=b")
    assert found.data.arguments == {"seed": 3} and load_recipe(recipe).run.steps == 2
    values = {"run": {"steps": 1}}
    assert with_values(values, {"run.steps": 2}) == {"run": {"steps": 2}} and values == {"run": {"steps": 1}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.steps", "expected FIELD=VALUE"),
        ("run.stesp=3", "did you mean 'steps'"),
        ("run.steps.more=3", "'steps' is no section"),
        ("run.steps=many", "run.steps must be"),
        ("run.steps=[", "not YAML"),
    ],
)
def test_wrong_changes_are_told(recipe, change, said):
    done = run("train", recipe, "--set", change)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split()), done.output


def test_a_recipe_that_learns_and_one_that_does_not(recipe):
    found = overfit(load_recipe(recipe), steps=30)
    assert found.steps == 30 and found.learns and "The recipe learns" in found.told
    still = overfit(load_recipe(recipe, {"optimizer.lr": 1e-12}), steps=2)
    assert not still.learns and "optimizer.lr" in still.told
    assert not Overfit(1.0, float("nan"), 3).learns
    assert overfit(load_recipe(recipe), steps=5, seconds=0.0).steps == 1


def test_check_writes_nothing_and_a_run_is_extended(recipe, tmp_path):
    done = run("train", recipe, "--check")
    assert done.exit_code == 0 and "one batch, 100 steps" in done.output and not (tmp_path / "outputs").exists()
    assert "step 2:" in run("train", recipe).output
    assert "step 5:" in run("train", recipe, "--extend", "5").output
    lines = (tmp_path / "outputs/toy/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5


def test_the_plan_tells_tokens_per_parameter_and_hours(recipe):
    said = run("train", recipe, "--plan").output
    assert "per parameter" in said and "FLOP, computed:" in said and "h on an H100" in said
