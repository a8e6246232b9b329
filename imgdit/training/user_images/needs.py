"""What a recipe asks of people's data, for training and for those who look at the data first."""

from __future__ import annotations

from collections.abc import Sequence

from imgdit.cameras import scale_positions
from imgdit.data.rows import Problem, Row
from imgdit.images.preprocess import check_preprocessor
from imgdit.training.user_images.settings import UserImagesSettings


def unfit(row: Row, settings: UserImagesSettings) -> Problem | None:
    """Why a sound row cannot be trained on."""
    condition = settings.condition
    if condition is not None and settings.preprocessor is None and condition not in row.conditions:
        message = f"it has no condition {condition!r}, and no preprocessor is named that would compute it"
        return Problem(row.name, "no condition", message)
    return unfit_views(row, settings)


def unfit_views(row: Row, settings: UserImagesSettings) -> Problem | None:
    """Why a sound row has not the views that were asked for."""
    if len(row.frames) < settings.views - 1:
        message = f"{settings.views} views were asked for; it has {1 + len(row.frames)}"
        return Problem(row.name, "frames", message)
    if not settings.cameras:
        return None
    if row.cameras is None:
        return Problem(row.name, "cameras", "cameras were asked for; it has none")
    try:
        scale_positions(row.cameras[: settings.views])
    except ValueError as error:
        return Problem(row.name, "cameras", str(error))
    return None


def lacking(rows: Sequence[Row], usable: int, settings: UserImagesSettings) -> list[str]:
    """What keeps a recipe from being trained on rows that are sound, in words.

    Args:
        rows: of the data.
        usable: how many of them can be trained on.
    """
    found = []
    if usable < settings.samples:
        found.append(f"a batch takes {settings.samples} rows (data.arguments.samples), {usable} are usable")
    name = settings.preprocessor
    computed = [row for row in rows if settings.condition not in row.conditions] if name is not None else []
    if name is not None and computed:
        try:
            check_preprocessor(name, settings.preprocessor_options)
        except (ImportError, ValueError) as error:
            found.append(f"{len(computed):,} rows have no {settings.condition!r}, which is computed: {error}")
    return found
