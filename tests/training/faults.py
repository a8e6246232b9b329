"""Training runs that something happens to. Run by test_faults.py in a process of its own, because every run is a fork
of this process, which has imported everything but not started anything.

    python faults.py kills FOLDER COUNT | full_disk FOLDER | lost_shard FOLDER | lost_worker FOLDER | no_number FOLDER
                     | two_writers FOLDER
"""

import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from training.killed_runs import check, final, forked
from training.toy import batch, collate, global_noise, recipe, toy_train

from imgdit.io.checkpoints import CheckpointError, latest_checkpoint, read_state, read_tensors
from imgdit.scenes.latents import SceneLatents
from imgdit.training import Batches
from imgdit.training.loop import NonFiniteLoss
from imgdit.training.run_checkpoint import RunCheckpoint

STEPS = 8
SECTIONS = {
    "run": {"steps": STEPS, "checkpoint_every": 2, "accumulation": 2, "evaluate_every": 3, "sample_every": 2},
    "schedule": {"warmup": 2},
    "ema": {"decay": 0.9},
}
PHASES = ("start", "step", "checkpoint", "sampling")


def run(folder, *, sections=SECTIONS, **options):
    torch.set_num_threads(1)
    options.setdefault("objective", global_noise)
    return toy_train(recipe(folder, **sections), resume=True, **options)


def refused(work, kind, *parts):
    """What a run says when it stops; all of `parts` must be in it."""
    try:
        work()
    except kind as error:
        for part in parts:
            assert part in str(error), f"{part!r} is not in: {error}"
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


# Killed at random moments


class Phases:
    """What a run is doing, in memory that it shares with whoever kills it."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 2)

    @contextmanager
    def inside(self, name):
        before = self.memory[0]
        self.memory[0] = PHASES.index(name)
        self.memory[1] = (self.memory[1] + 1) % 256  # the number of phases so far
        try:
            yield
        finally:
            self.memory[0] = before

    @property
    def now(self):
        return PHASES[self.memory[0]]

    def watched(self, folder):
        """A run that tells what it does."""
        save = RunCheckpoint.save

        def told(*arguments):
            with self.inside("checkpoint"):
                save(*arguments)

        def sample(step):
            """Draws as a careless sampler would, for about as long as a step takes."""
            with self.inside("sampling"):
                until = time.perf_counter() + 0.03
                while time.perf_counter() < until:
                    torch.randn(64, 64) @ torch.randn(64, 64)

        def objective(*arguments):
            with self.inside("step"):
                return global_noise(*arguments)

        RunCheckpoint.save = told  # in the fork only
        self.memory[:2] = b"\0\0"
        run(folder, objective=objective, held_out=[batch(2)], on_sample=sample)


def kill_somewhere(child, phases, wanted, rng):
    """SIGKILL a child in a phase of the wanted kind, at a moment nobody chose; what it was doing, or `None` if it was
    done before."""
    number, doing = rng.randrange(3 * STEPS), None
    while doing is None:
        while phases.memory[1] < number or (wanted and phases.now != wanted):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0
                return None
            time.sleep(0.0002)
        time.sleep(rng.random() * 0.02)
        if wanted in (None, phases.now):  # on a busy machine this process may have slept through the phase
            doing = phases.now
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return doing if status else None


def kills(root, count):
    """Runs that are killed again and again until they are through, compared with one that was left alone."""
    rng, phases, killed, compared = random.Random(0), Phases(), Counter(), 0
    whole = root / "whole"
    assert forked(lambda: phases.watched(whole)) == 0
    expected = final(whole)
    while sum(killed.values()) < count:
        folder = root / f"run-{compared}"
        deaths = 0
        while True:
            wanted = (None, *PHASES[1:])[sum(killed.values()) % 4]
            child = os.fork()
            if child == 0:
                try:
                    phases.watched(folder)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
                os._exit(0)
            # After some deaths a run is left alone, so that there are several whole ones to compare.
            if deaths >= 5 or sum(killed.values()) >= count:
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                break
            doing = kill_somewhere(child, phases, wanted, rng)
            if doing is None:
                break
            deaths += 1
            killed[doing] += 1
        check(folder, expected, f"killed {deaths} times")
        lines = [(f / "metrics.jsonl").read_text().count("\n") for f in (folder, whole)]
        assert lines[0] == lines[1], lines
        compared += 1
    print(f"killed {sum(killed.values())} times {dict(killed)}; {compared} runs bitwise", flush=True)


# Disks


def full_disk(root):
    """A real disk of 2.4 MiB, of which a checkpoint takes 1.1, and which is made larger afterwards: a tmpfs in a mount
    namespace of this process."""
    disk, roomy = root / "disk", root / "roomy"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2400k", "tmpfs", disk], check=True)

    def stopped():
        told = refused(lambda: run(disk / "run"), CheckpointError, "No space left on device", "bytes", "make room")
        assert "The last complete checkpoint is" in told, told
        kept = latest_checkpoint(disk / "run" / "checkpoints")
        for name in read_state(kept)["files"]:
            read_tensors(kept / name)
        print("stopped:", told.split(". It needs")[0].rpartition("/")[2], flush=True)

    assert forked(lambda: run(roomy)) == 0
    assert forked(stopped) == 0
    assert forked(stopped) == 0  # tried again, nothing is lost either
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    assert forked(lambda: run(disk / "run")) == 0
    check(disk / "run", final(roomy), "after a full disk")
    print("full disk: bitwise", flush=True)


class FromShards:
    """The toy's samples, moved by a number that is read from a shard on the disk."""

    def __init__(self, folder):
        self.latents = SceneLatents(folder)

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        sample = [torch.randn(shape, generator=generator) for shape in ((8, 16), (4, 32), (32,))]
        sample[0] += self.latents.read(index, "pictures", 0, 0).mean()
        return sample


def lost_shard(root):
    """A file of the data goes away during a run, which says so, and goes on when it is back."""
    from imgdit.scenes import latents

    latents.SHARD = 2
    data = root / "data"
    data.mkdir(parents=True)
    for shard in range(6):
        save_file(
            {"pictures": torch.full((2, 1, 1, 1, 2, 2), float(shard)).half()}, data / f"train-{shard:05d}.safetensors"
        )

    def trained(folder, **options):
        run(folder, batches=Batches(FromShards(data), collate, seed=3, workers=options.pop("workers", 0)), **options)

    assert forked(lambda: trained(root / "whole")) == 0
    for workers in (0, 1):
        folder, away = root / f"run-{workers}", root / "away"
        assert forked(lambda folder=folder: trained(folder, stop_at=2)) == 0

        def stopped(folder=folder, away=away, workers=workers):
            dataset = FromShards(data)
            missing = data / "train-00004.safetensors"
            missing.rename(away)  # after the run looked at what there is
            work = partial(run, folder, batches=Batches(dataset, collate, seed=3, workers=workers))
            told = refused(work, ValueError, str(missing), "Bring it back")
            print("lost shard:", told.strip().splitlines()[-1], flush=True)

        assert forked(stopped) == 0
        assert latest_checkpoint(folder / "checkpoints").name >= "step-00000002"
        away.rename(data / "train-00004.safetensors")
        assert forked(lambda folder=folder, workers=workers: trained(folder, workers=workers)) == 0
        check(folder, final(root / "whole"), "after a lost shard")
    print("lost shard: bitwise", flush=True)


class WithVictim:
    """Samples whose worker process does not survive the one of number 7, while a file is there."""

    def __init__(self, poison):
        self.poison = poison

    def __len__(self):
        return 11

    def __getitem__(self, index):
        if index == 7 and torch.utils.data.get_worker_info() is not None and self.poison.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(index)
        return [torch.randn(shape, generator=generator) for shape in ((8, 16), (4, 32), (32,))]


def lost_worker(root):
    """A process that prepares data is killed, as a machine out of memory does."""
    root.mkdir(parents=True)
    poison = root / "poison"

    def trained(folder, workers, **options):
        run(folder, batches=Batches(WithVictim(poison), collate, seed=3, workers=workers), **options)

    def stopped(folder):
        told = refused(lambda: trained(folder, 2), RuntimeError, "a data worker is gone", "data.workers")
        print("lost worker:", told.splitlines()[-1], flush=True)

    assert forked(lambda: trained(root / "whole", 0)) == 0
    poison.touch()
    assert forked(lambda: stopped(root / "run")) == 0
    poison.unlink()
    assert forked(lambda: trained(root / "run", 2)) == 0
    check(root / "run", final(root / "whole"), "after a lost worker")
    print("lost worker: bitwise", flush=True)


def no_number(root):
    """A batch whose loss is NaN: it is kept, the checkpoint before it is as it was, and the run can go on from there
    with sound data."""

    def bad(samples):
        made = collate(samples)
        made.tokens[0, 0, 0] = float("nan")
        return made

    assert forked(lambda: run(root / "whole")) == 0
    assert forked(lambda: run(root / "run", stop_at=4)) == 0
    kept = latest_checkpoint(root / "run" / "checkpoints")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}

    def stopped():
        batches = Batches(toy_samples(), bad, seed=3)
        refused(lambda: run(root / "run", batches=batches), NonFiniteLoss, "step 5", str(kept), "bad-batch")

    assert forked(stopped) == 0
    with safe_open(root / "run" / "bad-batch-step-00000005-rank-0.safetensors", framework="pt") as file:
        assert file.get_tensor("0.tokens").isnan().any()
    assert latest_checkpoint(root / "run" / "checkpoints") == kept
    assert before == {path.name: path.read_bytes() for path in kept.iterdir()}
    assert forked(lambda: run(root / "run")) == 0
    check(root / "run", final(root / "whole"), "after a loss that is no number")
    print("no number: bitwise", flush=True)


def toy_samples():
    from training.toy import Tokens

    return Tokens()


def two_writers(root):
    """The second run of a folder is refused while the first lives, and goes on when that was killed."""
    pause = mmap.mmap(-1, 2)
    whole, folder = root / "whole", root / "run"
    assert forked(lambda: run(whole)) == 0

    def slow(*arguments):
        pause[0] = 1
        while not pause[1]:
            time.sleep(0.01)
        return global_noise(*arguments)

    child = os.fork()
    if child == 0:
        run(folder, objective=slow)
        os._exit(0)
    while not pause[0]:
        time.sleep(0.01)
    second = partial(refused, lambda: run(folder), ValueError, "is being written by process", str(child), "run.folder")
    assert forked(second) == 0
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert forked(lambda: run(folder)) == 0
    check(folder, final(whole), "after another writer was killed")
    print("two writers: refused, then bitwise", flush=True)


if __name__ == "__main__":
    what, root, *rest = sys.argv[1:]
    globals()[what](Path(root), *map(int, rest))
