"""People's own images by the thousand: defects, kills, and how fast the second run starts."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import rope_config, tiny_pipeline
from tiny_images import DEFECTS, ODDITIES, write_folder
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.data.linter import check
from imgdit.data.sources import open_rows
from imgdit.io.checkpoints import latest_checkpoint, read_state
from imgdit.training.user_images import UserImages, UserImagesSettings

HERE = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny pipeline: 4 pixels per token."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def run(*command):
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def taken(folder):
    """Number of a batch -> its rows, for each time that it was taken."""
    lines = [line for path in folder.glob("rows-*.txt") for line in path.read_text().splitlines()]
    return [(number, rows) for number, *rows in (tuple(map(int, line.split())) for line in lines)]


@pytest.mark.slow
def test_two_thousand_images_with_every_defect(tmp_path, model):
    """5 % of each kind: the linter finds each, and training takes every other row exactly once per epoch, on one and
    on two processes, killed and resumed."""
    count, each = 2000, 100
    said = write_folder(tmp_path / "data", count, dict.fromkeys((*DEFECTS, *ODDITIES), each))
    report = check(open_rows(tmp_path / "data"), min_side=8)
    assert Counter(p.kind for p in report.problems) == Counter(dict.fromkeys(DEFECTS, each))
    assert {p.name: p.kind for p in report.problems if p.kind != "duplicate"} == {
        name: kind for name, kind in said.items() if kind in DEFECTS and kind != "duplicate"
    }
    usable = count - each * len(DEFECTS)
    arguments = {"path": str(tmp_path / "data"), "model": model, "cache": str(tmp_path / "cache"), "base": 16}
    arguments |= {"samples": 8, "max_broken": 0.5}
    epoch = UserImages(UserImagesSettings(**arguments)).index.batches_per_epoch
    steps = -(-2 * epoch // 2)
    for ranks in (1, 2):
        folder = tmp_path / f"ranks-{ranks}"
        folder.mkdir()
        recipe = {
            "run": {"folder": str(folder), "steps": steps, "batch_size": 2, "accumulation": 3 - ranks}
            | {"checkpoint_every": 20, "tracker": "none"},
            "model": {"arguments": rope_config(num_layers=1, num_single_layers=1)},
            "data": {"name": "user_images", "arguments": arguments},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        program = (*(TORCHRUN if ranks == 2 else ()), HERE / "every_row.py", folder / "recipe.yaml", folder)
        assert run(*program, 105).returncode != 0
        kept = read_state(latest_checkpoint(folder / "checkpoints"))["samples"]
        first = [batch for batch in taken(folder) if batch[0] < kept]
        assert 0 < kept <= 104 and len(taken(folder)) > len(first)  # what came after the checkpoint is done again
        for path in folder.glob("rows-*.txt"):
            path.unlink()
        done = run(*program, -1)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        batches = sorted(first + taken(folder))
        assert [number for number, _ in batches] == list(range(2 * steps))
        for n in range(2):
            rows = Counter(row for number, rows in batches if number // epoch == n for row in rows)
            assert rows == Counter(range(usable))


@pytest.mark.slow
def test_the_second_run_over_ten_thousand_rows_starts_at_once(tmp_path, model):
    (tmp_path / "data").mkdir()
    noise = np.random.default_rng(0)
    lines = []
    for i in range(10_000):
        name = f"{i:05d}.png"
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "data" / name)
        lines.append(json.dumps({"file_name": name, "text": f"a {('red', 'green', 'blue')[i % 3]} cube"}))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    arguments = {"path": str(tmp_path / "data"), "model": model, "cache": str(tmp_path / "cache"), "base": 8}
    recipe = {
        "run": {"folder": str(tmp_path / "run"), "steps": 1, "batch_size": 1, "tracker": "none"},
        "model": {"arguments": rope_config(num_layers=1, num_single_layers=1)},
        "data": {"name": "user_images", "arguments": {**arguments, "samples": 4, "ratio": 1.0}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    seconds = []
    for n in range(2):
        started, worked = time.perf_counter(), time.process_time()
        command = ["train", str(tmp_path / "recipe.yaml"), "--folder", str(tmp_path / f"run-{n}")]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        seconds.append((time.perf_counter() - started, time.process_time() - worked))
    print(f"the first run took {seconds[0]} s, the second {seconds[1]} s: by the clock and of the processor")
    assert seconds[1][1] < 5  # of the processor: other work on the machine does not count
