"""What a model was taught, as its folder tells: the sizes of its images, and whose words its prompts are made of.

`taught.json` beside `model_index.json`; folders of others have none.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from imgdit.io.safe_json import read_object
from imgdit.naming import check_choice, check_name

FILE = "taught.json"


@dataclass(frozen=True)
class Taught:
    """Sizes and words."""

    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height in pixels of the images it was trained on; empty: not known."""
    words: str | None = None
    """"scenes": the captions of `imgdit.scenes.captions` and nothing else. `None`: any words. How free-form prompts
    are read then, the tokenizer tells (`imgdit.prompts`)."""

    def __post_init__(self) -> None:
        check_choice("words", self.words, (None, "scenes"))
        for size in self.sizes:
            if len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
                raise ValueError(f"a size is width and height in pixels, got {size!r}")


def read_taught(folder: str | Path) -> Taught:
    """What a pipeline's folder tells; nothing known where it tells nothing.

    Raises:
        ValueError: the file is damaged, or says what is no part of it.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return Taught()
    values = read_object(path)
    for name in values:
        check_name(f"key of {path}", name, ("sizes", "words"))
    try:
        return Taught(tuple(tuple(size) for size in values.get("sizes", ())), values.get("words"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_taught(folder: str | Path, taught: Taught) -> None:
    """Write it into a pipeline's folder."""
    (Path(folder) / FILE).write_text(json.dumps(asdict(taught)) + "\n", encoding="utf-8")
