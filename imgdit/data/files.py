"""Files that are written once and read by many processes: whole or not there, and of a known maker."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from imgdit.untrusted import read_json

INDEX = "index.json"
"""What the files of a folder were made with."""


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file beside and rename it.

    Raises:
        ValueError: the disk is full or refuses; nothing is left of the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"could not write {path}: {error}. The shards before it are complete") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file beside and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"could not write {path}: {error}; what was there before still is") from error


def check_index(folder: Path, index: Mapping[str, Any], maker: str) -> None:
    """Note what a folder's files are made with, or compare with the note that is there.

    Args:
        maker: what to call who makes them.

    Raises:
        ValueError: they were made with something else.
    """
    path = folder / INDEX
    if not path.exists():
        write_text(path, json.dumps(index))
    found = read_json(path)
    if found != dict(index):
        raise ValueError(f"{path} says {found}, but the {maker} is {dict(index)}; choose another folder")
