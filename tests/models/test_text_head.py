"""The text head of MMDiT: what it predicts, and that a model without one is what it was."""

import json

import pytest
import torch
from tiny import rope_config, sincos_config, tiny_mmdit

from imgdit import Frame, FrameLayout, KVCache, MMDiT, TextFrame
from imgdit.checkpoints import SCENES
from imgdit.mup import init_weights, mup_table

HEAD = {"text_vocab_size": 11}
DUAL = sincos_config(**HEAD, pooled_projection_dim=None, null_image_tokens=3, qk_norm=None)
MODELS = {
    "rope": rope_config(**HEAD, text_rope_axis=0),
    "rope, no singles": rope_config(**HEAD, num_single_layers=0, text_rope_axis=2),
    "rope, guidance": rope_config(**HEAD, guidance_embeds=True),
    "sincos, no pooled text": DUAL,
}
TOLERANCE = {"atol": 2e-6, "rtol": 2e-6}


def inputs(model, batch=2, text=5, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    rope = model.config.pos_embed_type == "rope"
    level = 1000 / model.config.timestep_scale
    pooled = randn(batch, 32)
    return {
        "hidden_states": randn(batch, 6, 16) if rope else randn(batch, 4, 4, 6),
        "encoder_hidden_states": randn(batch, text, 32),
        "pooled_projections": None if model.config.pooled_projection_dim is None else pooled,
        "timestep": torch.rand(batch, generator=generator) * level,
        **({"img_ids": FrameLayout.build([Frame((2, 3))], text).ids()} if rope else {}),
        **({"guidance": torch.rand(batch, generator=generator) * 4} if model.config.guidance_embeds else {}),
        **changes,
    }


def test_a_model_without_a_head_has_nothing_of_it(tmp_path):
    model = tiny_mmdit()
    assert not [name for name in model.state_dict() if name.startswith(("text_", "null_"))]
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.keys() == json.loads((SCENES / "transformer/config.json").read_text()).keys()
    assert model(**inputs(model)).text_logits is None
    assert len(model(**inputs(model), return_dict=False)) == 1


@torch.no_grad()
def test_a_head_leaves_the_velocity_as_it_is():
    plain, model = tiny_mmdit(), MMDiT(**rope_config(**HEAD, text_rope_axis=0))
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["text_proj_out.weight", "text_proj_out.bias"]
    given = inputs(plain)
    output = model(**given)
    assert torch.equal(output.sample, plain(**given).sample)
    assert output.text_logits.shape == (2, 5, 11)
    assert all(map(torch.equal, model(**given, return_dict=False), output.to_tuple()))


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_it_predicts_the_same(name, tmp_path):
    model = tiny_mmdit(MODELS[name])
    model.save_pretrained(tmp_path)
    again = MMDiT.from_pretrained(tmp_path)
    assert again.config.text_vocab_size == 11 and again.config.text_rope_axis == model.config.text_rope_axis
    with torch.no_grad():
        assert torch.equal(again(**inputs(model)).text_logits, model(**inputs(model)).text_logits)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_trained(name):
    model = tiny_mmdit(MODELS[name])
    output = model(**inputs(model))
    loss = output.sample.square().mean() + output.text_logits.square().mean()
    if model.config.null_image_tokens:
        loss = loss + model(**inputs(model, hidden_states=None)).text_logits.square().mean()
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert len(mup_table(model)) == len(list(model.parameters()))


def test_mup_starts_from_equal_logits_and_scales_the_head():
    model = MMDiT(**rope_config(**HEAD, num_attention_heads=4, mup_base_width=32))
    init_weights(model, torch.Generator().manual_seed(0))
    assert not model(**inputs(model)).text_logits.any()
    rules = {rule.name: rule for rule in mup_table(model)}
    assert rules["text_proj_out.weight"].lr_mult == rules["proj_out.weight"].lr_mult == 0.5
    assert rules["text_proj_out.bias"].lr_mult == 1.0


@torch.no_grad()
def test_masks_of_a_generated_text_differ_by_their_positions():
    """A text of mask tokens alone, embedded without absolute positions: T equal vectors."""
    for axis in (None, 0, 2):
        model = tiny_mmdit(rope_config(**HEAD, text_rope_axis=axis))
        given = inputs(model)
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :1].expand(-1, 5, -1)
        logits = model(**given, text_timestep=torch.ones(2)).text_logits
        spread = float((logits - logits[:, :1]).abs().max())
        assert spread < 1e-5 if axis is None else spread > 1e-3
        # A prompt, which is not generated, has no positions, as without a head.
        prompt = model(**given).text_logits
        assert float((prompt - prompt[:, :1]).abs().max()) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_level_of_the_text_is_its_own(name):
    model = tiny_mmdit({**MODELS[name], "text_rope_axis": None})
    given = inputs(model)
    same = model(**given, text_timestep=given["timestep"])
    torch.testing.assert_close(same.text_logits, model(**given).text_logits, **TOLERANCE)
    torch.testing.assert_close(same.sample, model(**given).sample, **TOLERANCE)
    other = model(**given, text_timestep=given["timestep"] / 2)
    assert float((other.text_logits - same.text_logits).abs().max()) > 1e-4


def caption_of(**image):
    return FrameLayout.build([TextFrame(5, sigma=None), Frame((2, 3), **image)])


def captioning(model, given, layout, text_timestep):
    tokens = torch.randn(2, layout.image_length, 16, generator=torch.Generator().manual_seed(3))
    given = {**given, "hidden_states": tokens, "timestep": torch.zeros(2)}
    del given["img_ids"]
    return {**given, "layout": layout, "text_timestep": text_timestep}


@torch.no_grad()
def test_an_image_that_is_given_whole_leaves_only_the_text_to_predict():
    model = tiny_mmdit(MODELS["rope"])
    given = inputs(model)
    held = captioning(model, given, caption_of(sigma=0.0), torch.tensor([0.3, 0.9]))
    output = model(**held)
    assert output.sample is None and len(model(**held, return_dict=False)) == 1
    free = {**held, "layout": caption_of()}
    torch.testing.assert_close(output.text_logits, model(**free).text_logits, **TOLERANCE)


@torch.no_grad()
def test_an_image_that_sees_itself_is_computed_once():
    model, cache = tiny_mmdit(MODELS["rope"]), KVCache()
    layout = caption_of(sigma=0.0, sees="self")
    given = captioning(model, inputs(model), layout, torch.tensor([0.3, 0.9]))
    first = model(**given, cache=cache).text_logits
    torch.testing.assert_close(first, model(**given).text_logits, **TOLERANCE)
    cache.freeze()
    rest = {**given, "layout": layout.without_frozen(), "hidden_states": torch.zeros(2, 0, 16)}
    rest["encoder_hidden_states"] = torch.randn(2, 5, 32)
    given["encoder_hidden_states"] = rest["encoder_hidden_states"]
    torch.testing.assert_close(model(**rest, cache=cache).text_logits, model(**given).text_logits, **TOLERANCE)


@torch.no_grad()
def test_packed_texts_are_predicted_as_alone():
    model = tiny_mmdit(MODELS["rope"])
    given = captioning(model, inputs(model), caption_of(), torch.tensor([0.3, 0.9]))
    packed = {
        **given,
        "layout": FrameLayout.pack([given["layout"]] * 2),
        "hidden_states": given["hidden_states"].reshape(1, 12, 16),
        "encoder_hidden_states": given["encoder_hidden_states"].reshape(1, 10, 32),
    }
    found = model(**packed).text_logits
    torch.testing.assert_close(found.view(2, 5, 11), model(**given).text_logits, **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_vocab_size": 0}, "text_vocab_size must be positive, got 0"),
        ({"text_vocab_size": None, "text_rope_axis": 0}, "are of a text head; set text_vocab_size"),
        ({"text_vocab_size": None, "null_image_tokens": 8}, "are of a text head; set text_vocab_size"),
        ({"text_rope_axis": 3}, "one of 3 rotary axes, from 0, .* got 3"),
        ({**sincos_config(), "text_rope_axis": 0}, "pos_embed_type='rope'; got 0 with pos_embed_type='sincos'"),
        ({"context_pre_only": True, "num_single_layers": 0}, "the text head reads it behind that block"),
        ({"null_image_tokens": -1}, "cannot be negative, got -1"),
        ({"pooled_projection_dim": None, "guidance_embeds": True}, "guidance_embeds needs pooled text"),
        ({"pooled_projection_dim": 0}, "pooled_projection_dim must be positive, got 0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(**{**rope_config(**HEAD), **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rope", {"text_timestep": torch.ones(3)}, r"text_timestep must be \(2,\), one per sample, got shape \(3,\)"),
        ("rope", {"hidden_states": None, "img_ids": None}, r"null_image_tokens=0\); give an image"),
        (
            "sincos, no pooled text",
            {"hidden_states": None, "img_ids": torch.zeros(3, 3)},
            "leave out layout",
        ),
        ("sincos, no pooled text", {"pooled_projections": torch.ones(2, 32)}, r"must be None, got \(2, 32\)"),
        ("rope", {"pooled_projections": None}, r"must be \(2, 32\), got None"),
    ],
)
def test_wrong_arguments(name, changes, message):
    model = tiny_mmdit(MODELS[name])
    with pytest.raises(ValueError, match=message):
        model(**inputs(model, **changes))


def test_what_a_model_without_a_head_refuses():
    model = tiny_mmdit()
    with pytest.raises(ValueError, match="this model has no text head; hold every text"):
        model(**inputs(model, text_timestep=torch.ones(2)))
    with pytest.raises(ValueError, match="have pooled text and no text head"):
        tiny_mmdit(MODELS["rope"]).to_diffusers()
