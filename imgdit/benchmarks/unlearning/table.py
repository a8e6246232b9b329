"""From what classifiers saw to UnlearnCanvas' table, with intervals.

P images, R draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from imgdit.benchmarks.metrics import Interval, wilson
from imgdit.benchmarks.unlearning.plan import Seen
from imgdit.benchmarks.unlearning.scores import UnlearningScores, mean_scores, score_target

DOMAINS = ("style", "object")
DRAWS = 2000


class TargetScores(NamedTuple):
    """One unlearned label."""

    target: str
    domain: str
    scores: UnlearningScores
    """CRA is that of images whose prompt does not name the target."""
    cross_everywhere: float
    """CRA of all images, as UnlearnCanvas counts it."""
    unlearned: Interval
    """UA with Wilson's interval; the images are the target's."""
    confusion: dict[str, dict[str, dict[str, int]]]
    """Counts by domain, expected and given label, of all images."""


def score_images(target: str, domain: str, seen: Sequence[Seen]) -> TargetScores:
    """Scores of a label that is unlearned, from the images of every style and object."""
    other = DOMAINS[1 - DOMAINS.index(domain)]
    rest = [s for s in seen if s.cell.expected(domain) != target]
    own = accuracies(seen, domain)
    if target not in own:
        raise ValueError(f"no image's {domain} is {target!r}; there are {', '.join(own)}")
    mine = [s for s in seen if s.cell.expected(domain) == target]
    missed = wilson(sum(not s.right(domain) for s in mine), len(mine))
    return TargetScores(
        target,
        domain,
        score_target(target, own, accuracies(rest, other)),
        score_target(target, own, accuracies(seen, other)).cross,
        missed,
        {name: confusion(seen, name) for name in DOMAINS},
    )


def accuracies(seen: Sequence[Seen], domain: str) -> dict[str, float]:
    """Fraction of each label's images that are recognised."""
    labels = dict.fromkeys(s.cell.expected(domain) for s in seen)
    rows = {label: [s.right(domain) for s in seen if s.cell.expected(domain) == label] for label in labels}
    return {label: sum(right) / len(right) for label, right in rows.items()}


def confusion(seen: Sequence[Seen], domain: str) -> dict[str, dict[str, int]]:
    """How often each label's images are called what."""
    counts: dict[str, dict[str, int]] = {}
    for s in seen:
        row = counts.setdefault(s.cell.expected(domain), {})
        row[s.called(domain)] = row.get(s.called(domain), 0) + 1
    return counts


def domain_means(scores: Sequence[TargetScores]) -> dict[str, UnlearningScores]:
    """Means over the targets of each domain that has any."""
    of = {domain: [s.scores for s in scores if s.domain == domain] for domain in DOMAINS}
    return {domain: mean_scores(found) for domain, found in of.items() if found}


def bootstrap_means(
    seen: Mapping[str, Sequence[Seen]], domains: Mapping[str, str], draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Draws (R, 3) of UA, IRA and CRA of each domain, resampling images.

    An image stands for a prompt and a noise, which all targets and all methods share: the same images are drawn for
    all of them, so that draws of two methods can be subtracted.

    Args:
        seen: the same cells in the same order for each target.
        domains: of each target.
    """
    first = next(iter(seen.values()))
    count = len(first)
    for target, images in seen.items():
        if [s.cell for s in images] != [s.cell for s in first]:
            raise ValueError(f"the images of {target!r} are not those of the other targets in the same order")
    rng = np.random.default_rng(seed)
    weights = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(draws)])  # (R, P)
    found: dict[str, list[np.ndarray]] = {}
    for target, images in seen.items():
        found.setdefault(domains[target], []).append(_draws(target, domains[target], images, weights))
    return {domain: _mean(values) for domain, values in found.items()}


def _draws(target: str, domain: str, seen: Sequence[Seen], weights: np.ndarray) -> np.ndarray:
    """(R, 3) of one target."""
    other = DOMAINS[1 - DOMAINS.index(domain)]
    named = np.array([s.cell.expected(domain) == target for s in seen])
    own = _accuracy_draws(seen, domain, weights)
    across = _accuracy_draws(seen, other, weights * ~named)
    retained = [values for label, values in own.items() if label != target]
    return np.stack([1 - own[target], _mean(retained), _mean(list(across.values()))], axis=1)


def _accuracy_draws(seen: Sequence[Seen], domain: str, weights: np.ndarray) -> dict[str, np.ndarray]:
    """(R,) accuracy of each label; not a number where no image of it was drawn."""
    right = np.array([s.right(domain) for s in seen])
    labels = np.array([s.cell.expected(domain) for s in seen])
    found = {}
    with np.errstate(invalid="ignore"):
        for label in dict.fromkeys(labels.tolist()):
            mine = labels == label
            found[label] = (weights @ (right & mine)) / (weights @ mine)
    return found


def _mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of those that are numbers, as few draws miss all images of a label."""
    stacked = np.stack(values)
    with np.errstate(invalid="ignore"):
        return np.nansum(stacked, axis=0) / np.isfinite(stacked).sum(axis=0)


def interval(values: np.ndarray, estimate: float) -> Interval:
    """An estimate with the 95 % percentile interval of its draws."""
    low, high = np.nanquantile(values, (0.025, 0.975))
    return Interval(float(estimate), float(low), float(high))


def score_together(concepts: Mapping[str, str], seen: Sequence[Seen]) -> dict[str, Any]:
    """Several labels unlearned at once: how often each is gone, and what images that name none of them still show.

    Args:
        concepts: domains of the unlearned labels.

    Returns:
        `unlearned`, mean over the labels; `retained`, `None` where every image names one of them; `counts` by label.
    """
    gone, counts = [], {}
    for label, domain in concepts.items():
        mine = [s for s in seen if s.cell.expected(domain) == label]
        wrong = sum(not s.right(domain) for s in mine)
        counts[label] = {"unlearned": wrong, "of": len(mine)}
        gone.append(wrong / len(mine))
    rest = [s for s in seen if not any(s.cell.expected(domain) == label for label, domain in concepts.items())]
    kept = [fraction for domain in DOMAINS for fraction in accuracies(rest, domain).values()]
    retained = sum(kept) / len(kept) if kept else None
    return {"unlearned": sum(gone) / len(gone), "retained": retained, "counts": counts}
