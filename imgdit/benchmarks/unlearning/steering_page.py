"""The page of `imgdit bench sae-steering`: what comes out, in Markdown and as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imgdit.benchmarks.metrics import Interval, bootstrap
from imgdit.benchmarks.unlearning.detection import DIRECTIONS
from imgdit.benchmarks.unlearning.steering import SCALED, STEERED
from imgdit.io.atomic import write_text, written_whole
from imgdit.plotting import panels

WAYS = ("up", "down")
KEEPS = 0.8
"""Fraction of the asked label's probability that has to be left for an effect to count."""
DETECTS, STEERS = 0.9, 0.5
"""AUC, and change of probability, from which on the page says that something detects or steers."""
EQUAL = 0.02
"""Difference of probabilities up to which two are about the same."""
TITLES = {
    SCALED: "SAE features, scaled",
    "features": "SAE features, their decoder rows",
    "difference": "difference of means",
    "pca": "principal component",
    "random": "random direction",
}


def effect(curve: Mapping[str, Sequence[float]], way: str) -> float:
    """The largest change of the concept's probability in the wanted direction, among the strengths that leave `KEEPS`
    of the probability of the label of the other kind.

    Args:
        curve: "concept" and "kept", means at each strength, the first of which is 0.
        way: "up" or "down".
    """
    sign = 1 if way == "up" else -1
    floor = KEEPS * curve["kept"][0]
    clean = [value for value, kept in zip(curve["concept"], curve["kept"], strict=True) if kept >= floor]
    return max(sign * (value - curve["concept"][0]) for value in clean)


class Summary(NamedTuple):
    """Means over the concepts with 95 % intervals of a bootstrap over concepts, by hookpoint and name."""

    auc: dict[str, dict[str, Interval]]
    """Of `DIRECTIONS`; mean over the timesteps."""
    effects: dict[str, dict[str, dict[str, Interval]]]
    """By way, of `STEERED`."""
    differences: dict[str, dict[str, Interval]]
    """By way: the better of the two uses of features - difference of means, of the same concept."""


def summarize(result: Mapping[str, Any]) -> Summary:
    """Means of what `steering.run` measured."""
    found, places = list(result["concepts"].values()), result["hookpoints"]
    areas = {
        p: {n: bootstrap([float(np.mean(one["auc"][p][n])) for one in found]) for n in DIRECTIONS} for p in places
    }
    each = {
        way: {p: {n: [effect(one["steered"][way][p][n], way) for one in found] for n in STEERED} for p in places}
        for way in WAYS
    }
    effects = {
        way: {p: {n: bootstrap(values) for n, values in names.items()} for p, names in of_places.items()}
        for way, of_places in each.items()
    }
    differences = {
        way: {p: _paired(names, effects[way][p]) for p, names in of_places.items()} for way, of_places in each.items()
    }
    return Summary(areas, effects, differences)


def _paired(values: Mapping[str, Sequence[float]], means: Mapping[str, Interval]) -> Interval:
    best = max((SCALED, "features"), key=lambda name: means[name].value)
    return bootstrap([a - b for a, b in zip(values[best], values["difference"], strict=True)])


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Sentences that say which way it comes out at each hookpoint."""
    summary, lines = summarize(result), []
    for place in result["hookpoints"]:
        area = summary.auc[place]["features"]
        detects = "detect" if area.value >= DETECTS else "do not detect"
        said = [f"At `{place}`, the selected features {detects} the concepts (mean AUC {_of(area)})"]
        for way, verb in (("up", "bring a concept into the image"), ("down", "take it out")):
            name = max((SCALED, "features"), key=lambda one: summary.effects[way][place][one].value)
            found, apart = summary.effects[way][place][name], summary.differences[way][place]
            does = "they" if found.value >= STEERS else "they do not"
            than = _compared(apart)
            said.append(
                f"{does} {verb} (probability changes by {_of(found)} at best, {TITLES[name]}), "
                f"{than} the difference of means ({apart.value:+.2f}, {apart.low:+.2f} to {apart.high:+.2f})"
            )
        lines.append("; ".join(said) + ".")
    return lines


def _compared(apart: Interval) -> str:
    """What an interval of a paired difference says."""
    if apart.low > EQUAL or apart.high < -EQUAL:
        return "better than" if apart.low > EQUAL else "worse than"
    return "about as well as" if apart.low >= -EQUAL and apart.high <= EQUAL else "not clearly better or worse than"


def write_page(out: Path, result: Mapping[str, Any]) -> Path:
    """Write `steering.md` and `steering.png` beside `steering.json`."""
    summary, plan, places = summarize(result), result["plan"], result["hookpoints"]
    lines = ["# Do features of sparse autoencoders detect or steer?", "", *verdict(result), ""]
    lines += ["![AUC by timestep; probability of the concept by strength](steering.png)", ""]
    lines += ["## Detection", "", "AUC of images with the concept against those of the other labels of its kind.", ""]
    lines += _table(
        ["hookpoint", "SAE features", *(TITLES[name] for name in DIRECTIONS if name != "features")],
        [[f"`{place}`", *(_of(summary.auc[place][name]) for name in DIRECTIONS)] for place in places],
    )
    lines += ["", "## Steering", ""]
    lines += [
        f"Largest change of the concept's probability that leaves {KEEPS:.0%} of the probability of the label of the "
        f"other kind. Strengths {', '.join(f'{one:g}' for one in plan['strengths'])} of the tokens' norm.",
        "",
    ]
    rows = [
        [f"`{place}`", way, *(_of(summary.effects[way][place][name]) for name in STEERED)]
        for place in places
        for way in WAYS
    ]
    lines += _table(["hookpoint", "way", *(TITLES[name] for name in STEERED)], rows)
    lines += [
        "",
        "## Concepts",
        "",
        "AUC of the features, and the same changes, features scaled / their rows / difference.",
        "",
    ]
    lines += _table(["concept", *(f"`{place}`: {what}" for place in places for what in ("AUC", *WAYS))], _each(result))
    lines += [
        "",
        "## How",
        "",
        f"{len(result['concepts'])} concepts; {plan['prompts']} prompts of each label to learn from, as many others "
        f"to detect in; {plan['images']} image(s) for each strength; {plan['steps']} steps, guidance "
        f"{plan['guidance']:g}; {plan['top_n']} features per timestep. Intervals are 95 %, of a bootstrap over "
        "concepts. What is added has the same norm for all, in all timesteps and both guidance halves; the scaled "
        "features are added where they are active, the others to all tokens.",
    ]
    _draw(out / "steering.png", result)
    page = out / "steering.md"
    write_text(page, "\n".join(lines) + "\n")
    return page


def _each(result: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for concept, found in result["concepts"].items():
        row = [concept]
        for place in result["hookpoints"]:
            row.append(f"{np.mean(found['auc'][place]['features']):.2f}")
            for way in WAYS:
                curves = found["steered"][way][place]
                row.append(
                    " / ".join(f"{effect(curves[name], way):.2f}" for name in (SCALED, "features", "difference"))
                )
        rows.append(row)
    return rows


def _draw(path: Path, result: Mapping[str, Any]) -> None:
    """A row of each hookpoint: AUC by timestep, probability by strength up and down, means over the concepts."""
    found, places = list(result["concepts"].values()), result["hookpoints"]
    figure, axes = panels(3, len(places), fraction=False)
    strengths = [0.0, *result["plan"]["strengths"]]
    for row, place in enumerate(places):
        first, *others = axes[3 * row : 3 * row + 3]
        for name in STEERED:
            colour = f"C{STEERED.index(name)}"
            if name in DIRECTIONS:
                areas = np.mean([one["auc"][place][name] for one in found], axis=0)
                first.plot(found[0]["timesteps"][place], areas, color=colour, marker=".")
            for axis, way in zip(others, WAYS):
                curves = [one["steered"][way][place][name] for one in found]
                axis.plot(
                    strengths, np.mean([c["concept"] for c in curves], axis=0), color=colour, marker=".",
                    label=TITLES[name],
                )  # fmt: skip
                axis.plot(strengths, np.mean([c["kept"] for c in curves], axis=0), color=colour, ls=":", lw=1)
        first.set(title=f"{place}\ndetection", xlabel="timestep", ylabel="AUC", ylim=(-0.03, 1.03))
        first.invert_xaxis()
        for axis, way in zip(others, WAYS):
            axis.set(title=f"steering {way}", xlabel="strength", ylabel="probability", ylim=(-0.03, 1.03))
    axes[1].legend(fontsize=8, title="dotted: what else was asked for")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _of(value: Interval) -> str:
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
