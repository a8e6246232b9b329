from itertools import islice

import pytest
import torch
from training.toy import Tokens, collate

from imgdit.io.order import Batches, DataOrder, mixed_seed


def indices(batches, count, *arguments):
    return [micro.indices for micro in islice(batches.stream(*arguments), count)]


def flat(lists):
    return [index for one in lists for index in one]


def test_every_epoch_is_a_new_permutation():
    order = DataOrder(11, seed=1)
    epochs = [[order[11 * epoch + i] for i in range(11)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [order[p] for p in (25, 3, 14)] == [DataOrder(11, seed=1)[p] for p in (25, 3, 14)]
    assert [DataOrder(11, seed=2)[i] for i in range(11)] != epochs[0]


def test_order_without_shuffling_and_without_end():
    assert [DataOrder(3, 0, shuffle=False)[p] for p in range(5)] == [0, 1, 2, 0, 1]
    assert [DataOrder(None, 0)[p] for p in (0, 10**9)] == [0, 10**9]
    with pytest.raises(ValueError, match="no sample"):
        DataOrder(0, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_start_at_any_sample(workers):
    batches = Batches(Tokens(), collate, seed=5, workers=workers)
    whole = flat(indices(batches, 12, 0, 2))
    assert flat(indices(batches, 6, 12, 2)) == whole[12:]
    assert flat(indices(batches, 3, 5, 3)) == whole[5:14]  # another batch size, from an odd place


def test_ranks_share_the_order_without_overlap():
    batches = Batches(Tokens(), collate, seed=5)
    whole = indices(batches, 6, 4, 2)
    assert indices(batches, 3, 4, 2, 0, 2) == whole[0::2]
    assert indices(batches, 3, 4, 2, 1, 2) == whole[1::2]


def test_a_stream_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    next(Batches(Tokens(), collate, seed=5).stream(0, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_do_not_collide():
    seeds = {mixed_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3 and all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(1, 2) != mixed_seed(2, 1) != mixed_seed(0, 3)
