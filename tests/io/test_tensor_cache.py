import multiprocessing
import os
import signal

import pytest
import torch

from imgdit.io import atomic as files
from imgdit.io.tensor_cache import TensorCache, tensor_key

MADE_BY = {"model": "abc"}


def value(number):
    return torch.full((3,), float(number))


def write(folder, start, count, die_at=None):
    """One process's share; of the numbers that two processes make, both write the same."""
    cache = TensorCache(folder, MADE_BY, shard_bytes=40)
    for number in range(start, start + count):
        if number == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        cache.add(tensor_key(number), value(number))
    cache.flush()


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=write, args=arguments)
    process.start()
    return process


def test_what_is_added_is_there_in_the_next_run(tmp_path):
    cache = TensorCache(tmp_path, MADE_BY)
    cache.add("a", value(1))
    assert "a" in cache and torch.equal(cache.read("a"), value(1)) and not list(tmp_path.glob("*.safetensors"))
    cache.flush()
    again = TensorCache(tmp_path, MADE_BY)
    assert len(again) == 1 and torch.equal(again.read("a"), value(1))
    with pytest.raises(KeyError):
        again.read("b")


def test_keys_tell_everything_apart():
    parts = [("picture", "x", (1, 2)), ("picture", "x", (12,)), ("picture", "x1", 2), ("picturex", (1, 2))]
    assert len({tensor_key(*part) for part in parts}) == 4


def test_processes_share_a_folder(tmp_path):
    """Four writers that overlap, one of which is killed in the middle."""
    processes = [start(tmp_path, n * 10, 20, 35 if n == 2 else None) for n in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL, 0]
    cache = TensorCache(tmp_path, MADE_BY)
    assert len(cache) == 50
    assert all(torch.equal(cache.read(tensor_key(n)), value(n)) for n in range(50))


def test_filling_sees_what_others_made(tmp_path):
    first, second = TensorCache(tmp_path, MADE_BY), TensorCache(tmp_path, MADE_BY)
    with first.filling():
        first.add("a", value(1))
    assert "a" not in second
    with second.filling():
        assert "a" in second


def test_another_model_is_refused(tmp_path):
    TensorCache(tmp_path, MADE_BY)
    with pytest.raises(ValueError, match=r"says .*'abc'.* but the model is .*'xyz'.*choose another folder"):
        TensorCache(tmp_path, {"model": "xyz"})


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path, 0, 5)
    cache = TensorCache(tmp_path, MADE_BY)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache.add("new", value(9))
    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", full)
        with pytest.raises(ValueError, match=r"No space left on device.*are complete"):
            cache.flush()
    again = TensorCache(tmp_path, MADE_BY)
    assert len(again) == 5 and "new" not in again and not [p for p in tmp_path.iterdir() if "half" in p.name]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", *[".safetensors"] * 2]


def test_a_damaged_file_is_named(tmp_path):
    write(tmp_path, 0, 3)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    damaged = rf"{path.name} is damaged .*delete it if it is there, what it held is made again"
    with pytest.raises(ValueError, match=damaged):
        TensorCache(tmp_path, MADE_BY)
    path.unlink()
    assert len(TensorCache(tmp_path, MADE_BY)) < 3
