"""What can happen to a training run, for real: it says so, loses nothing, and goes on to the same weights."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = 50
NAMESPACE = ("unshare", "--user", "--mount", "--map-root-user")
"""Lets anybody mount a disk of their own, where the kernel allows it."""


def play(what, *arguments, launcher=()):
    done = subprocess.run(
        [*launcher, sys.executable, HERE / "faults.py", what, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def can_mount():
    return shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_bitwise(tmp_path):
    told = play("kills", tmp_path, KILLS)
    print(told)
    assert f"killed {KILLS} times" in told
    found = dict(re.findall(r"'(\w+)': (\d+)", told))
    assert all(int(found[phase]) >= 5 for phase in ("step", "checkpoint", "sampling")), told


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="this kernel lets nobody mount a disk of their own")
def test_a_disk_that_is_full(tmp_path):
    assert "full disk: bitwise" in play("full_disk", tmp_path / "root", launcher=NAMESPACE)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lost_shard", "lost_worker", "no_number", "two_writers"])
def test_it_stops_with_a_sentence_and_goes_on(tmp_path, what):
    assert "bitwise" in play(what, tmp_path / "root")
