"""BD3LM: who sees whom, cache, padding, saving, and what its loader refuses."""

import json

import pytest
import torch
from block_text_cases import FIXTURES
from safetensors.torch import load_file, save_file

from imgdit.models import bd3lm
from imgdit.models.bd3lm import BD3LM, BlockCache, block_groups, dense_mask, load_bd3lm

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def model():
    return load_bd3lm(FIXTURES / "bd3lm")


def ids(rows=2, length=16, seed=0):
    return torch.randint(0, 38, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_groups_and_the_dense_mask_give_the_same(model, monkeypatch):
    noisy = ids(seed=1)
    grouped = model(noisy, clean_ids=ids()).logits
    monkeypatch.setattr(bd3lm, "MOST_CALLS", 0)
    bd3lm._visibility.cache_clear()
    dense = model(noisy, clean_ids=ids()).logits
    bd3lm._visibility.cache_clear()
    torch.testing.assert_close(dense, grouped, **CLOSE)


@torch.no_grad()
def test_one_pass_over_all_blocks_equals_one_pass_per_block(model):
    noisy, clean = ids(seed=1), ids()
    together = model(noisy, clean_ids=clean).logits
    for start in range(0, 16, 4):
        text = torch.cat([clean[:, :start], noisy[:, start : start + 4]], 1)
        torch.testing.assert_close(model(text).logits[:, start:], together[:, start : start + 4], **CLOSE)


@torch.no_grad()
def test_cached_blocks_give_the_same_logits(model):
    text, cache = ids(), BlockCache()
    whole = model(text).logits
    first = model(text[:, :8], cache=cache, store=True).logits  # two blocks at once
    torch.testing.assert_close(first, whole[:, :8], **CLOSE)
    for start in (8, 12):
        torch.testing.assert_close(
            model(text[:, start : start + 4], cache=cache).logits, whole[:, start : start + 4], **CLOSE
        )
        model(text[:, start : start + 4], cache=cache, store=True)
    assert cache.seen == 16


@torch.no_grad()
def test_a_bounded_cache_sees_the_latest_tokens(model):
    text, cache = ids(length=24), BlockCache(8)
    for start in (0, 4, 8):
        model(text[:, start : start + 4], cache=cache, store=True)
    key, _ = cache.read(0)
    assert key.shape[1] == 8 and cache.seen == 12


@torch.no_grad()
def test_padding_changes_nothing(model):
    text = ids()
    mask = torch.ones_like(text)
    mask[0, 10:] = 0
    other = text.clone()
    other[0, 10:] = 3
    first, second = (model(each, clean_ids=each, attention_mask=mask).logits for each in (text, other))
    torch.testing.assert_close(first[0, :10], second[0, :10], **CLOSE)
    alone = model(text[:1, :10], clean_ids=text[:1, :10]).logits
    torch.testing.assert_close(first[:1, :10], alone, **CLOSE)
    assert not torch.allclose(model(text).logits[0, 8:10], model(other).logits[0, 8:10])


@torch.no_grad()
def test_save_and_load_keep_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    for again in (BD3LM.from_pretrained(tmp_path), load_bd3lm(tmp_path)):
        assert dict(again.config)["sampling_eps_max"] == model.config.sampling_eps_max
        assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_the_kind_is_read_from_the_folder():
    kinds = {name: load_bd3lm(FIXTURES / name).config.parameterization for name in ("bd3lm", "mdlm", "sedd", "ar")}
    assert kinds == {"bd3lm": "subs", "mdlm": "subs", "sedd": "score", "ar": "autoregressive"}


def test_loads_in_another_precision():
    model = load_bd3lm(FIXTURES / "bd3lm", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(ids()).logits.dtype == torch.bfloat16


def test_an_untrained_model_predicts_uniformly():
    model = BD3LM(vocab_size=12, block_size=2, model_length=8, hidden_dim=16, n_blocks=1, n_heads=2, cond_dim=4)
    assert torch.equal(model(ids(length=8) % 11).logits, torch.zeros(2, 8, 12))


def test_checkpointing_changes_no_gradient(model):
    gradients = []
    for checkpointing in (False, True):
        model.enable_gradient_checkpointing() if checkpointing else None
        model.zero_grad()
        model(ids(seed=1), clean_ids=ids()).logits.square().sum().backward()
        gradients.append(model.blocks[0].attn_qkv.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_short_last_block_sees_all_before_it():
    mask = dense_mask(block_groups(5, 2), 5)
    assert mask.tolist()[4] == [True] * 5 and mask.tolist()[0] == [True, True, False, False, False]


def changed(folder, tmp_path, config=None, drop=()):
    values = json.loads((FIXTURES / folder / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(FIXTURES / folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in drop}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "drop", "message"),
    [
        ({"model_type": "llada"}, (), "expected 'bd3lm'.*load_masked_lm"),
        ({"hidden_dim": 64}, (), "do not fit"),
        ({}, ("backbone.output_layer.linear.bias",), "do not fit"),
        ({"n_heads": 5}, (), "even number per head"),
        ({"block_size": 5}, (), "must divide model_length"),
    ],
)
def test_foreign_folders_are_refused(tmp_path, config, drop, message):
    with pytest.raises(ValueError, match=message):
        load_bd3lm(changed("bd3lm", tmp_path, config, drop))


def test_pickled_weights_and_missing_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled"):
        load_bd3lm(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        load_bd3lm(tmp_path / "nothing")


def test_impossible_settings_and_calls_are_refused(model):
    with pytest.raises(ValueError, match="parameterization"):
        BD3LM(parameterization="mdlm")
    with pytest.raises(ValueError, match="adaln"):
        BD3LM(time_conditioning=True, adaln=False)
    with pytest.raises(ValueError, match="current block only"):
        model(ids(), cache=BlockCache(), clean_ids=ids())
