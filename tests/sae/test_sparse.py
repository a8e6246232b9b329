"""Sparse products against dense ones, with their gradients."""

import pytest
import torch

from imgdit.sae.sparse import SparseCode, above, decode, select, selected_scores


@pytest.mark.parametrize("how", ["topk", "batch_topk", "sample_topk", "groupmax", "above"])
def test_products_and_gradients(how):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (12, 24))
    bias, decoder = torch.randn(24, requires_grad=True), torch.randn(24, 5, requires_grad=True)
    scores = (x @ weight.t() + bias).detach()
    pattern = above(scores, 1.0) if how == "above" else select(scores, 4, how, tokens=3)
    mask = SparseCode(torch.ones_like(pattern.indices, dtype=torch.float32), pattern).dense().bool()
    inputs = (x, weight, bias, decoder)

    dense = ((x @ weight.t() + bias) * mask).relu() @ decoder
    expected = torch.autograd.grad(dense.square().sum(), inputs)
    sparse = decode(SparseCode(selected_scores(scores, pattern, x, weight, bias).relu(), pattern), decoder)
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(torch.autograd.grad(sparse.square().sum(), inputs), expected, atol=1e-4, rtol=1e-4)


def test_how_many_are_selected():
    scores = torch.randn(12, 24)

    def counts(pattern):
        return SparseCode(torch.ones_like(pattern.indices, dtype=torch.float32), pattern).dense().sum(1)

    assert counts(select(scores, 4)).tolist() == [4.0] * 12
    assert counts(select(scores, 4, "groupmax")).tolist() == [4.0] * 12
    assert counts(select(scores, 4, "batch_topk")).sum() == 48
    assert counts(select(scores, 4, "sample_topk", tokens=3)).view(4, 3).sum(1).tolist() == [4.0] * 4


@pytest.mark.parametrize("hint", [-100.0, 0.5, 100.0])
def test_a_hint_changes_no_selection(hint):
    scores = torch.randn(12, 24, generator=torch.Generator().manual_seed(1))
    plain, hinted = select(scores, 4, "batch_topk"), select(scores, 4, "batch_topk", hint=hint)
    assert torch.equal(plain.indices, hinted.indices) and torch.equal(plain.offsets, hinted.offsets)


def test_mean_over_maps():
    scores = torch.randn(12, 24)
    pattern = select(scores, 4)
    code = SparseCode(pattern.gather(scores).relu(), pattern)
    torch.testing.assert_close(code.mean(3), code.dense().view(4, 3, 24).mean(1))
