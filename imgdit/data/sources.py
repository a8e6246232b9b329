"""What rows can come from."""

from __future__ import annotations

import os
from pathlib import Path

from imgdit.data.folders import choose_split, folder_rows
from imgdit.data.hub import HUB, hub_rows, local_rows
from imgdit.data.listing import list_folder
from imgdit.data.rows import Columns, Rows
from imgdit.data.shards import is_pattern, shard_files, shard_rows
from imgdit.io.paths import at_home

_SAVED = ("dataset_info.json", "dataset_dict.json")
_OF_DATASETS = (".parquet", ".arrow")
"""Endings of tables that are the data also where images lie beside them."""
_TABLES = (*_OF_DATASETS, ".zip", ".csv", ".jsonl", ".json", ".lance", ".h5", ".hdf5")
"""Endings of files that the `datasets` library makes tables of."""


def open_rows(path: str | Path, columns: Columns | None = None, split: str = "train") -> Rows:
    """Rows of any source; no image is read.

    Args:
        path: a folder of images, with `metadata.jsonl` (.csv, .json) or with captions beside them; a folder, a file or
            a pattern of webdataset shards ("images-{000..007}.tar"); a folder that `datasets` saved or loads; or
            "hub:owner/name", a data set on the Hub. `~` is the home folder.
        columns: for sources that name theirs otherwise.
        split: of a source that has several.

    Raises:
        ValueError: nothing is there, or unknown columns.
    """
    columns = columns or Columns()
    name = str(path)
    if name.startswith(HUB):
        return hub_rows(name.removeprefix(HUB), columns, split)
    name = at_home(name)
    place = Path(name)
    if not place.is_dir():
        if files := shard_files(name):
            return shard_rows(files, columns, name)
        raise ValueError(_nothing(name))
    if any((place / file).is_file() for file in _SAVED):
        return local_rows(name, columns, split)
    listing = list_folder(place)
    at_top = [file for file in listing.metadata if "/" not in file]
    files = [] if at_top else shard_files(name)
    if files:
        return shard_rows(files, columns, name, listing.strangers)
    if not listing.metadata and not listing.captions and any(f.lower().endswith(_OF_DATASETS) for f in listing.others):
        return local_rows(name, columns, split)
    if listing.images or listing.metadata:
        listing, notes = choose_split(place, listing, split)
        rows = folder_rows(listing, columns)
        return rows._replace(source=name, notes=(*notes, *rows.notes))
    if any(file.lower().endswith(_TABLES) for file in listing.others):
        return local_rows(name, columns, split)
    raise ValueError(
        f"there is no data at {name!r}: the folder holds no image, no metadata.jsonl and no .tar file"
        + (f", only {', '.join(listing.others[:5])}" if listing.others else "")
    )


def _nothing(name: str) -> str:
    """Why there is no data where neither a folder nor shards are."""
    here = f"the working directory is {os.getcwd()}"
    if os.path.isfile(name):
        return f"there is no data at {name!r}: it is a file and no .tar; name the folder that it lies in"
    if is_pattern(name):
        return f"there is no data at {name!r}: not every shard of that pattern is a .tar file here ({here})"
    hint = "a data set on the Hub is named hub:owner/name"
    return f"there is no data at {name!r}: there is no such file or folder ({here}); {hint}"
