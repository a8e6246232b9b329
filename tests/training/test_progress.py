"""A run tells how far it is: a bar where somebody looks on, lines in files and pipes."""

import sys

from imgdit.training import progress
from imgdit.training.progress import Progress


def test_pipes_get_lines_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 12.0, 13.0, 24.0, 25.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    run = Progress("run", 5)
    for step in range(1, 6):
        run.update()
        run.note(step, f"loss {step / 10:.4f}", last=step == 5)
    run.close()
    told = capsys.readouterr().err.splitlines()
    assert told == [f"run: step {step} of 5, loss 0.{step}000" for step in (2, 4, 5)]


def test_terminals_get_a_bar_and_other_processes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for silent in (False, True):
        run = Progress("run", 2, 1, silent=silent)
        run.update()
        run.note(2, "loss 0.1000", last=True)
        run.close()
        told = capsys.readouterr().err
        assert told == "" if silent else ("2/2" in told and "loss 0.1000" in told and "step 2" not in told)
