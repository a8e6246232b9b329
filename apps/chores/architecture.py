"""The diagram of the architecture in docs/: frames, who attends to whom, and the attention calls that follow.

The matrix and the calls are read from a `FrameLayout`, so that the diagram shows what the library computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.plotting import blank, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Segment(NamedTuple):
    """A row of the diagram."""

    title: str
    about: str
    colour: str


CELLS = (2, 2)
"""Tokens of each frame of the diagram."""
FRAMES = (
    Frame(CELLS),
    Frame(CELLS, sigma=0.0, index=1.0),
    Frame(CELLS, sigma=0.0, adapter="depth", sees="joint"),
    Frame(CELLS, sigma=0.0, adapter="canny", sees="self"),
)
SEGMENTS = (
    Segment("prompt", "text tokens", "#5b7083"),
    Segment("target", "noise level σ of the schedule", "#d9822b"),
    Segment("conditioning frame", "σ = 0, no adapter", "#4c9a6a"),
    Segment('condition "depth"', "σ = 0, own LoRA, joint", "#7a5ea8"),
    Segment('condition "canny"', "σ = 0, own LoRA, independent", "#b5497c"),
)
"""The text and then `FRAMES`."""
EMPTY, INK, FAINT = "#f1f1f1", "#222222", "#666666"
LARGE, SMALL = 12.5, 10.5
LEFT, RIGHT = 0.0, 5.45
"""Where the matrix begins and where the column of attention calls does; a segment is 1 wide and 1 high."""


def draw_architecture(file: str | Path) -> Path:
    """Draw the diagram.

    Raises:
        ImportError: without matplotlib.
    """
    layout = FrameLayout.build(FRAMES, text_length=CELLS[0] * CELLS[1])
    figure, axes = blank(10.8, 6.2, (-5.05, 10.25), (8.05, -0.75))
    _frames(axes)
    _matrix(axes, layout)
    _calls(axes, layout)
    _block(axes)
    return save_figure(figure, file)


def _frames(axes: Axes) -> None:
    axes.text(-4.9, -0.3, "1. Frames", fontsize=LARGE, weight="bold", color=INK)
    for row, segment in enumerate(SEGMENTS):
        for cell in range(CELLS[0] * CELLS[1]):
            # The text is a line of tokens, a frame is a grid of them.
            line, place = (0.5, cell) if row == 0 else divmod(cell, CELLS[1])
            _box(axes, -4.9 + 0.24 * place, row + 0.26 + 0.24 * line, 0.21, 0.21, segment.colour)
        axes.text(-3.75, row + 0.42, segment.title, fontsize=LARGE, color=segment.colour, weight="bold", va="center")
        axes.text(-3.75, row + 0.72, segment.about, fontsize=SMALL, color=FAINT, va="center")


def _matrix(axes: Axes, layout: FrameLayout) -> None:
    axes.text(LEFT, -0.3, "2. Layout: row attends to column", fontsize=LARGE, weight="bold", color=INK)
    for row in range(len(SEGMENTS)):
        for column, key in enumerate(SEGMENTS):
            seen = bool(layout.visible[row, column])
            _box(axes, LEFT + column + 0.04, row + 0.04, 0.92, 0.92, key.colour if seen else EMPTY)
    for column, key in enumerate(SEGMENTS):
        word = key.title.replace("condition ", "").replace("conditioning frame", "cond.\nframe").strip('"')
        axes.text(LEFT + column + 0.5, 5.08, word, fontsize=SMALL, color=key.colour, ha="center", va="top")


def _calls(axes: Axes, layout: FrameLayout) -> None:
    """A bracket and two lines per group of rows that attend to the same set."""
    axes.text(RIGHT, -0.3, "3. Groups: one attention call each", fontsize=LARGE, weight="bold", color=INK)
    size = CELLS[0] * CELLS[1]
    for number, group in enumerate(layout.groups, start=1):
        rows = [row for part in group.queries for row in range(part.start // size, part.stop // size)]
        keys = [row for part in group.keys for row in range(part.start // size, part.stop // size)]
        top, bottom = rows[0] + 0.1, rows[-1] + 0.9
        axes.plot([RIGHT - 0.2, RIGHT, RIGHT, RIGHT - 0.2], [top, top, bottom, bottom], color=INK, linewidth=1.4)
        middle = (top + bottom) / 2
        count = "all segments" if len(keys) == len(SEGMENTS) else f"{len(keys)} of {len(SEGMENTS)} segments"
        count = "itself only" if keys == rows else count
        axes.text(RIGHT + 0.25, middle - 0.15, f"call {number}: {count}", fontsize=LARGE, color=INK, va="center")
        note = "keys and values are cached" if set(rows) <= layout.frozen else "computed in every step"
        axes.text(RIGHT + 0.25, middle + 0.2, note, fontsize=SMALL, color=FAINT, va="center")


def _block(axes: Axes) -> None:
    axes.text(-4.9, 6.42, "4. Through the blocks", fontsize=LARGE, weight="bold", color=INK)
    steps = (
        ("modulation", "one vector\nper frame"),
        ("projections", "base weights: all tokens\nLoRA: its own rows"),
        ("attention", "one call per group,\nno dense mask"),
        ("MLP", "base weights: all tokens\nLoRA: its own rows"),
        ("readout", "velocity of\nthe target"),
    )
    width, gap = 2.72, 0.36
    for number, (title, about) in enumerate(steps):
        left = -4.9 + number * (width + gap)
        _box(axes, left, 6.65, width, 1.3, "#e8edf2")
        axes.text(left + width / 2, 6.93, title, fontsize=LARGE, color=INK, ha="center", va="center", weight="bold")
        axes.text(left + width / 2, 7.47, about, fontsize=SMALL, color=INK, ha="center", va="center")
        if number:
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2}
            axes.annotate("", (left, 7.3), (left - gap, 7.3), arrowprops=arrow)


def _box(axes: Any, left: float, top: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, height, facecolor=colour, edgecolor="none"))
