"""The tables of `imgdit bench unlearn`: aligned for a terminal, and in Markdown as the log has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imgdit.benchmarks.unlearning.methods.catalogue import METHODS
from imgdit.benchmarks.unlearning.table import DOMAINS

SCORES = ("UA", "IRA", "CRA")
NONE = "–"

Rows = list[list[str]]
"""Cells, the head first."""


def table(result: Mapping[str, Any]) -> str:
    """The result of `run` as aligned text."""
    return "\n\n".join(_aligned(rows) for rows in tables(result))


def markdown(result: Mapping[str, Any]) -> str:
    """The same tables in Markdown."""
    return "\n".join(_marked(rows) for rows in tables(result))


def tables(result: Mapping[str, Any]) -> list[Rows]:
    """What was measured: every method, and of each further measurement that was made one table."""
    found = [_methods(result)]
    if result["together"]:
        found.append(_together(result["together"]))
    if result["judged"]:
        found.append(_judged(result["judged"], _domains(result)))
    if result["conditions"]:
        found.append(of_conditions(result["conditions"]))
    if result["captions"]:
        found.append(_captions(result["captions"]))
    if result["attack"]:
        found.append(_attacks(result["attack"], result["plan"]["attacks"]))
    return found


def _domains(result: Mapping[str, Any]) -> list[str]:
    return [domain for domain in ("style", "object") if domain in result["methods"]["none"]["means"]]


def _methods(result: Mapping[str, Any]) -> Rows:
    domains, ours = _domains(result), [name for name in ("scale", "replace") if name in result["methods"]]
    head = ["method", *(f"{domain} {score}" for domain in domains for score in SCORES), "mean (95 %)", "min"]
    head += [*(f"{name} better by (95 %)" for name in ours), "in prompt (95 %)", "of the model's", "artefacts"]
    head += ["pixels", "features", "time", "setup", "kB", "tuned", "settings"]
    model = result["methods"]["none"]["in_prompt"]["mean"]["value"]
    rows = [head]
    for row in result["methods"].values():
        kept = row["in_prompt"]["mean"]
        cells = [row["title"]]
        cells += [f"{100 * row['means'][domain][score]['value']:.1f}" for domain in domains for score in SCORES]
        cells += [_interval(row["mean"]), f"{100 * row['minimum']:.1f}"]
        cells += [_interval(row["ours_better_by"].get(name)) for name in ours]
        cells += [_interval(kept), f"{100 * kept['value'] / model:.0f} %" if model else NONE]
        cells += [f"{100 * row['artefacts']['value']:.1f} %", f"{row['pixel_change']:.3f}"]
        cells += [f"{row['feature_change']:.3f}", f"{row['time_ratio']:.2f}", f"{row['setup_seconds']:.1f} s"]
        cells += [f"{row['bytes'] / 1000:.0f}", str(row["tuned_values"])]
        cells.append(", ".join(f"{name} {value}" for name, value in row["settings"].items()))
        rows.append(cells)
    return rows


def _together(together: Mapping[str, Any]) -> Rows:
    counts = list(dict.fromkeys(len(row["concepts"]) for of in together.values() for row in of))
    rows = [["several at once: unlearned / retained", *map(str, counts)]]
    for name, of in together.items():
        found = {len(row["concepts"]): f"{100 * row['unlearned']:.0f} / {_percent(row['retained'])}" for row in of}
        rows.append([METHODS[name].title, *(found.get(count, NONE) for count in counts)])
    return rows


def _judged(judged: Mapping[str, Any], domains: Sequence[str]) -> Rows:
    head = [f"{domain} {score}" for domain in domains for score in SCORES]
    rows = [["by the judge", *head, *(f"{domain} as the probe" for domain in DOMAINS)]]
    for name, row in judged.items():
        means = [row["means"][domain][score] for domain in domains for score in ("unlearned", "retained", "cross")]
        agrees = [f"{100 * row['agrees_with_probe'][domain] / row['of']:.1f} %" for domain in DOMAINS]
        rows.append([METHODS[name].title, *(f"{100 * mean:.1f}" for mean in means), *agrees])
    return rows


def of_conditions(conditions: Mapping[str, Any]) -> Rows:
    """The table of images under a depth condition."""
    rows = [["under a depth condition", "target shown", "depth error", "others kept", "depth error of others"]]
    for name, by_target in conditions.items():
        found = list(by_target.values())
        of = sum(row["of"] for row in found)
        errors = [f"{np.mean([row[key] for row in found]):.3f}" for key in ("error", "error_of_others")]
        shown, kept = (f"{sum(row[key] for row in found)}/{of}" for key in ("shown", "kept"))
        rows.append([METHODS[name].title if name in METHODS else name, shown, errors[0], kept, errors[1]])
    return rows


def _captions(captions: Mapping[str, Any]) -> Rows:
    parts = [
        (what, part, of)
        for what in ("plain", "removed", "generated")
        for part, of in (("named", "of"), ("kept", "of_others"))
    ]
    rows = [["captions", *(f"{what} {part}" for what, part, _ in parts)]]
    for name, by_target in captions.items():
        found = by_target.values()
        sums = [[sum(row[what][key] for row in found) for key in (part, of)] for what, part, of in parts]
        rows.append([METHODS[name].title, *(f"{count}/{of}" for count, of in sums)])
    return rows


def _attacks(attack: Mapping[str, Any], kinds: Sequence[str]) -> Rows:
    rows = [["the target is seen", "before", *(f"under attack: {kind}" for kind in kinds), "of"]]
    for name, row in attack.items():
        found = [row["shown"], *row["shown_under_attack"].values(), row["of"]]
        rows.append([METHODS[name].title, *map(str, found)])
    return rows


def _interval(values: Mapping[str, float] | None) -> str:
    if values is None:
        return NONE
    value, low, high = (f"{100 * values[part]:.1f}" for part in ("value", "low", "high"))
    return f"{value} ({low} – {high})"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f}"


def _aligned(rows: Rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _marked(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""])
