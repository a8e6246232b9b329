"""Checkpoints that survive a kill at any moment, and from which training really goes on.

    <folder>/latest                    name of the newest complete checkpoint
    <folder>/step-00001000/
        model.safetensors              trained parameters and buffers, by name
        ema.safetensors                their running average, by the same names
        optimizer.safetensors          "<parameter>/<moment>"
        model/, ema/, optimizer/       the same, as far as tensors are sharded (`imgdit.io.sharded`)
        rng.safetensors                "rank<r>/<source>", states of the random number generators
        state.json                     step, samples seen, schedule, recipe, sizes of the files

No pickle. A checkpoint is written into a hidden folder beside, flushed to the disk and renamed; only then `latest`
is replaced. Parameters that are frozen are not stored: a run on top of a base model has to bring it.
"""

from __future__ import annotations

import json
import random
import re
import reprlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from imgdit.io.atomic import flush_to_disk, write_text
from imgdit.io.safe_json import inside, read_json
from imgdit.io.sharded import ShardError, read_shards, shard_shapes, write_shards
from imgdit.io.text import read_text

FORMAT = "imgdit-checkpoint-1"
_STATE = "state.json"
_LATEST = "latest"
_TEMPORARY = ".writing-"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file."""


def begin_checkpoint(folder: str | Path, step: int, parts: Sequence[str] = ()) -> Path:
    """The hidden folder in which the checkpoint of a step is written, made anew. One process only.

    Args:
        folder: of all checkpoints of the run.
        step: optimiser steps done.
        parts: those that get folders for shards.

    Raises:
        CheckpointError: there is one of this step, or the disk refuses.
    """
    folder = Path(folder)
    name = f"step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_TEMPORARY}*"):  # of a writer that was killed
            shutil.rmtree(leftover)
        for pointer in folder.glob(f".{_LATEST}.*"):
            pointer.unlink()
        if latest_checkpoint(folder) == folder / name:
            raise CheckpointError(
                f"{folder / name} is the latest checkpoint already; a second one of step {step} cannot be written"
            )
        temporary = folder / f"{_TEMPORARY}{name}"
        temporary.mkdir()
        for part in parts:
            (temporary / part).mkdir()
    except OSError as error:
        raise _unwritten(folder, name, error) from error
    return temporary


def save_sharded(temporary: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write every process's part of sharded tensors into what `begin_checkpoint` made. All processes together.

    Args:
        temporary: the folder.
        tensors: part -> sharded tensors by name.

    Raises:
        CheckpointError: on every process, if one could not write.
    """
    try:
        for part, group in tensors.items():
            write_shards(temporary / part, group)
    except ShardError as error:
        raise _unwritten(temporary.parent, temporary.name.removeprefix(_TEMPORARY), error) from error


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int,
    *,
    begun: Path | None = None,
) -> Path:
    """Write a checkpoint, make it the latest, delete all but the newest `keep`. One process only.

    Args:
        folder: of all checkpoints of the run.
        step: optimiser steps done.
        tensors: file name without ending -> tensors by name.
        state: JSON values.
        keep: checkpoints that stay.
        begun: what `begin_checkpoint` made, where shards have been written already.

    Raises:
        CheckpointError: the disk is full or refuses. What was there before is as it was.
    """
    folder, name = Path(folder), f"step-{step:08d}"
    final = folder / name
    temporary = begin_checkpoint(folder, step) if begun is None else begun
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    try:
        for file, group in tensors.items():
            path = temporary / f"{file}.safetensors"
            save_file({key: t.contiguous() for key, t in group.items()}, path, metadata={"format": "pt"})
            flush_to_disk(path)
        files = sorted(path for path in temporary.rglob("*.safetensors"))
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
        write_text(temporary / _STATE, json.dumps({"format": FORMAT, **state, "files": sizes}, indent=1))
        flush_to_disk(temporary)
        if final.exists():  # complete, but its writer was killed before it became the latest
            shutil.rmtree(final)
        temporary.rename(final)
        flush_to_disk(folder)
        write_text(folder / _LATEST, name, single_writer=True)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unwritten(folder, name, error, needed) from error
    complete = sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    for old in complete[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def _unwritten(folder: Path, name: str, error: Exception, needed: int | None = None) -> CheckpointError:
    """Take away what a failed write left, and say what to do."""
    shutil.rmtree(folder / f"{_TEMPORARY}{name}", ignore_errors=True)
    before = latest_checkpoint(folder)
    return CheckpointError(
        f"could not write {folder / name}: {error}. "
        + ("" if needed is None else f"It needs {needed:,} bytes, ")
        + f"{shutil.disk_usage(folder).free:,} are free at {folder}. "
        + (f"The last complete checkpoint is {before}; " if before else "There is no earlier checkpoint; ")
        + "make room and resume"
    )


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint, `None` if there is none yet.

    Raises:
        CheckpointError: the pointer names a checkpoint that is not there.
    """
    pointer = Path(folder) / _LATEST
    if not pointer.exists():
        return None
    name = read_text(pointer).strip()
    path = Path(folder) / name
    if not re.fullmatch(r"step-\d{8,}", name) or not path.is_dir():
        raise CheckpointError(f"{pointer} names {name!r}, which is no checkpoint in {folder}")
    return path


def find_checkpoint(folder: str | Path) -> Path:
    """The latest checkpoint of a run, of a folder of checkpoints, or the one checkpoint that the folder is.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    folder = Path(folder)
    checkpoint = latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder) or folder
    if not (checkpoint / _STATE).exists():
        raise CheckpointError(f"{folder} holds no checkpoint; train it first")
    return checkpoint


_KINDS: dict[str, Any] = {
    "step": int,
    "samples": int,
    "seen": int,
    "partial": bool,
    "recipe": dict,
    "files": dict,
    "ema_updates": (int, type(None)),
}


def read_state(checkpoint: str | Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON part, after checking that every file is there at its full size.

    Args:
        needs: entries that it must have.

    Raises:
        CheckpointError: something is missing, truncated, or not from imgdit.
    """
    path = Path(checkpoint) / _STATE
    try:
        state = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no {_STATE}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is not a checkpoint of this version: expected format {FORMAT!r}, got {got!r}")
    for name in ("files", "step", *needs, *(("seen",) if "seen" in state else ())):
        kind = _KINDS.get(name, object)
        if name not in state or not isinstance(state[name], kind) or (kind is int and not 0 <= state[name] < 2**63):
            raise CheckpointError(f"{path} is damaged: {name!r} is {reprlib.repr(state.get(name))}")
    for name, size in state["files"].items():
        try:
            file = inside(path.parent, name)
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if type(size) is not int:
            raise CheckpointError(f"{path} is damaged: the size of {name!r} is {reprlib.repr(size)}")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is damaged: it has {file.stat().st_size:,} bytes instead of {size:,}")
    return state


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, and of the shards in the folder of its name, whole and on the CPU.

    Raises:
        CheckpointError: a file is truncated or not safetensors.
    """
    try:
        return {**read_files(path), **read_shards(shards_of(path))}
    except ShardError as error:
        raise CheckpointError(f"{shards_of(path)} cannot be read: {error}") from error


def read_files(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of one file alone."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def shards_of(path: str | Path) -> Path:
    """Folder of the shards that belong to a file."""
    return Path(path).with_suffix("")


def read_shapes(path: str | Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every tensor of a file and of its shards, by name; no tensor is read.

    Raises:
        CheckpointError: the file is truncated or not safetensors.
    """
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(key)
                found[key] = (tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
        found |= shard_shapes(shards_of(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    return found


def check_architecture(path: str | Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse a weights file that is not of this model.

    Raises:
        CheckpointError: names the first key that is missing, too much, or of another shape or dtype.
    """
    found = read_shapes(path)
    for key, tensor in expected.items():
        if key not in found:
            raise CheckpointError(f"{path} is of another model: it has no {key!r}")
        shape, dtype = found[key]
        if shape != tuple(tensor.shape) or dtype != tensor.dtype:
            raise CheckpointError(
                f"{path} is of another model: {key!r} is {shape} {dtype} there, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise CheckpointError(f"{path} is of another model: this one has no {extra[0]!r}")


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool}


def load_weights(model: torch.nn.Module, checkpoint: str | Path, *, ema: bool = True) -> None:
    """Put a checkpoint's weights into a model of one process, for sampling or saving.

    Args:
        model: of the architecture that was trained, with its base weights if only a part was.
        checkpoint: one checkpoint, or the folder of all of them.
        ema: the running average, if the run kept one.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / _STATE).exists():
        checkpoint = latest_checkpoint(checkpoint) or checkpoint
    state, own = read_state(checkpoint, ("partial",)), model.state_dict()
    trained = read_tensors(checkpoint / "model.safetensors")
    # What was frozen in training is not in the file and keeps its base weights.
    expected = {key: tensor for key, tensor in own.items() if key in trained or not state["partial"]}
    check_architecture(checkpoint / "model.safetensors", expected)
    if ema and "ema.safetensors" in state["files"]:
        trained |= read_tensors(checkpoint / "ema.safetensors")
    model.load_state_dict(trained, strict=False)


# Random number generators


def rng_state(prefix: str = "") -> dict[str, torch.Tensor]:
    """States of this process's global generators (torch on CPU and every GPU, numpy, Python) as tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([float(value) for value in rest], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
    }
    assert (kind, version) == ("MT19937", 3)
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return {prefix + name: state for name, state in states.items()}


def set_rng_state(states: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Undo `rng_state`. A GPU that was not there is left as it is.

    Raises:
        CheckpointError: these are no states of generators.
    """
    try:
        torch.set_rng_state(states[f"{prefix}torch"])
        position, has_gauss, gauss = states[f"{prefix}numpy_rest"].tolist()
        keys = states[f"{prefix}numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
        spare = states[f"{prefix}python_rest"].item()
        words = tuple(states[f"{prefix}python"].tolist())
        random.setstate((3, words, None if spare != spare else spare))
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the states of the random generators are damaged: {error!r}") from error
    for i in range(torch.cuda.device_count()):
        if f"{prefix}cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"{prefix}cuda{i}"], i)
