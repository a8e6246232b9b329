"""Thousands of wrong inputs for all that reads files of others; hammer.py says what none of them may cause."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.loaders import LOADERS

HERE = Path(__file__).parent
LEAST = 5000
"""Inputs of a whole run."""


def hammer(folder, names, fraction, seed=0):
    done = subprocess.run(
        [sys.executable, HERE / "hammer.py", folder, ",".join(names), str(fraction), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-4000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one["loader"] for one in told] == list(names)
    return told


def test_some_wrong_inputs(tmp_path):
    hammer(tmp_path / "fuzz", LOADERS, 0.02, seed=1)


@pytest.mark.slow
def test_thousands_of_wrong_inputs(tmp_path):
    told = hammer(tmp_path / "fuzz", LOADERS, 1.0)
    print(*told, sep="\n")
    assert sum(one["inputs"] for one in told) >= LEAST
    for one in told:
        assert one["slowest"] < 5 and one["peak_mib"] < 2048, one
        refused = sum(count for outcome, count in one["outcomes"].items() if outcome.startswith("refused"))
        assert refused > one["inputs"] / 20, one  # they really were wrong
