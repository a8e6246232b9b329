"""UnlearnCanvas' scores of an unlearned concept (arXiv 2402.11846): gone, and everything else kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class UnlearningScores(NamedTuple):
    """Shares in [0, 1]."""

    unlearned: float
    """UA: how often the target's images are not recognised as the target."""
    retained: float
    """IRA: mean accuracy of the other labels of the target's domain (styles, or objects)."""
    cross: float
    """CRA: mean accuracy of all labels of the other domain."""

    @property
    def mean(self) -> float:
        return sum(self) / len(self)


def score_target(
    target: str, own: Mapping[str, float], other: Mapping[str, float] | Sequence[float]
) -> UnlearningScores:
    """Scores of one unlearned target. Labels count alike, however many images each has.

    Args:
        target: the unlearned label.
        own: accuracy of each label of its domain, the target's among them.
        other: accuracy of each label of the other domain.

    Raises:
        ValueError: the target is not among its domain's labels, or a domain has nothing to compare with.
    """
    if target not in own:
        raise ValueError(f"the target {target!r} is not among the labels {', '.join(own)}")
    rest = [accuracy for label, accuracy in own.items() if label != target]
    across = list(other.values()) if isinstance(other, Mapping) else list(other)
    if not rest or not across:
        raise ValueError(f"retained accuracy needs other labels, got {len(rest)} of the domain, {len(across)} across")
    return UnlearningScores(1 - own[target], sum(rest) / len(rest), sum(across) / len(across))


def mean_scores(scores: Sequence[UnlearningScores]) -> UnlearningScores:
    """Mean over targets, as tables report it."""
    if not scores:
        raise ValueError("there is no target to average over")
    return UnlearningScores(*(sum(values) / len(scores) for values in zip(*scores)))
