"""Checkpoints that survive a kill at any moment, and from which training really goes on.

    <folder>/latest                    name of the newest complete checkpoint
    <folder>/step-00001000/
        model.safetensors              trained parameters and buffers, by name
        ema.safetensors                their running average, by the same names
        optimizer.safetensors          "<parameter>/<moment>"
        rng.safetensors                "rank<r>/<source>", states of the random number generators
        state.json                     step, samples seen, schedule, recipe, sizes of the files

No pickle. A checkpoint is written into a hidden folder beside, flushed to the disk and renamed; only then `latest`
is replaced. Parameters that are frozen are not stored: a run on top of a base model has to bring it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

FORMAT = "imgdit-checkpoint-1"
_STATE = "state.json"
_LATEST = "latest"
_TEMPORARY = ".writing-"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file."""


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint, make it the latest, delete all but the newest `keep`. One process only.

    Args:
        folder: of all checkpoints of the run.
        step: optimiser steps done.
        tensors: file name without ending -> tensors by name.
        state: JSON values.
        keep: checkpoints that stay.

    Raises:
        CheckpointError: the disk is full or refuses. What was there before is as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_TEMPORARY}*"):  # of a writer that was killed
        shutil.rmtree(leftover)
    name = f"step-{step:08d}"
    final, temporary = folder / name, folder / f"{_TEMPORARY}{name}"
    if latest_checkpoint(folder) == final:
        raise CheckpointError(
            f"{final} is the latest checkpoint already; a second one of step {step} cannot be written"
        )
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    try:
        temporary.mkdir()
        sizes = {}
        for file, group in tensors.items():
            path = temporary / f"{file}.safetensors"
            save_file({key: t.contiguous() for key, t in group.items()}, path, metadata={"format": "pt"})
            _sync(path)
            sizes[path.name] = path.stat().st_size
        _write_text(temporary / _STATE, json.dumps({"format": FORMAT, **state, "files": sizes}, indent=1))
        _sync(temporary)
        if final.exists():  # complete, but its writer was killed before it became the latest
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
        replace_text(folder / _LATEST, name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        before = latest_checkpoint(folder)
        raise CheckpointError(
            f"could not write {final}: {error}. It needs {needed:,} bytes, {free:,} are free at {folder}. "
            + (f"The last complete checkpoint is {before}; " if before else "There is no earlier checkpoint; ")
            + "make room and resume"
        ) from error
    complete = sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    for old in complete[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint, `None` if there is none yet.

    Raises:
        CheckpointError: the pointer names a checkpoint that is not there.
    """
    pointer = Path(folder) / _LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    path = Path(folder) / name
    if not re.fullmatch(r"step-\d{8,}", name) or not path.is_dir():
        raise CheckpointError(f"{pointer} names {name!r}, which is no checkpoint in {folder}")
    return path


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The JSON part, after checking that every file is there at its full size.

    Raises:
        CheckpointError: something is missing, truncated, or not from imgdit.
    """
    path = Path(checkpoint) / _STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no {_STATE}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is not a checkpoint of this version: expected format {FORMAT!r}, got {got!r}")
    for name, size in state["files"].items():
        file = path.parent / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is damaged: it has {file.stat().st_size:,} bytes instead of {size:,}")
    return state


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, on the CPU.

    Raises:
        CheckpointError: the file is truncated or not safetensors.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def check_architecture(path: str | Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse a weights file that is not of this model.

    Raises:
        CheckpointError: names the first key that is missing, too much, or of another shape or dtype.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for key, tensor in expected.items():
                if key not in keys:
                    raise CheckpointError(f"{path} is of another model: it has no {key!r}")
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype())
                if shape != tuple(tensor.shape) or dtype != tensor.dtype:
                    raise CheckpointError(
                        f"{path} is of another model: {key!r} is {shape} {dtype} there, "
                        f"expected {tuple(tensor.shape)} {tensor.dtype}"
                    )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    extra = sorted(keys - expected.keys())
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
    state, own = read_state(checkpoint), model.state_dict()
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
    """Undo `rng_state`. A GPU that was not there is left as it is."""
    torch.set_rng_state(states[f"{prefix}torch"])
    position, has_gauss, gauss = states[f"{prefix}numpy_rest"].tolist()
    keys = states[f"{prefix}numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    spare = states[f"{prefix}python_rest"].item()
    words = tuple(states[f"{prefix}python"].tolist())
    random.setstate((3, words, None if spare != spare else spare))
    for i in range(torch.cuda.device_count()):
        if f"{prefix}cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"{prefix}cuda{i}"], i)


# Writing


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    _write_text(temporary, text)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
