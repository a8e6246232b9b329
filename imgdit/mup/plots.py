"""Images of the coordinate check and of a learning-rate sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgdit.mup.coordinates import CoordinateCheck
from imgdit.mup.optimum import Curve
from imgdit.mup.roles import Parametrisation
from imgdit.plotting import panels, save_figure

TITLES: dict[Parametrisation, str] = {"mup": "μP", "standard": "standard parametrisation"}


def plot_coordinates(checks: Mapping[Parametrisation, CoordinateCheck], path: str | Path) -> Path:
    """Mean |activation| against width at the last step, a line per module; a panel per parametrisation."""
    figure, axes = panels(len(checks))
    for axis, (name, check) in zip(axes, checks.items()):
        for module, steps in check.means.items():
            output = module == "output"
            style: dict[str, Any] = {"color": "black", "linewidth": 2.5} if output else {"linewidth": 0.8}
            axis.plot(check.widths, steps[-1], marker=".", label="output" if output else None, **style)
        axis.set(title=f"{TITLES[name]}, step {len(steps)}", xlabel="width", ylabel="mean |activation|")
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(check.widths, labels=map(str, check.widths), minor=False)
        axis.legend()
    return save_figure(figure, path)


def plot_curves(curves: Mapping[Parametrisation, list[Curve]], path: str | Path) -> Path:
    """Loss against learning rate, a line per width, its optimum marked; a panel per parametrisation."""
    figure, axes = panels(len(curves))
    for axis, (name, lines) in zip(axes, curves.items()):
        for curve in lines:
            (line,) = axis.plot(curve.log2lr, curve.loss, marker=".", label=f"width {curve.width}")
            if curve.optimum is not None:
                axis.plot(curve.optimum.log2lr, curve.optimum.loss, marker="*", markersize=14, color=line.get_color())
        axis.set(title=TITLES[name], xlabel="log2 learning rate", ylabel="held-out loss", yscale="log")
        axis.legend()
    return save_figure(figure, path)
