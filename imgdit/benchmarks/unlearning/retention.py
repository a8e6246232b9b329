"""In-prompt retention: what an image whose prompt names the unlearned label still shows of the rest of its prompt.

UA, IRA and CRA do not see it: CRA leaves out the prompts that name the target. P images, R draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imgdit.benchmarks.unlearning.images import NOTHING, Look
from imgdit.benchmarks.unlearning.table import DRAWS, interval

ATTRIBUTES = ("other label", "colour", "background", "one object")
"""The label of the other domain, the object's colour, the place, and that a single object is seen, a whole one."""


def attributes_kept(look: Look, domain: str) -> tuple[bool, ...]:
    """Whether each of `ATTRIBUTES` is right in an image.

    Args:
        domain: of the label that is unlearned, "style" or "object".
    """
    asked = look.seen.cell.attributes
    return (
        look.seen.right("object" if domain == "style" else "style"),
        look.colour == asked.colour,
        look.background == asked.background,
        look.seen.object != NOTHING and look.second == NOTHING,
    )


def in_prompt(looks: Mapping[str, Sequence[Look]], domains: Mapping[str, str], seed: int = 0) -> dict[str, Any]:
    """Attributes that are kept in the targets' own images.

    Args:
        looks: of each target, images of all cells.
        domains: of each target.

    Returns:
        Counts of each attribute, and the mean over attributes and images with its bootstrap interval.
    """
    rows = np.array(
        [
            attributes_kept(look, domains[target])
            for target, found in looks.items()
            for look in found
            if look.seen.cell.expected(domains[target]) == target
        ],
        dtype=float,
    )  # (P, 4)
    if not len(rows):
        raise ValueError(f"no image's prompt names any of {', '.join(looks)}")
    rng = np.random.default_rng(seed)
    means = rows.mean(1)
    draws = means[rng.integers(len(means), size=(DRAWS, len(means)))].mean(1)
    counts = {name: int(count) for name, count in zip(ATTRIBUTES, rows.sum(0))}
    return {"kept": counts, "of": len(rows), "mean": interval(draws, float(means.mean()))._asdict()}
