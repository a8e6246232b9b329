"""Parts of checkpoints that are written as shards. Two processes, and moves between numbers of them, are in
test_more_machines.py; here one process holds the only shard."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from imgdit.io.checkpoints import (
    CheckpointError,
    begin_checkpoint,
    check_architecture,
    latest_checkpoint,
    read_state,
    read_tensors,
    save_checkpoint,
    save_sharded,
)


@pytest.fixture
def tensors():
    """A sharded tensor and a whole one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, [Shard(0)]), torch.ones(3)
    finally:
        dist.destroy_process_group()


def save(folder, step, tensors):
    sharded, whole = tensors
    begun = begin_checkpoint(folder, step, ("model",))
    save_sharded(begun, {"model": {"block.weight": sharded}})
    return save_checkpoint(folder, step, {"model": {"block.bias": whole}}, {"step": step}, 2, begun=begun)


def test_shards_and_files_are_one_part(tmp_path, tensors):
    checkpoint = save(tmp_path, 5, tensors)
    assert latest_checkpoint(tmp_path) == checkpoint
    (shard,) = (name for name in read_state(checkpoint)["files"] if name != "model.safetensors")
    assert shard.startswith("model/shard-00001")
    read = read_tensors(checkpoint / "model.safetensors")
    expected = {"block.weight": torch.arange(10.0).reshape(5, 2), "block.bias": torch.ones(3)}
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
    check_architecture(checkpoint / "model.safetensors", expected)
    with pytest.raises(CheckpointError, match=r"'block.weight' is \(5, 2\) .* expected \(6, 2\)"):
        check_architecture(checkpoint / "model.safetensors", expected | {"block.weight": torch.ones(6, 2)})
    with pytest.raises(CheckpointError, match=r"this one has no 'block.weight'"):
        check_architecture(checkpoint / "model.safetensors", {"block.bias": torch.ones(3)})


def test_a_shard_that_is_lost_or_cut(tmp_path, tensors):
    checkpoint = save(tmp_path, 5, tensors)
    (shard,) = (checkpoint / "model").iterdir()
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"shard-00001.* is damaged: it has"):
        read_state(checkpoint)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"shard-00001.* is missing"):
        read_state(checkpoint)


def test_a_shard_that_cannot_be_written_leaves_the_last_checkpoint(tmp_path, tensors):
    before = save(tmp_path, 5, tensors)
    begun = begin_checkpoint(tmp_path, 10, ("model",))
    (begun / "model").rmdir()
    (begun / "model").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=r"could not write .*step-00000010: process 0: .*step-00000005; make room"
    ):
        save_sharded(begun, {"model": {"block.weight": tensors[0]}})
    assert latest_checkpoint(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step-00000005",
    ]
    with pytest.raises(CheckpointError, match="step-00000005 is the latest checkpoint already"):
        begin_checkpoint(tmp_path, 5)
