"""Figures that commands write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(columns: int, rows: int = 1, *, share: bool = True) -> tuple[Figure, list[Any]]:
    """A figure and its axes, row by row; `share`: the panels of a row have one y axis.

    Raises:
        ImportError: without matplotlib, with what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "imgdit[plots]"') from error
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey="row" if share else False, squeeze=False)
    return figure, list(axes.flat)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a picture; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
