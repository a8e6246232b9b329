import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_two_ranks_equal_one_process():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HERE / "two_ranks.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for what in (
        "context parallel forward",
        "context parallel gradients",
        "one image",
        "tensor parallel forward, sincos",
    ):
        assert what in done.stdout
