"""What a recipe asks of people's data, for those who look at the data first."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from imgdit.cameras import scale_positions
from imgdit.data.rows import Columns, Problem, Row
from imgdit.images.preprocess import check_preprocessor
from imgdit.training.recipe import Recipe


class DataNeeds(NamedTuple):
    """What the rows of a recipe must have."""

    path: str
    columns: Columns
    split: str
    min_side: int
    """Pixels of an image's shorter side."""
    samples: int
    """Rows of a batch."""
    views: int
    cameras: bool
    condition: str | None
    preprocessor: str | None
    preprocessor_options: dict[str, Any]

    def unfit(self, row: Row) -> Problem | None:
        """Why a sound row cannot be trained on."""
        if self.condition is not None and self.preprocessor is None and self.condition not in row.conditions:
            message = f"it has no condition {self.condition!r}, and no preprocessor is named that would compute it"
            return Problem(row.name, "no condition", message)
        return unfit(row, self.views, self.cameras)

    def lacking(self, rows: Sequence[Row], usable: int) -> list[str]:
        """What keeps the recipe from being trained on rows that are sound, in sentences."""
        found = []
        if usable < self.samples:
            found.append(f"a batch takes {self.samples} rows (data.arguments.samples), {usable} are usable")
        computed = [row for row in rows if self.preprocessor is not None and self.condition not in row.conditions]
        if computed:
            assert self.preprocessor is not None
            try:
                check_preprocessor(self.preprocessor, self.preprocessor_options)
            except (ImportError, ValueError) as error:
                found.append(f"{len(computed):,} rows have no {self.condition!r}, which is computed: {error}")
        return found


def needs_of(recipe: Recipe, dataset: Any) -> DataNeeds:
    """What a recipe asks of its data.

    Args:
        recipe: on people's own images.
        dataset: its data set's class, whose defaults count where the recipe says nothing.

    Raises:
        ValueError: it is not trained on people's own images.
    """
    if recipe.data.name != "own_pictures":
        raise ValueError(f"the recipe's data is {recipe.data.name!r}; only own_pictures are people's own files")
    given = {name: p.default for name, p in inspect.signature(dataset).parameters.items()} | recipe.data.arguments
    return DataNeeds(
        given["path"], Columns(given["columns"], tuple(given["ignore"])), given["source_split"],
        least_side(given["min_side"], given["base"]), given["samples"], given["views"], given["cameras"],
        given["condition"], given["preprocessor"], given["preprocessor_options"],
    )  # fmt: skip


def least_side(min_side: int, base: int) -> int:
    """Pixels that an image's shorter side must have: what the recipe says, or half of what it is trained at."""
    return min_side or base // 2


def unfit(row: Row, views: int, cameras: bool) -> Problem | None:
    """Why a sound row has not the views that were asked for."""
    if len(row.frames) < views - 1:
        return Problem(row.name, "frames", f"{views} views were asked for; it has {1 + len(row.frames)}")
    if not cameras:
        return None
    if row.cameras is None:
        return Problem(row.name, "cameras", "cameras were asked for; it has none")
    try:
        scale_positions(row.cameras[:views])
    except ValueError as error:
        return Problem(row.name, "cameras", str(error))
    return None
