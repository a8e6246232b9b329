"""Any data set of the `datasets` library, by its id or path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgdit.data.rows import CONDITIONS, VALUES, Columns, Problem, Row, Rows, gather, make_row
from imgdit.hub import find_dataset

KNOWN = ("image", "text", *CONDITIONS, "frames", "cameras", "focal_length", "repeats")
"""Columns: what `datasets` makes of `file_name`, `depth_file_name` and `frames_file_names`."""


@dataclass(frozen=True)
class CellBlob:
    """An image in a table."""

    table: Any
    row: int
    column: str
    place: int | None = None
    """In a cell of several images."""

    @property
    def stamp(self) -> str:
        return f"{self.table._fingerprint}:{self.row}:{self.column}:{self.place}"

    def read(self) -> bytes:
        cell = self.table[self.row][self.column]
        return _bytes(cell if self.place is None else cell[self.place])


HUB = "hub:"
"""What the name of a data set on the Hub begins with, so that no misspelt folder is ever taken for one."""


def hub_rows(name: str, columns: Columns, split: str) -> Rows:
    """Rows of a data set on the Hub, see `open_rows`.

    Raises:
        ValueError: no id, no such data set, or the Hub cannot be reached and it was not downloaded before.
    """
    if Path(name).exists():
        raise ValueError(f"{HUB}{name}: there is a folder {name!r} here too; leave out {HUB} to read that")
    return _read(name, f"{HUB}{name}", columns, split, lambda datasets: datasets.load_dataset(find_dataset(name)))


def local_rows(name: str, columns: Columns, split: str) -> Rows:
    """Rows of a folder that `datasets` saved, or can make a table of, see `open_rows`."""
    path = os.path.abspath(name)  # so that it is never taken for an id
    saved = Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file()

    def load(datasets: Any) -> Any:
        return datasets.load_from_disk(path) if saved else datasets.load_dataset(path)

    return _read(name, name, columns, split, load)


def _read(name: str, source: str, columns: Columns, split: str, load: Callable[[Any], Any]) -> Rows:
    """Rows of what the library `datasets` loads."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is neither a folder of images nor shards; other data sets are read by `datasets`: "
            "pip install 'imgdit[data]'"
        ) from error
    try:
        found = load(datasets)
    except Exception as error:  # the library raises its own, requests' and many others
        raise ValueError(f"there is no data at {source!r}: {error}") from error
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(f"{name} has no split {split!r}; its splits are {', '.join(found)}")
        found = found[split]
    if not isinstance(found, datasets.Dataset):
        raise ValueError(f"{name} is a {type(found).__name__}; only data sets on disk can be read by row")
    ours = columns.ours(name, found.column_names, KNOWN)
    if "image" not in ours:
        raise ValueError(f"{name} has no column 'image'; its columns are {', '.join(found.column_names)}; rename one")
    table = found.select_columns(list(ours.values()))
    for theirs, feature in table.features.items():
        table = table.cast_column(theirs, _encoded(datasets, feature))
    return gather(source, _rows(table, ours), rename="row {}".format)


def _encoded(datasets: Any, feature: Any) -> Any:
    """The feature with its images as bytes."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (list, datasets.Sequence)) or hasattr(feature, "feature"):
        inner = feature[0] if isinstance(feature, list) else feature.feature
        return datasets.List(datasets.Image(decode=False)) if isinstance(inner, datasets.Image) else feature
    return feature


def _rows(table: Any, ours: dict[str, str]) -> Iterator[Row | Problem]:
    words = [name for name in VALUES if name in ours]
    columns = table.select_columns([ours[name] for name in words]) if words else None
    filled = {name: table.with_format("arrow")[:][ours[name]] for name in ours if name in (*CONDITIONS, "image")}
    present = {name: [not null for null in column.is_null().to_pylist()] for name, column in filled.items()}
    counts = [len(cell or ()) for cell in table[ours["frames"]]] if "frames" in ours else [0] * len(table)
    for number in range(len(table)):
        if not present["image"][number]:
            yield Problem(str(number), "missing", f"row {number} has no image")
            continue
        values: dict[str, Any] = {name: columns[number][ours[name]] for name in words} if columns is not None else {}
        conditions = {
            name: CellBlob(table, number, ours[name])
            for name, there in present.items()
            if name != "image" and there[number]
        }
        frames = [CellBlob(table, number, ours["frames"], place) for place in range(counts[number])]
        yield make_row(str(number), values, CellBlob(table, number, ours["image"]), conditions, frames)


def _bytes(cell: Any) -> bytes:
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
