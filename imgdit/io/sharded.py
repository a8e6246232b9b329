"""Parts of a checkpoint of which every process writes what it holds, by `torch.distributed.checkpoint`.

    <checkpoint>/<part>/shard-00001-….safetensors    rows of tensors, with their places in the file's header

What N processes wrote, M processes read: each takes the rows it holds from whichever files have them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

try:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
except ImportError:  # an older PyTorch
    HuggingFaceStorageReader = HuggingFaceStorageWriter = None  # type: ignore[assignment, misc]


class ShardError(OSError):
    """Shards cannot be written or read; the message says why, and which process failed first."""


def require_shards() -> None:
    """Refuse to start what could not be written in the end.

    Raises:
        ImportError: PyTorch is too old.
    """
    if HuggingFaceStorageWriter is None:
        raise ImportError(
            "sharded checkpoints as safetensors need a newer PyTorch than "
            f"{torch.__version__}; update it, or set fsdp_state_dict_type: FULL_STATE_DICT in accelerate's file"
        )


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write each process's part of sharded tensors. All processes together; the folder must be there.

    Raises:
        ShardError: on every process, if one could not write.
    """
    require_shards()
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise _as_shard_error(error) from error


def load_shards(folder: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors, sharded over any number of processes or whole, from what `write_shards` wrote.

    Raises:
        ShardError: on every process, if a file is damaged or a tensor is missing or of another shape.
    """
    require_shards()
    # One process of several may read alone: nobody waits for it.
    alone = not any(isinstance(tensor, DTensor) for tensor in into.values())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*intent is to (load|save) in a single process")  # it is
            dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        raise _as_shard_error(error) from error


def shard_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Whole shape and dtype of each tensor; nothing where there is no such folder."""
    if not folder.is_dir():
        return {}
    require_shards()
    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tuple(metadata.size), metadata.properties.dtype) for name, metadata in found.items()}


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, put together on the CPU; nothing where there is no such folder."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shard_shapes(folder).items()}
    if tensors:
        load_shards(folder, tensors)
    return tensors


def _as_shard_error(error: CheckpointException) -> ShardError:
    rank, (cause, _) = min(error.failures.items())
    return ShardError(f"process {rank}: {cause}")
