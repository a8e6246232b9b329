"""Hashes of weights, to notice that something was computed with others. They stand in files: they stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

SAMPLED = 4096
"""Entries of a tensor that `sampled_hash` reads."""
BLOCK, BLOCKS = 64 << 10, 64
"""Bytes of a sample, and samples, that a large file's hash is made of."""


def weights_hash(*models: torch.nn.Module, dtype: torch.dtype | None = None, length: int = 16) -> str:
    """A hash of all weights and buffers of models.

    Args:
        dtype: what they are rounded to first, so that models that were saved in it have the same hash; `None`: as
            they are.
        length: hexadecimal digits.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            values = tensor.detach().cpu()
            values = values if dtype is None else values.to(dtype)
            digest.update(name.encode())
            digest.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:length]


def sampled_hash(model: torch.nn.Module) -> str:
    """A hash of evenly spaced weights of each tensor, rounded to bfloat16: a part of a second for any model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        count = min(tensor.numel(), SAMPLED)
        places = torch.arange(count, device=tensor.device) * tensor.numel() // count
        values = tensor.detach().flatten()[places].bfloat16().float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def folder_hash(folders: Sequence[Path]) -> str:
    """A hash of the files in folders; of a file above 4 MB its size, its head and evenly spaced samples. No two
    trainings leave the same."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            digest.update(f"{folder.name}/{path.relative_to(folder)}:{size};".encode())
            with open(path, "rb") as file:
                if size <= BLOCK * BLOCKS:
                    digest.update(file.read())
                    continue
                for n in range(BLOCKS):
                    file.seek(n * (size - BLOCK) // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
