import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgdit.io.checkpoints import latest_checkpoint, read_tensors

HERE = Path(__file__).parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(*launcher, folder, accumulation, kind):
    done = subprocess.run(
        [sys.executable, *launcher, HERE / "two_ranks.py", folder, str(accumulation), kind],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
            "ACCELERATE_USE_CPU": "true",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def difference(a, b, name):
    first, second = (read_tensors(latest_checkpoint(folder / "checkpoints") / name) for folder in (a, b))
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(tmp_path, kind):
    """The same 4 samples per step: two ranks with one micro-batch each, one process with two; resumed half-way."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(folder=one, accumulation=2, kind="one")
    run("-m", *TORCHRUN, folder=two, accumulation=1, kind=kind)
    differences = {name: difference(one, two, f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
    assert all(value < 1e-5 for value in differences.values()), differences
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    for a, b in zip(*lines, strict=True):
        assert a["step"] == b["step"]
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
