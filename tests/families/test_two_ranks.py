"""Training on stock transformers by two processes: the same as by one."""

import json
import socket

import pytest
import tiny_flux2
import tiny_krea2
import tiny_qwen_image
import tiny_z_image
import torch
from families.two_ranks import rank, steps, trained_model

from imgdit.io.checkpoints import find_checkpoint, read_tensors

TINY = (tiny_flux2, tiny_qwen_image, tiny_z_image, tiny_krea2)
CASES = {name: case for tiny in TINY for name, case in tiny.CASES.items()}


def by_two(folder, kind, work, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.start_processes(_started, (folder, kind, work, *args), nprocs=2, start_method="fork")


def _started(number, *args):
    rank(number, 2, *args)


RUNS = [(name, kind) for name in CASES for kind in ("ddp", "fsdp2") if "klein" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_two_ranks_train_as_one(tmp_path, name, kind, checkpointing):
    """Two steps of four images, whose losses, norms of gradients and weights are compared."""
    one, two = tmp_path / "one", tmp_path / "two"
    steps(CASES[name], one, checkpointing)
    by_two(tmp_path, kind, steps, CASES[name], two, checkpointing)
    first, second = (read_tensors(find_checkpoint(folder) / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert max((first[key] - second[key]).abs().max() for key in first) < 1e-5
    begun = dict(trained_model(CASES[name]).named_parameters())
    assert max((first[key] - begun[key]).abs().max() for key in first) > 1e-3
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
    for a, b in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        assert a.keys() == b.keys() and "loss" in a
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
