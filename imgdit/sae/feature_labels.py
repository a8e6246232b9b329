"""Names of features: the words that texts about their strongest images have, and other texts have not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

WORDS = 3
"""Words of a label."""
MORE = 0.34
"""How much more often than in the other texts, as a fraction, a word must be in those of the feature."""
_COMMON = frozenset(
    (
        "a",
        "an",
        "and",
        "are",
        "at",
        "from",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "over",
        "the",
        "there",
        "this",
        "to",
        "with",
    )
)


def feature_labels(texts: Sequence[str | None], top: Mapping[int, Sequence[int]]) -> dict[int, str]:
    """A label for each feature; an empty one where no word is more frequent among its texts.

    Args:
        texts: about each image; `None`: there is none.
        top: numbers of each feature's strongest images.
    """
    words = [None if text is None else set(re.findall(r"\w+", text.lower())) - _COMMON for text in texts]
    found = {}
    for feature, images in top.items():
        chosen = set(images)
        mine = [known for i in images if (known := words[i]) is not None]
        rest = [known for i, known in enumerate(words) if known is not None and i not in chosen]
        more = {
            word: sum(word in known for known in mine) / len(mine)
            - sum(word in known for known in rest) / max(len(rest), 1)
            for word in sorted(set().union(*mine))
        }
        best = sorted(more, key=lambda word: -more[word])[:WORDS]
        found[feature] = ", ".join(word for word in best if more[word] >= MORE)
    return found
