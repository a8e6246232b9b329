"""Training runs that are killed by SIGKILL at every stage, and go on. Run by test_resume.py in a process of its own.

Each run is a fork of this process, which has imported everything but not started anything.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from forks import forked
from training.toy import global_noise, recipe, toy_train

from imgdit.io.checkpoints import latest_checkpoint, read_state, read_tensors

STEPS, EVERY = 5, 2
SECTIONS = {
    "run": {"steps": STEPS, "checkpoint_every": EVERY, "accumulation": 2, "evaluate_every": 2, "keep": 1},
    "schedule": {"warmup": 2},
    "ema": {"decay": 0.9},
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder, *, resume=False, objective=global_noise, stop_at=None):
    torch.set_num_threads(1)
    toy_train(recipe(folder, **SECTIONS), objective=objective, resume=resume, stop_at=stop_at)


def killed_in_step(call):
    """An objective that does not come back from its call number `call`."""
    calls = 0

    def objective(*arguments):
        nonlocal calls
        calls += 1
        output = global_noise(*arguments)
        if calls == call:
            output.loss.register_hook(lambda grad: die())  # in the middle of the backward pass
        return output

    return objective


def killed_in_write(folder, number):
    """Die at the file operation of this number that makes, flushes, renames or removes something in the checkpoints'
    folder. Python reports them before they happen; reading the checkpoint that the run went on from is none."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        path = str(arguments[0]) if arguments else ""
        reads = event == "open" and (path.endswith("/latest") or f"/step-{EVERY:08d}/" in path)
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and not reads:
            seen += str(folder / "checkpoints") in path or event in ("os.remove", "os.rmdir")
            if seen == number:
                die()

    sys.addaudithook(hook)


def final(folder) -> dict[str, bytes]:
    """Everything that the last checkpoint holds, but the name of the folder."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint.name == f"step-{STEPS:08d}", checkpoint
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    files["state.json"] = files["state.json"].replace(str(folder).encode(), b"")
    return files


def check(folder, expected, what):
    got = final(folder)
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name] == expected[name], f"{what}: {name} differs"


def main(root: Path):
    whole = root / "whole"
    assert forked(lambda: run(whole)) == 0
    expected = final(whole)
    print("files", *sorted(expected), flush=True)

    folder = root / "step"
    assert forked(lambda: run(folder, objective=killed_in_step(2 * 3 + 1))) == -signal.SIGKILL
    assert latest_checkpoint(folder / "checkpoints").name == f"step-{EVERY:08d}"
    assert forked(lambda: run(folder, resume=True)) == 0
    check(folder, expected, "killed in step 4")
    assert (folder / "metrics.jsonl").read_text().count("\n") == (whole / "metrics.jsonl").read_text().count("\n")
    print("killed in a step: bitwise", flush=True)

    begun = root / "begun"
    assert forked(lambda: run(begun, stop_at=EVERY)) == 0
    seen = set()
    for number in range(1, 100):
        folder = root / f"write-{number}"
        shutil.copytree(begun, folder)

        def work(folder=folder, number=number):
            killed_in_write(folder, number)
            run(folder, resume=True, stop_at=2 * EVERY)

        status = forked(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        left = latest_checkpoint(folder / "checkpoints")
        for name in read_state(left)["files"]:
            read_tensors(left / name)
        seen.add(left.name)
        assert forked(lambda folder=folder: run(folder, resume=True)) == 0
        check(folder, expected, f"killed at file operation {number}")
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names == {"latest", f"step-{STEPS:08d}"}, names
    print(f"killed at {number - 1} file operations: bitwise, went on from {sorted(seen)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
