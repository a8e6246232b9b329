import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import rope_config, tiny_mmdit
from training.toy import global_noise, recipe, toy_train

from imgdit.io.checkpoints import latest_checkpoint, load_weights
from imgdit.training.objectives.flow_matching import flow_matching

HERE = Path(__file__).parent


def test_a_killed_run_goes_on_bitwise(tmp_path):
    """Weights, average, moments, schedule and generators, after SIGKILL in a step and at every stage of a write."""
    done = subprocess.run(
        [sys.executable, HERE / "killed_runs.py", tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "files ema.safetensors model.safetensors optimizer.safetensors rng.safetensors state.json" in done.stdout
    assert "killed in a step: bitwise" in done.stdout
    kills = re.search(r"killed at (\d+) file operations: bitwise, went on from \[(.*)\]", done.stdout)
    assert int(kills[1]) >= 15 and kills[2] == "'step-00000002', 'step-00000004'", kills[0]


@pytest.mark.parametrize("change", [{"accumulation": 2}, {"batch_size": 4}])
def test_stop_and_go_on_equals_one_run(tmp_path, change):
    """N steps, resume and N steps equal 2N steps; the stop is in the middle of an epoch of 11 samples."""
    run = {"steps": 6, "checkpoint_every": 2, **change}
    whole, _ = toy_train(recipe(tmp_path / "whole", run=run), objective=global_noise)
    half = recipe(tmp_path / "half", run=run)
    _, result = toy_train(half, objective=global_noise, stop_at=3)
    assert result.step == 3
    resumed, result = toy_train(half, objective=global_noise, resume=True)
    assert result.step == 6
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_parameter_without_a_gradient_has_no_moments_to_put_back(tmp_path):
    """It gets its first gradient after the run was resumed."""
    run = {"steps": 5, "checkpoint_every": 1}

    def late(first):
        """The text head counts from step 3 on."""
        steps = iter(range(first, 9))

        def objective(model, scheduler, batch, generator):
            output = flow_matching(model, scheduler, batch, generator)
            if next(steps) < 3:
                return output
            return output._replace(loss=output.loss + model.text_proj_out.weight.square().sum())

        return objective

    def model():
        return tiny_mmdit(rope_config(num_layers=1, num_single_layers=1, text_vocab_size=5))

    whole, _ = toy_train(recipe(tmp_path / "whole", run=run), model=model(), objective=late(0))
    half = recipe(tmp_path / "half", run=run)
    toy_train(half, model=model(), objective=late(0), stop_at=2)
    resumed, _ = toy_train(half, model=model(), objective=late(2), resume=True)
    assert not torch.equal(whole.text_proj_out.weight, model().text_proj_out.weight)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


def test_resume_of_a_finished_run_does_nothing(tmp_path):
    whole, first = toy_train(recipe(tmp_path))
    again, second = toy_train(recipe(tmp_path), resume=True)
    assert second.checkpoint == first.checkpoint and second.metrics == {}
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_resume_reports_what_changed_in_the_recipe(tmp_path, caplog):
    toy_train(recipe(tmp_path), stop_at=2)
    toy_train(recipe(tmp_path, optimizer={"lr": 0.5}), resume=True)
    assert "optimizer.lr (now 0.5, was 0.001)" in caplog.text


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    toy_train(recipe(tmp_path), stop_at=2)
    with pytest.raises(ValueError, match=r"holds a run.*step-00000002.*resume=True"):
        toy_train(recipe(tmp_path))


def test_weights_of_a_checkpoint_load_into_a_plain_model(tmp_path):
    trained, result = toy_train(recipe(tmp_path))
    plain = type(trained)(**trained.config)
    load_weights(plain, result.checkpoint, ema=False)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), plain.parameters()))
    load_weights(plain, tmp_path / "checkpoints")  # the latest, averaged
    assert not torch.equal(trained.proj_out.weight, plain.proj_out.weight)
    assert latest_checkpoint(tmp_path / "checkpoints") == result.checkpoint


def test_resume_keeps_a_run_without_average_apart(tmp_path):
    toy_train(recipe(tmp_path, ema={"decay": 0.0}), stop_at=2)
    with pytest.raises(ValueError, match="without an average"):
        toy_train(recipe(tmp_path), resume=True)
