"""Texts as vectors, against recorded numbers of DiffEmbed."""

import pytest
import torch
from masked_text_cases import CASES, model_of, named, recorded

from imgdit.models.text_embeddings import contrastive_loss, encode, pool

POOLED = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("name", named("embed"))
@torch.no_grad()
def test_vectors_are_the_recorded_ones(name):
    found, model = recorded(name), model_of(name)
    ids, mask, text = found["input_ids"], found["attention_mask"], found["embed_mask"]
    features, real = encode(model, ids, mask), mask.bool()
    expected = found["masked.last_hidden_state.positions_real"]
    torch.testing.assert_close(features[real], expected[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(pool(features, mask), found["masked.mean.positions_real"], **POOLED)
    torch.testing.assert_close(pool(features, text), found["masked.mean.skip_instruction.positions_real"], **POOLED)
    torch.testing.assert_close(pool(features, mask), found["alone.mean"], **POOLED)
    right = encode(model, found["right.input_ids"], found["right.attention_mask"])
    torch.testing.assert_close(pool(right, found["right.attention_mask"]), found["right.masked.mean"], **POOLED)
    torch.testing.assert_close(pool(right, found["right.attention_mask"]), pool(features, mask), **POOLED)


@pytest.mark.parametrize("name", named("embed"))
@torch.no_grad()
def test_the_published_float_mask_is_a_switch(name):
    found, model = recorded(name), model_of(name)
    ids, mask = found["input_ids"], found["attention_mask"]
    features = encode(model, ids, mask, float_mask=True)
    torch.testing.assert_close(features, found["last_hidden_state_published"], rtol=0, atol=1e-4)
    for pooling in ("mean", "weighted_mean", "last_token"):
        for kind, counted in (("all_tokens", mask), ("skip_instruction", found["embed_mask"])):
            expected = found[f"published.{pooling}.{kind}"]
            torch.testing.assert_close(pool(features, counted, pooling), expected, **POOLED)
    assert (pool(features, mask) - pool(encode(model, ids, mask), mask)).abs().max() > 1e-2


@pytest.mark.parametrize("name", named("contrastive"))
def test_the_contrastive_loss_is_the_recorded_one(name):
    case, found = CASES[name], recorded(name)
    loss = contrastive_loss(found["query"], found["positive"], scale=case["scale"])
    assert loss.item() == pytest.approx(case["loss_without_negatives"], abs=1e-5)
    loss = contrastive_loss(found["query"], found["positive"], found["negative"], scale=case["scale"])
    assert loss.item() == pytest.approx(case["loss_with_negatives"], abs=1e-5)


@torch.no_grad()
def test_a_layer_can_be_chosen():
    model, ids = model_of("mha.forward"), torch.arange(6)[None]
    assert torch.equal(encode(model, ids, layer=0), model.get_input_embeddings()(ids))
    assert torch.equal(encode(model, ids, layer=-1), encode(model, ids, layer=model.config.num_hidden_layers))


def test_gradients_reach_the_model():
    model, ids = model_of("mha.forward"), torch.arange(6)[None]
    pool(encode(model, ids)).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    model.zero_grad(set_to_none=True)


def test_texts_without_tokens_are_refused():
    features = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"texts \[1\] have no token that counts"):
        pool(features, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="mask must be"):
        pool(features, torch.ones(2, 2))
    with pytest.raises(ValueError, match="each query needs a positive"):
        contrastive_loss(torch.ones(2, 4), torch.ones(3, 4))
    features[0, 2] = float("nan")
    assert pool(features, torch.tensor([[1, 1, 0], [1, 1, 1]])).isfinite().all()
