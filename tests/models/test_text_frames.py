"""Text frames in `MMDiT`: caches, blocks, adapters, and what they leave unchanged."""

import pytest
import torch
from peft import LoraConfig

from imgdit import Frame, FrameLayout, KVCache, MMDiT, TextFrame

IMAGE = Frame((2, 2), sigma=0.0, sees="self")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = {
        "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 12, "pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 4), "qk_norm": "rms_norm",
        "text_vocab_size": 20, "text_rope_axis": 2, "text_embeds": True,
    }  # fmt: skip
    made = MMDiT(**config).eval()
    for parameter in made.parameters():  # zero-initialised modulation would hide everything
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def inputs(layout, batch=2, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": randn(batch, layout.image_length, 8),
        "encoder_hidden_states": randn(batch, layout.text_length, 12),
        "pooled_projections": randn(batch, 6),
        "timestep": torch.zeros(batch),
        "layout": layout,
        **more,
    }


def test_a_clean_text_frame_is_a_prompt(model):
    frames = [Frame((2, 3)), Frame((1, 2), sigma=0.0, index=1)]
    given = inputs(FrameLayout.build(frames, 3), timestep=torch.tensor([0.3, 0.9]))
    prompt = model(**given)
    text = model(**{**given, "layout": FrameLayout.build([*frames, TextFrame(3)])})
    assert torch.equal(prompt.sample, text.sample) and prompt.text_logits is text.text_logits is None


def test_a_caption_is_the_same_whether_the_image_is_cached(model):
    layout = FrameLayout.build([IMAGE, TextFrame(3, None)])
    given = inputs(layout, text_timestep=torch.tensor([0.2, 0.7]))
    whole = model(**given)
    assert whole.sample is None and whole.text_logits.shape == (2, 3, 20)

    alone, cache = layout.only_frozen(), KVCache()
    none = torch.zeros(2, 0, 12)
    output = model(**{**given, "encoder_hidden_states": none, "layout": alone, "text_timestep": None}, cache=cache)
    assert output.sample is output.text_logits is None
    cache.freeze()
    rest = {**given, "hidden_states": torch.zeros(2, 0, 8), "layout": layout.without_frozen()}
    torch.testing.assert_close(model(**rest, cache=cache).text_logits, whole.text_logits)

    twice = {name: value.repeat_interleave(2, 0) for name, value in rest.items() if name != "layout"}
    logits = model(**twice, layout=rest["layout"], cache=cache.of_samples(torch.tensor([0, 0, 1, 1]))).text_logits
    torch.testing.assert_close(logits, whole.text_logits.repeat_interleave(2, 0))


def test_positions_tell_masks_apart_and_the_level_matters(model):
    layout = FrameLayout.build([IMAGE, TextFrame(3, None)])
    given = inputs(layout, text_timestep=torch.tensor([1.0, 1.0]))
    given["encoder_hidden_states"] = model.text_embedder(torch.full((2, 3), 7))
    logits = model(**given).text_logits
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3
    lower = model(**{**given, "text_timestep": torch.tensor([0.5, 1.0])}).text_logits
    assert not torch.allclose(lower[0], logits[0]) and torch.equal(lower[1], logits[1])


def test_blocks_with_a_cache_are_those_without(model):
    layout = FrameLayout.build([IMAGE, *TextFrame.in_blocks(6, 2, done=2)])
    given = inputs(layout, text_timestep=torch.tensor([0.5, 1.0]))
    whole = model(**given).text_logits
    assert whole.shape == (2, 2, 20)
    cache = KVCache()
    torch.testing.assert_close(model(**given, cache=cache).text_logits, whole)
    cache.freeze()
    rest = layout.without_frozen()
    given |= {"hidden_states": given["hidden_states"][:, :0], "layout": rest}
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, 4:]
    torch.testing.assert_close(model(**given, cache=cache).text_logits, whole)


def test_an_adapter_of_the_text_reads_its_rows_only(model):
    layout = FrameLayout.build([Frame((2, 2)), TextFrame(2), TextFrame(3, None, adapter="text", sees="all")])
    given = inputs(layout, timestep=torch.full((2,), 0.5))
    plain = model(**given)
    targets = r".*(add_q_proj|to_q|context_embedder|norm1_context\.linear)"
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "text")
    changed = model(**given)
    assert not torch.allclose(changed.text_logits, plain.text_logits)
    unseen = FrameLayout.build([Frame((2, 2)), TextFrame(2), TextFrame(3, None, adapter="text")],
        visible=torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 1]]).bool())  # fmt: skip
    adapted = model(**{**given, "layout": unseen}).sample
    model.disable_adapters()
    assert torch.equal(model(**given).text_logits, plain.text_logits)
    torch.testing.assert_close(model(**{**given, "layout": unseen}).sample, adapted)


def test_both_are_generated_at_their_own_levels(model):
    layout = FrameLayout.build([Frame((2, 2)), TextFrame(3, None)])
    output = model(**inputs(layout, timestep=torch.tensor([0.2, 0.8]), text_timestep=torch.tensor([0.9, 0.1])))
    assert output.sample.shape == (2, 4, 8) and output.text_logits.shape == (2, 3, 20)
    packed = FrameLayout.pack([layout, layout])
    given = inputs(layout, timestep=torch.tensor([0.2, 0.8]), text_timestep=torch.tensor([0.9, 0.1]))
    flat = {
        **given,
        "layout": packed,
        **{name: given[name].flatten(0, 1)[None] for name in ("hidden_states", "encoder_hidden_states")},
    }
    torch.testing.assert_close(model(**flat).text_logits[0], output.text_logits.flatten(0, 1))


def test_a_pass_without_anything_to_predict_needs_a_cache(model):
    layout = FrameLayout.build([IMAGE, TextFrame(3, None)]).only_frozen()
    with pytest.raises(ValueError, match="nothing to predict"):
        model(**inputs(layout))
