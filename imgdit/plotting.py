"""Figures that commands write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(columns: int, rows: int = 1, *, fraction: bool = True) -> tuple[Figure, list[Any]]:
    """A figure and its axes, row by row; `share`: the panels of a row have one y axis.

    Raises:
        ImportError: without matplotlib, with what to install.
    """
    figure = _figure(5.5 * columns, 4.2 * rows, layout="constrained")
    axes = figure.subplots(rows, columns, sharey="row" if fraction else False, squeeze=False)
    return figure, list(axes.flat)


def blank(
    width: float, height: float, horizontal: tuple[float, float], vertical: tuple[float, float]
) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and one axes without lines that fills it, for diagrams.

    Args:
        width, height: in inches.
        horizontal, vertical: coordinates of the left and right edge, and of the bottom and top edge.

    Raises:
        ImportError: without matplotlib, with what to install.
    """
    figure = _figure(width, height)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(horizontal)
    axes.set_ylim(vertical)
    return figure, axes


def _figure(width: float, height: float, **options: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "imgdit[plots]"') from error
    return Figure(figsize=(width, height), **options)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write an image; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
