"""Edits of activations in every precision, ties, gradients, and what a hooked step waits for."""

import dataclasses
from functools import partial

import pytest
import torch
from tiny_sae import WIDTH, edit, ours, run, selection, tiny_sae, unlearner_of
from waits import Waits

from imgdit.benchmarks.speed.timing import flops_of
from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.models.blocks import BlockPlan, MMDiTBlock
from imgdit.sae.calls import DenoiserCall
from imgdit.sae.config import SAEConfig
from imgdit.sae.edits import ChosenFeatures, Edit, edit_by_decoding
from imgdit.sae.hooks import hooked
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.streams import Tokens
from imgdit.sae.unlearning import Intervention


def rows(count=400, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def call(timestep=500.0):
    return DenoiserCall(timestep, 2, slice(0, 2), None, None, (), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    sae, x = tiny_sae(), (rows() * 8).to(dtype)
    change = Edit(torch.arange(8), torch.full((8,), -2.0), torch.zeros(8))
    exact = edit(sae, x.float(), change)
    assert not torch.equal(exact, x.float())
    assert torch.equal(edit(sae, x, change), exact.to(dtype))
    same = Edit(torch.arange(8), torch.ones(8), torch.zeros(8))
    assert torch.equal(edit(sae, x, same), x)


def test_an_update_in_half_precision_is_rounded_once():
    """Output minus input is not a number of bfloat16; what the function is given is exact, and so is the sum."""
    pipe, inputs = ours()
    pipe.transformer.to(torch.bfloat16)
    hookpoint, factor = "transformer.single_transformer_blocks.0", 3.0
    seen = {}

    def keep(name):
        return lambda tokens: seen.__setitem__(name, tokens.values) if name not in seen else None

    def scaled(tokens):
        if "update" not in seen:
            seen["update"] = tokens.values
        return tokens.values * factor

    with hooked(pipe, {hookpoint: keep("plain")}):
        run(pipe, inputs, steps=1)
    with hooked(pipe, {hookpoint: scaled}, source={hookpoint: "update"}), hooked(pipe, {hookpoint: keep("changed")}):
        run(pipe, inputs, steps=1)
    before = seen["plain"].float() - seen["update"]
    assert seen["update"].dtype == torch.float32 and torch.equal(before, before.bfloat16().float())
    expected = (seen["plain"].float() + (factor - 1) * seen["update"]).bfloat16()
    assert torch.equal(seen["changed"], expected)


def test_published_rule_where_nothing_is_selected():
    """2 recon - x everywhere, as the published hook, which decodes in every step."""
    sae, x = tiny_sae(), rows(12).view(2, 6, WIDTH)
    none = selection("none", [], [])
    late = dataclasses.replace(selection("late", [3], [1.0]), selected=torch.tensor([[False], [False], [True]]))
    for chosen in (none, late):
        hook = Intervention(sae, [[chosen]], "scale", -1.0, (0, 1000), "both", True)
        torch.testing.assert_close(hook(Tokens(x, (), call(900.0))), 2 * sae(x) - x)
        exact = Intervention(sae, [[chosen]], "scale", -1.0, (0, 1000), "both", False)
        assert exact(Tokens(x, (), call(900.0))) is None
    pipe, inputs = ours()
    hookpoint = "transformer.transformer_blocks.1"
    unlearner = unlearner_of(pipe, hookpoint, [none])
    plain = run(pipe, inputs)
    with unlearner.attach(pipe, ["none"], paper_compat=True):
        assert not torch.equal(run(pipe, inputs), plain)
    with unlearner.attach(pipe, ["none"]):
        assert torch.equal(run(pipe, inputs), plain)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("equal", [2, 4, 64])
def test_ties_at_the_kth_place(k, equal):
    """Of features with the same activation exactly k are active: the encoder's, in the hook as well, whatever other
    rows there are."""
    sae = SparseAutoencoder(SAEConfig(WIDTH, 64, k=k), generator=torch.Generator().manual_seed(0)).requires_grad_(
        False
    )
    sae.encoder.weight.copy_(sae.encoder.weight[::equal].repeat_interleave(equal, 0))
    x = rows(50)
    code = sae.encode(x).dense()
    positive = (sae.scores(x) > 0).sum(1).clamp(max=k)
    chosen = ChosenFeatures(sae, torch.arange(64), torch.zeros(64))
    acts = chosen.activations(x, chosen.scores(x))
    assert torch.equal(acts > 0, code > 0)
    assert torch.equal((acts > 0).sum(1), positive)
    one_by_one = torch.cat([chosen.activations(row, chosen.scores(row)) for row in x.split(1)])
    assert torch.equal(one_by_one > 0, code > 0)
    change = Edit(torch.arange(0, 64, 2), torch.full((32,), -2.0), torch.zeros(32))
    torch.testing.assert_close(edit(sae, x, change), edit_by_decoding(sae, x, change))


def test_gradients_reach_the_input_and_the_weights():
    sae, x = tiny_sae().requires_grad_(True), rows(20).requires_grad_(True)
    out = sae(x)
    (out - 1).square().sum().backward()
    code = sae.encode(x).dense().detach()
    active = (code > 0).float()
    weights = [w.detach().clone().requires_grad_(True) for w in (sae.encoder.weight, sae.encoder.bias, sae.W_dec)]
    bias, same = sae.b_dec.detach().clone().requires_grad_(True), x.detach().clone().requires_grad_(True)
    dense = ((same - bias) @ weights[0].t() + weights[1]) * active @ weights[2] + bias
    torch.testing.assert_close(out, dense)
    (dense - 1).square().sum().backward()
    for got, expected in zip(
        (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec, x), (*weights, bias, same), strict=True
    ):
        torch.testing.assert_close(got.grad, expected.grad)
    with torch.no_grad():
        assert not sae(x).requires_grad


def test_standardised_rows_are_brought_back_by_their_deviation():
    """The published autoencoder divides by the deviation + 1e-5 and multiplies by the deviation."""
    sae = tiny_sae(input_unit_norm=True)
    for scale in (1.0, 1e-5, 0.0):
        x = scale * rows(20) + 3
        std, mean = x.std(1, keepdim=True), x.mean(1, keepdim=True)
        plain = SparseAutoencoder(dataclasses.replace(sae.config, input_unit_norm=False))
        plain.load_state_dict(sae.state_dict())
        torch.testing.assert_close(sae(x), plain((x - mean) / (std + 1e-5)) * std + mean)


@pytest.mark.parametrize("mode", ["scale", "remove", "replace"])
def test_what_a_hook_with_a_threshold_costs_beside_its_block(mode):
    """At most 0.02 of the block's arithmetic, and after the first step nothing that a device is waited for."""
    width, grid, text, chosen = 256, (16, 16), 32, list(range(8))
    block = MMDiTBlock(width, width // 64, 4.0, qk_norm=True, dual_attention=False, context_pre_only=False)
    layout = FrameLayout.build([Frame(grid)], text)
    plan = BlockPlan(layout.text_lengths, layout.lengths, layout.groups, layout.image_groups)
    image, words = torch.randn(2, 256, width), torch.randn(2, text, width)
    vector = torch.randn(2, 1, width)
    call = DenoiserCall(500.0, 2, slice(1, 2), slice(0, 1), (slice(0, 256),), (grid,), text)
    tokens = Tokens(image, call.grids, call)
    sae = SparseAutoencoder(SAEConfig(width, 1024, k=16)).requires_grad_(False)
    sae.threshold = 0.1
    concept = dataclasses.replace(
        selection("x", chosen, [1.0] * len(chosen)), replacement=torch.ones(3, width), mean=None
    )
    for moves in {False, mode == "replace"}:
        intervention = Intervention(sae, [[concept]], mode, -0.5, (0.0, 1000.0), "both", False, moves=moves)
        assert not torch.equal(intervention(tokens), image)  # what is done at this timestep is found once
        work = flops_of(partial(intervention, tokens))
        assert 0 < work <= 0.02 * flops_of(lambda: block(image, words, vector, vector, None, plan))
        with Waits() as waits:
            intervention(tokens)
        assert not waits.where
