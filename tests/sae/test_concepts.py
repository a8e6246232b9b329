"""Which features a concept is given."""

import pytest
import torch

from imgdit.sae.concepts import ConceptStatistics, select_concept


def statistics(**means):
    """One timestep."""
    rows = {name: torch.tensor([values]) for name, values in means.items()}
    return ConceptStatistics((500.0,), rows, dict.fromkeys(rows, 1), {name: torch.zeros(1, 4) for name in rows})


def test_a_concept_with_few_features_is_not_filled_up():
    # Feature 0 is neon's, 1 is everybody's and a little more neon's, 2 is sepia's.
    found = statistics(neon=[6.0, 2.2, 0.0], sepia=[0.0, 2.0, 6.0])
    assert select_concept(found, "neon", top_n=2).features.tolist() == [0, 1]
    assert select_concept(found, "neon", top_n=2, floor=0.1).features.tolist() == [0]
    assert select_concept(found, "neon", percentile=0, floor=0.1).features.tolist() == [0]
    assert select_concept(found, "neon", top_n=2, floor=0.1).origin["floor"] == 0.1
    with pytest.raises(ValueError, match=r"floor is a fraction of the best score and must be in \[0, 1\], got 10"):
        select_concept(found, "neon", top_n=2, floor=10)
