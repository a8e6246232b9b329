"""Files that are written once and read by many processes: whole or not there, and of a known maker."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from imgdit.io.safe_json import read_json

INDEX = "index.json"
"""What the files of a folder were made with."""


@contextmanager
def written_whole(path: Path, single_writer: bool = False) -> Iterator[Path]:
    """A file to write beside `path`; it takes the name of `path` when all is written and on the disk.

    Args:
        path: of the file that appears whole or not at all.
        single_writer: no other process writes this file, so the rest of one that was killed is written over.

    Raises:
        ValueError: the disk is full or refuses. What was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{'new' if single_writer else os.getpid()}")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"could not write {path}: {error}; files written before it are complete") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None) -> None:
    """A safetensors file that appears whole or not at all.

    Args:
        header: its metadata.
    """
    with written_whole(path) as temporary:
        save_file(dict(tensors), temporary, metadata=None if header is None else dict(header))


def write_text(path: Path, text: str, single_writer: bool = False) -> None:
    """A UTF-8 file that appears whole or not at all, with `\\n` at the ends of lines on every system."""
    with written_whole(path, single_writer) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and flushes no file that is open to be read
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
