"""Page below the tabs: what μP does to activations and to the best learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from imgdit.apps.demo import limits, widgets
from imgdit.apps.demo.holder import DEVICE, Holder
from imgdit.mup.coordinates import CoordinateCheck
from imgdit.training import load_recipe

WIDTHS = (64, 96, 128, 192, 256)
"""That the check may be run at here: multiples of its head dimension that take seconds on a laptop."""
PLOTS = {
    "coordinates/coordinates.png": "imgdit mup coord-check",
    "transfer/transfer.png": "imgdit mup transfer --quick",
}
"""Images in the folder of the results, and the commands that make them."""


def build(holder: Holder, results: Path) -> None:
    """Lay the page out.

    Args:
        results: folder that `imgdit mup …` wrote to.
    """
    gr.Markdown(
        "Under μP activations, and with them the best learning rate, do not move with the width. The check trains a "
        "small backbone for a few steps at each width and draws mean |activation|: level lines on the left, rising "
        "ones on the right."
    )
    with gr.Row():
        with gr.Column(min_width=240):
            widths = gr.CheckboxGroup(list(WIDTHS), value=[64, 128, 192], label="Widths")
            steps = gr.Slider(2, 6, 3, step=1, label="Steps")
            run = gr.Button("Check", variant="primary")
            table = gr.Dataframe(headers=["module", "μP", "standard"], label="Slopes at the last step", max_height=260)
        with gr.Column(min_width=280):
            status = widgets.status()
            plot = widgets.result("Coordinate check", square=False)
    with gr.Row(elem_classes="heading"):
        missing = gr.Markdown(_missing(results))
        refresh = gr.Button("Look for results again", size="sm")
    recorded = gr.Gallery(
        _recorded(results), label="Recorded results", columns=2, object_fit="contain", interactive=False,
        visible=bool(_recorded(results)), type="filepath",
    )  # fmt: skip

    @limits.refusing(status)
    def coordinate_check(widths: list[int], steps: int, person: gr.Request) -> Iterator[tuple[Any, Any, str]]:
        """Run the coordinate check.

        Args:
            widths: at least two of 64, 96, 128, 192, 256.
            steps: forward passes, with an update between two.

        Returns:
            the plot, per module the slopes under μP and under the standard parametrisation, and how far it is.
        """
        from imgdit.mup.plots import plot_coordinates
        from imgdit.training.coordinate_check import coordinate_check as check

        chosen = sorted({limits.whole(width, "a width", WIDTHS[0], WIDTHS[-1]) for width in widths or ()})
        if len(chosen) < 2 or not set(chosen) <= set(WIDTHS):
            raise limits.Refused(f"choose at least two widths of {', '.join(map(str, WIDTHS))}, got {chosen}")
        number = limits.whole(steps, "steps", 2, 6)
        yield gr.skip(), gr.skip(), "Training small backbones."
        with holder.busy(person):
            found = check(load_recipe("mup/coordinates"), chosen, steps=number, seeds=1)
        holder.folder.mkdir(parents=True, exist_ok=True)
        path = plot_coordinates(found, holder.new_file())
        yield str(path), _slopes(found["mup"], found["standard"]), "Done."

    @limits.refusing()
    def recorded_plots() -> tuple[Any, str]:
        """The plots that `imgdit mup` wrote: coordinate check and learning-rate transfer.

        Returns:
            files with the commands that made them, and what is missing.
        """
        found = _recorded(results)
        return gr.Gallery(found, visible=bool(found)), _missing(results)

    run.click(
        coordinate_check, [widths, steps], [plot, table, status],
        api_name="coordinate_check", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    refresh.click(recorded_plots, None, [recorded, missing], api_name="recorded_plots", queue=False)


def _recorded(results: Path) -> list[tuple[str, str]]:
    return [(str(results / name), command) for name, command in PLOTS.items() if (results / name).is_file()]


def _missing(results: Path) -> str:
    missing = [f"`{command}` makes {name}" for name, command in PLOTS.items() if not (results / name).is_file()]
    return f"Not in `{results}` yet: {'; '.join(missing)}." if missing else ""


def _slopes(mup: CoordinateCheck, standard: CoordinateCheck) -> list[list[str]]:
    return [
        [ours.module, *("" if s.at_end is None else f"{s.at_end:+.2f}" for s in (ours, theirs))]
        for ours, theirs in zip(mup.slopes(), standard.slopes())
    ]
