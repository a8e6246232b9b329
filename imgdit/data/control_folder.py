"""A folder of conditions beside a folder of images, as trainers of LoRAs keep them: equal names belong together.

training_images/4_chair/0001.png  training_images/4_chair/0001.txt
training_images/control/0001.png  or  training_images/control/4_chair/0001.jpg
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath

from imgdit.data.listing import list_folder, some
from imgdit.data.rows import FileBlob, Note, Rows

CONTROL = "control"
"""Folder of conditions inside a folder of images, by its usual name."""


def with_conditions(rows: Rows, path: str | Path, control: str, condition: str) -> Rows:
    """Rows with the conditions of a folder. Rows of images inside that folder go, and rows that name a condition of
    their own keep it.

    Args:
        rows: of the folder `path`.
        path: of the images.
        control: folder of the conditions, inside `path` or anywhere else. A condition has the path or the name of its
            image; the ending may differ.
        condition: what they are, one of `imgdit.data.rows.CONDITIONS`.

    Raises:
        ValueError: there is no such folder, or a name in it stands for several images.
    """
    images = Path(path).expanduser()
    folder = next((one for one in (images / control, Path(control).expanduser()) if one.is_dir()), None)
    if folder is None:
        raise ValueError(f"there is no folder {control!r} of conditions, neither in {str(images)!r} nor here")
    inside = f"{folder.relative_to(images).as_posix()}/" if folder.is_relative_to(images) else None
    files = {_stem(file): FileBlob(folder / file) for file in list_folder(folder).images}
    names = Counter(PurePosixPath(stem).name for stem in files)
    by_name = {PurePosixPath(stem).name: stem for stem in files}
    kept, used = [], set()
    for row in rows.rows:
        if inside is not None and row.name.startswith(inside):
            continue
        stem = _stem(row.name)
        name = PurePosixPath(stem).name
        found = stem if stem in files else by_name.get(name)
        if found is not None and condition not in row.conditions:
            if stem not in files and names[name] > 1:
                raise ValueError(f"{folder} has {names[name]} conditions called {name!r}; which is {row.name}'s?")
            used.add(found)
            row = replace(row, conditions={**row.conditions, condition: files[found]})
        kept.append(row)
    left = [stem for stem in files if stem not in used]
    notes = [Note(str(folder), "left alone", f"{some(left, 'condition')} of no image")] if left else []
    problems = [problem for problem in rows.problems if inside is None or not problem.name.startswith(inside)]
    return rows._replace(rows=kept, problems=problems, notes=(*rows.notes, *notes))


def folder_of_trainers(images: Path) -> dict[str, str]:
    """Fields of a recipe on the data "user_images" for a folder as kohya's scripts and ComfyUI's trainer read it.

    Raises:
        ValueError: there is no such folder.
    """
    if not images.expanduser().is_dir():
        raise ValueError(f"there is no folder {str(images)!r} of images")
    control = {"data.arguments.control": CONTROL} if (images.expanduser() / CONTROL).is_dir() else {}
    return {"data.arguments.path": str(images), **control}


def _stem(file: str) -> str:
    """A path without the ending."""
    return PurePosixPath(file).with_suffix("").as_posix()
