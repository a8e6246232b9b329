import json
import random
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import rope_config, tiny_mmdit
from training.toy import recipe, toy_train

from imgdit.io.checkpoints import (
    CheckpointError,
    check_architecture,
    latest_checkpoint,
    load_weights,
    read_state,
    read_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
)


def save(folder, step, keep=2, **tensors):
    return save_checkpoint(folder, step, {"model": tensors or {"a": torch.ones(4)}}, {"step": step}, keep)


def test_the_last_ones_stay(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 15):
        assert latest_checkpoint(tmp_path) != save(tmp_path, step) == latest_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000015"]
    assert read_state(tmp_path / "step-00000015")["step"] == 15


def test_only_safetensors_and_json(tmp_path):
    _, result = toy_train(recipe(tmp_path))
    names = sorted(path.name for path in result.checkpoint.iterdir())
    assert names == ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


def test_a_checkpoint_is_not_written_twice(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"step-00000005 is the latest checkpoint already"):
        save(tmp_path, 5)


def damage_truncate(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-8])
    return r"model.safetensors is damaged: it has [\d,]+ bytes instead of"


def damage_remove(path):
    (path / "model.safetensors").unlink()
    return r"model.safetensors is missing"


def damage_json(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:20])
    return r"state.json is damaged"


def damage_foreign(path):
    (path / "state.json").write_text(json.dumps({"format": "other-2"}))
    return r"state.json is not a checkpoint of this version.*got 'other-2'"


def damage_no_state(path):
    (path / "state.json").unlink()
    return r"is not a checkpoint: it has no state.json"


def damage_pointer(path):
    (path.parent / "latest").write_text("../somewhere")
    return r"latest names '../somewhere', which is no checkpoint"


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_remove, damage_json, damage_foreign, damage_no_state, damage_pointer]
)
def test_damage_is_named(tmp_path, damage):
    _, result = toy_train(recipe(tmp_path), stop_at=2)
    message = damage(result.checkpoint)
    with pytest.raises(CheckpointError, match=message):
        toy_train(recipe(tmp_path), resume=True)


def test_damage_of_the_same_size_is_named(tmp_path):
    path = save(tmp_path, 1) / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as safetensors"):
        read_tensors(path)


def test_another_architecture_is_refused_by_its_first_key(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, path)
    check_architecture(path, {"a": torch.ones(2), "b": torch.ones(3)})
    for expected, message in [
        ({"a": torch.ones(2), "b": torch.ones(4)}, r"'b' is \(3,\) torch.float32 there, expected \(4,\)"),
        ({"a": torch.ones(2), "b": torch.ones(3).half()}, r"expected \(3,\) torch.float16"),
        ({"a": torch.ones(2)}, r"this one has no 'b'"),
        ({"c": torch.ones(2), "d": torch.ones(2)}, r"it has no 'c'"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            check_architecture(path, expected)


def test_resume_and_loading_refuse_another_model(tmp_path):
    _, result = toy_train(recipe(tmp_path), stop_at=2)
    wider = tiny_mmdit(rope_config(num_layers=1, num_single_layers=1, num_attention_heads=4))
    with pytest.raises(CheckpointError, match=r"'x_embedder.weight' is \(32, 16\).*expected \(64, 16\)"):
        toy_train(recipe(tmp_path), model=wider, resume=True)
    with pytest.raises(CheckpointError, match=r"'x_embedder.weight' is \(32, 16\).*expected \(64, 16\)"):
        load_weights(wider, result.checkpoint)
    deeper = tiny_mmdit(rope_config(num_layers=2, num_single_layers=1))
    with pytest.raises(CheckpointError, match=r"it has no 'transformer_blocks.1"):
        load_weights(deeper, result.checkpoint)


def test_a_full_disk_loses_nothing(tmp_path):
    """A real refusal by the kernel: this process may not write files of more than 64 KiB for a moment."""
    kept = save(tmp_path, 1, a=torch.ones(8))
    before = (kept / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        with pytest.raises(CheckpointError) as error:
            save(tmp_path, 2, a=torch.ones(2**16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    for part in ("step-00000002", "262,144 bytes", "are free at", f"The last complete checkpoint is {kept}"):
        assert part in str(error.value), error.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert latest_checkpoint(tmp_path) == kept and (kept / "model.safetensors").read_bytes() == before
    assert save(tmp_path, 2) == latest_checkpoint(tmp_path)


def test_generators_go_back():
    torch.randn(3), np.random.normal(), random.gauss(0, 1)  # leaves a spare number in numpy's and Python's
    states = rng_state("here/")
    expected = [torch.randn(3), np.random.normal(size=3), [random.gauss(0, 1) for _ in range(3)]]
    set_rng_state(states, "here/")
    got = [torch.randn(3), np.random.normal(size=3), [random.gauss(0, 1) for _ in range(3)]]
    assert torch.equal(got[0], expected[0]) and (got[1] == expected[1]).all() and got[2] == expected[2]
