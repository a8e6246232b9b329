"""What rows can come from."""

from __future__ import annotations

from pathlib import Path

from .folders import METADATA, folder_rows
from .hub import hub_rows
from .rows import Columns, Rows
from .shards import shard_files, shard_rows


def open_rows(path: str | Path, columns: Columns | None = None, split: str = "train") -> Rows:
    """Rows of any source; no picture is read.

    Args:
        path: a folder with `metadata.jsonl`; a folder, a file or a pattern of webdataset shards
            ("pictures-{000..007}.tar"); otherwise what `datasets.load_dataset` takes: a folder or an id on the Hub.
        columns: for sources that name theirs otherwise.
        split: of a `datasets` data set that has several.

    Raises:
        ValueError: nothing is there, or an unknown column.
    """
    columns = columns or Columns()
    if (Path(path) / METADATA).is_file():
        return folder_rows(Path(path), columns)
    if files := shard_files(str(path)):
        return shard_rows(files, columns, str(path))
    return hub_rows(str(path), columns, split)
