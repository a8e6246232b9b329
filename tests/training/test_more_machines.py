"""Runs that move between numbers of processes, and the configurations that start them."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from tiny import rope_config, tiny_pipeline
from tiny_images import write_folder

from imgdit import MMDiT
from imgdit.io.checkpoints import latest_checkpoint, read_state, read_tensors

HERE = Path(__file__).parent
CONFIGS = files("imgdit.configs") / "accelerate"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def launch(folder, name):
    """`accelerate launch` with a packaged configuration, but two processes on a CPU."""
    folder.mkdir(exist_ok=True)
    settings = json.loads((CONFIGS / name).read_text())
    path = folder / name
    path.write_text(json.dumps({**settings, "use_cpu": True, "num_processes": 2}))
    return ("-m", "accelerate.commands.launch", "--config_file", path)


def run(*command):
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "launched"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_a_checkpoint_moves_from_two_to_one_to_two(tmp_path, kind, launched):
    """20 steps of one process; and of two, then one, then two, at the same global batch. The packaged configuration
    of FSDP2 writes shards."""
    one, moved = tmp_path / "one", tmp_path / "moved"
    program = HERE / "moving_ranks.py"
    launcher = launch(tmp_path / "settings", "fsdp2.json") if launched else TORCHRUN
    run(program, one, 2, "one", 20)
    for stop_at, ranks in ((7, 2), (13, 1), (20, 2)):
        if ranks == 2:
            run(*launcher, program, moved, 1, kind, stop_at)
        else:
            run(program, moved, 2, "one", stop_at)
        checkpoint = latest_checkpoint(moved / "checkpoints")
        state = read_state(checkpoint)
        assert state["ranks"] == ranks
        shards = [name for name in state["files"] if name.startswith("model/")]
        assert len(shards) == (2 if launched and ranks == 2 else 0)
        if shards:  # no rank wrote the whole
            whole = sum(tensor.nbytes for tensor in read_tensors(checkpoint / "model.safetensors").values())
            assert max(state["files"][name] for name in shards) < 0.6 * whole
    assert len(losses(one)) == len(losses(moved)) == 20
    assert max(abs(a - b) for a, b in zip(losses(one), losses(moved))) < 1e-5


@pytest.mark.slow
def test_two_processes_train_on_user_images_as_one_does(tmp_path):
    """`accelerate launch` with the packaged configuration of DDP, against one process."""
    write_folder(tmp_path / "data", 10)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    arguments = {"path": str(tmp_path / "data"), "model": str(tmp_path / "model"), "base": 16, "samples": 2}
    recipe = {
        "run": {"steps": 20, "batch_size": 2, "log_every": 1, "tracker": "none"},
        "model": {"arguments": rope_config(num_layers=1, num_single_layers=1, axes_dims_rope=[4, 6, 6])},
        "optimizer": {"eps": 1e-4},
    }
    for name, accumulation, launcher in (("one", 2, ()), ("two", 1, launch(tmp_path / "settings", "ddp.json"))):
        made = recipe | {
            "data": {"name": "user_images", "arguments": {**arguments, "cache": str(tmp_path / name / "c")}}
        }
        made["run"] = recipe["run"] | {"folder": str(tmp_path / name), "accumulation": accumulation}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(made))
        run(*launcher, "-m", "imgdit.apps.cli", "train", path)
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


@pytest.mark.parametrize("name", [entry.name for entry in CONFIGS.iterdir() if entry.name.endswith(".json")])
def test_accelerate_reads_the_configurations(tmp_path, name):
    (tmp_path / name).write_text((CONFIGS / name).read_text())
    settings = load_config_from_file(str(tmp_path / name))
    assert settings.num_processes >= 2 and settings.mixed_precision == "no"  # the recipe's run.mixed_precision counts
    if name == "fsdp2.json":
        assert settings.distributed_type == "FSDP" and settings.fsdp_config["fsdp_version"] == 2
        assert settings.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",") == MMDiT._no_split_modules
