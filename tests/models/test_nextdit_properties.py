"""What must hold for NextDiT whatever its weights: frames, caches, text, saving, and what it refuses."""

import dataclasses

import pytest
import torch
from tiny import randomize

from imgdit import Frame, FrameLayout, KVCache, NextDiT
from imgdit.attention.softcap import softcap_attention
from imgdit.models.functional import pack
from imgdit.models.nextdit import TextMemory

CONFIG = {
    "input_size": (1, 8, 8),
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "caption_channels": 24,
    "rotary_max_length": 16,
    "rotary_max_length_t": 4,
}
GRID = (4, 3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize(NextDiT(**CONFIG), std=0.2).eval()


@pytest.fixture
def scene():
    """Latents of two frames, text with padding, and the same as tokens."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 2, 16, 8, 6, generator=generator)
    text = torch.randn(2, 7, 24, generator=generator)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:], mask[1, 6:] = False, False
    tokens = pack(latents.flatten(0, 1), 2).unflatten(0, (2, 2)).flatten(1, 2)
    return latents, tokens, text, mask


def layout(*frames, **changes) -> FrameLayout:
    return FrameLayout.build([Frame(GRID, index=i, **f) for i, f in enumerate(frames)], 7, **changes)


def near(a, b):
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_and_latents_are_the_same_scene(model, scene):
    latents, tokens, text, mask = scene
    levels = torch.tensor([[300.0, 800.0], [10.0, 500.0]])
    of_latents = model(latents, text, timestep=levels, encoder_attention_mask=mask).sample
    of_tokens = model(tokens, text, None, levels, encoder_attention_mask=mask, layout=layout({}, {})).sample
    assert near(pack(of_latents.flatten(0, 1), 2).unflatten(0, (2, 2)).flatten(1, 2), of_tokens)


@torch.no_grad()
def test_only_frames_being_made_are_predicted(model, scene):
    _, tokens, text, mask = scene
    levels = torch.tensor([300.0, 800.0])
    held = model(tokens, text, None, levels, encoder_attention_mask=mask, layout=layout({}, {"sigma": 0.04})).sample
    both = torch.stack([levels, torch.full_like(levels, 40.0)], dim=1)
    every = model(tokens, text, None, both, encoder_attention_mask=mask, layout=layout({}, {})).sample
    assert held.shape == (2, 12, 64) and near(held, every[:, :12])


@torch.no_grad()
def test_levels_per_token_are_levels_per_frame(model, scene):
    _, tokens, text, _ = scene
    levels = torch.tensor([[300.0, 800.0], [10.0, 500.0]])
    per_frame = model(tokens, text, None, levels, layout=layout({}, {})).sample
    per_token = model(tokens, text, None, levels.repeat_interleave(12, dim=1), layout=layout({}, {})).sample
    assert near(per_frame, per_token)


@torch.no_grad()
def test_padding_of_the_text_does_not_matter(model, scene):
    latents, _, text, mask = scene
    t = torch.tensor([500.0, 400.0])
    padded = model(latents, text, timestep=t, encoder_attention_mask=mask).sample
    noise = torch.where(mask[..., None], text, torch.randn(text.shape))
    assert near(model(latents, noise, timestep=t, encoder_attention_mask=mask).sample, padded)
    alone = model(latents[:1], text[:1, :4], timestep=t[:1]).sample
    assert near(padded[:1], alone)
    assert TextMemory(text, mask).embeddings.shape[1] == 6
    assert TextMemory(text, torch.ones_like(mask)).mask is None


@torch.no_grad()
def test_a_texts_memory_is_computed_once(model, scene):
    latents, _, text, mask = scene
    asked = []
    hooks = [layer.attention.wk_y.register_forward_hook(lambda *_: asked.append(1)) for layer in model.layers]
    try:
        memory = TextMemory(text, mask)
        for t in (900.0, 300.0):
            t = torch.full((2,), t)
            assert near(
                model(latents, memory, timestep=t).sample,
                model(latents, text, timestep=t, encoder_attention_mask=mask).sample,
            )
    finally:
        for hook in hooks:
            hook.remove()
    assert len(asked) == 2 * (1 + 2)  # two layers: once for the memory, and in each of the two other passes


@torch.no_grad()
@pytest.mark.parametrize("cap", [None, 5.0])
def test_frozen_frames_are_read_from_a_cache(model, scene, cap):
    _, tokens, text, mask = scene
    model.register_to_config(attention_softcap=cap)
    whole = layout({}, {"sigma": 0.0, "sees": "self"})
    cache = KVCache()

    def predict(x, t, layout, **options):
        return model(x, text, None, torch.full((2,), t), encoder_attention_mask=mask, layout=layout, **options).sample

    try:
        first = predict(tokens, 900.0, whole, cache=cache)
        assert near(first, predict(tokens, 900.0, whole))
        cache.freeze()
        rest = whole.without_frozen()
        assert near(predict(tokens[:, :12], 300.0, rest, cache=cache), predict(tokens, 300.0, whole))
        # It is its own world: the frame being generated does not reach it, nor does the text reach its tokens.
        assert not near(predict(tokens, 300.0, layout({}, {"sigma": 0.0})), predict(tokens, 300.0, whole))
    finally:
        model.register_to_config(attention_softcap="auto")


@torch.no_grad()
def test_a_cache_is_of_one_rotation_of_the_positions(model, scene):
    """Deeper keys depend on it through the attention among frozen frames, so turning them anew would not do."""
    _, tokens, text, mask = scene
    whole, cache = layout({}, {"sigma": 0.0, "sees": "self"}), KVCache()
    rest, scaled = whole.without_frozen(), {"scale_factor": 1.5, "scale_watershed": 700.0}

    def predict(x, t, layout, **options):
        t = torch.full((2,), t)
        return model(x, text, None, t, encoder_attention_mask=mask, layout=layout, **options, **scaled).sample

    assert not near(predict(tokens, 699.0, whole), predict(tokens, 701.0, whole))
    predict(tokens, 900.0, whole, cache=cache)
    cache.freeze()
    assert near(predict(tokens[:, :12], 800.0, rest, cache=cache), predict(tokens, 800.0, whole))
    with pytest.raises(ValueError, match=r"crossed scale_watershed\. Call clear\(\)"):
        predict(tokens[:, :12], 600.0, rest, cache=cache)
    cache.clear()
    predict(tokens, 650.0, whole, cache=cache)
    cache.freeze()
    assert near(predict(tokens[:, :12], 600.0, rest, cache=cache), predict(tokens, 600.0, whole))


@torch.no_grad()
def test_a_noisy_frozen_frame_counts_for_the_rotation(model, scene):
    _, tokens, text, mask = scene
    whole, cache = layout({}, {"sigma": 0.9, "sees": "self"}), KVCache()

    def predict(x, t, layout, **options):
        scaled = {"scale_factor": 1.5, "scale_watershed": 700.0}
        t = torch.full((2,), t)
        return model(x, text, None, t, encoder_attention_mask=mask, layout=layout, **options, **scaled).sample

    predict(tokens, 950.0, whole, cache=cache)
    cache.freeze()
    got = predict(tokens[:, :12], 300.0, whole.without_frozen(), cache=cache)
    assert near(got, predict(tokens, 300.0, whole))


@torch.no_grad()
def test_softcap_by_groups_is_softcap_by_mask():
    frames = layout({}, {"sees": "self"})
    q, k, v = (torch.randn(2, 24, 3, 8) * 3 for _ in range(3))
    logits = 4.0 * torch.tanh(torch.einsum("bshd,bthd->bhst", q, k) / 8**0.5 / 4.0)
    visible = frames.dense_mask()[7:, 7:]
    want = torch.einsum("bhst,bthd->bshd", logits.masked_fill(~visible, -torch.inf).softmax(-1), v)
    assert near(softcap_attention(q, k, v, 4.0, frames.image_groups), want)
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert near(softcap_attention(q, k, v, 1e4), plain)


@pytest.mark.parametrize(("dtype", "capped"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
@torch.no_grad()
def test_default_cap_by_dtype(scene, dtype, capped):
    """The reference's attention for half precision caps at 30, its float32 one does not."""
    latents, _, text, _ = scene
    torch.manual_seed(0)
    model = randomize(NextDiT(**CONFIG), std=0.2).eval()
    for layer in model.layers:
        layer.attention.q_norm.weight.mul_(12)  # logits beyond the cap
    model = model.to(dtype)

    def predict(cap):
        model.register_to_config(attention_softcap=cap)
        return model(latents.to(dtype), text.to(dtype), timestep=torch.tensor([500.0, 400.0])).sample

    auto, always, never = (predict(cap) for cap in ("auto", 30.0, None))
    assert torch.equal(auto, always if capped else never)
    assert not torch.equal(always, never)


def test_an_untrained_model_predicts_nothing(scene):
    latents, _, text, _ = scene
    prediction = NextDiT(**CONFIG)(latents, text, timestep=torch.tensor([500.0, 400.0])).sample
    assert prediction.abs().max() == 0


@torch.no_grad()
def test_save_and_load(model, scene, tmp_path):
    latents, _, text, _ = scene
    model.save_pretrained(tmp_path)
    again = NextDiT.from_pretrained(tmp_path)
    t = torch.tensor([500.0, 400.0])
    assert near(again(latents, text, timestep=t).sample, model(latents, text, timestep=t).sample)
    assert again.config.attention_softcap == "auto"
    assert NextDiT.from_pretrained(tmp_path, attention_softcap=30.0).config.attention_softcap == 30.0


def test_gradient_checkpointing_changes_no_gradient(model, scene):
    latents, _, text, mask = scene
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train()
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        t = torch.tensor([500.0, 400.0])
        model(latents, text, timestep=t, encoder_attention_mask=mask).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    model.eval().disable_gradient_checkpointing()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


@torch.no_grad()
def test_lora_loads_and_acts(model, scene, tmp_path):
    from peft import LoraConfig

    latents, _, text, _ = scene
    t = torch.tensor([500.0, 400.0])
    before = model(latents, text, timestep=t).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["wq", "wv", "w2"], init_lora_weights=False), "one")
    with_lora = model(latents, text, timestep=t).sample
    model.save_lora_adapter(tmp_path, adapter_name="one")
    model.delete_adapters("one")
    model.unload_lora()
    assert near(model(latents, text, timestep=t).sample, before) and not near(with_lora, before)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="again")
    assert near(model(latents, text, timestep=t).sample, with_lora)
    model.unload_lora()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 40}, "multiple of 6"),
        ({"num_kv_heads": 3}, "divide num_heads=4"),
        ({"patch_size": (2, 2, 2)}, r"\(1, p, p\)"),
        ({"norm_type": "layer"}, "norm_type must be one of 'rms'"),
        ({"pred_sigma": True}, "pred_sigma"),
        ({"attention_softcap": -1.0}, "attention_softcap"),
        ({"depth": 0}, "depth must be positive"),
    ],
)
def test_configurations_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        NextDiT(**{**CONFIG, **change})


def test_unknown_configuration_keys_are_refused():
    with pytest.raises(ValueError, match="'num_head'; did you mean 'num_heads'"):
        NextDiT.from_config({**CONFIG, "num_head": 4})
    with pytest.raises(ValueError, match="holds a MMDiT"):
        NextDiT.from_config({"_class_name": "MMDiT"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, "needs a timestep"),
        ({"timestep": torch.ones(3)}, "per sample, frame or token"),
        ({"hidden_states": torch.ones(2, 12, 64)}, r"\(batch, 24, 64\)"),
        ({"encoder_hidden_states": torch.ones(2, 7, 3)}, r"\(2, tokens, 24\)"),
        ({"encoder_attention_mask": torch.ones(2, 3)}, "the text's mask"),
        ({"pooled_projections": torch.ones(2, 3)}, "pooled_projections"),
        ({"layout": None}, "without a layout"),
        ({"layout": layout({"sigma": 0.0}, {"sigma": 0.0})}, "nothing to predict"),
        ({"layout": layout({}, {"adapter": "canny"})}, "need MMDiT"),
        ({"joint_attention_kwargs": {"mask": 1}}, "only 'scale'"),
        ({"guidance": torch.ones(2)}, "no guidance embedding"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, scene, change, message):
    _, tokens, text, mask = scene
    inputs = {
        "hidden_states": tokens,
        "encoder_hidden_states": text,
        "timestep": torch.ones(2),
        "encoder_attention_mask": mask,
        "layout": layout({}, {}),
    }
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **change})


def test_positions_end_where_the_configuration_says(model):
    text, t = torch.ones(1, 3, 24), torch.ones(1)
    with pytest.raises(ValueError, match=r"frame 4 is beyond .* end at 4 frames"):
        model(torch.ones(1, 5, 16, 4, 4), text, timestep=t)
    with pytest.raises(ValueError, match=r"17x2 tokens is beyond .* end at 16"):
        model(torch.ones(1, 1, 16, 34, 4), text, timestep=t)
    far = dataclasses.replace(Frame((2, 2)), index=1, offset=(0, 15))
    with pytest.raises(ValueError, match="beyond the model's positions"):
        model(torch.ones(1, 4, 64), text, timestep=t, layout=FrameLayout.build([far], 3))
