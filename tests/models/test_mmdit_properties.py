"""What must hold for any frames: equivalences between the ways of saying the same thing."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import rope_config, sincos_config, tiny_mmdit

from imgdit import Frame, FrameLayout, KVCache, MMDiT
from imgdit.models.functional import table_positions

MODELS = {
    "rope": tiny_mmdit(rope_config()),
    "rope, guidance, no singles": tiny_mmdit(rope_config(guidance_embeds=True, num_single_layers=0)),
    "sincos, dual attention": tiny_mmdit(sincos_config(dual_attention_layers=(0, 1))),
}
models = st.sampled_from(sorted(MODELS))
sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))
TOLERANCE = {"atol": 2e-6, "rtol": 2e-6}


def inputs(model, layout, batch=1, seed=0, samples=None):
    generator = torch.Generator().manual_seed(seed)
    samples = samples or batch

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    level = 1000 / model.config.timestep_scale
    return {
        "hidden_states": randn(batch, layout.image_length, model.token_channels),
        "encoder_hidden_states": randn(batch, layout.text_length, 32),
        "pooled_projections": randn(samples, 32),
        "timestep": torch.rand(samples, generator=generator) * level,
        **({"guidance": torch.rand(samples, generator=generator) * 4} if model.config.guidance_embeds else {}),
        "layout": layout,
    }


@torch.no_grad()
def run(model, **kwargs):
    return model(**kwargs).sample


@settings(max_examples=30, deadline=None)
@given(models, st.lists(sizes, min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 9))
def test_frames_at_one_noise_level_are_the_plain_model(name, grids, batch, seed):
    """F frames at level t = one frame of all their tokens at level t."""
    model = MODELS[name]
    layout = FrameLayout.build([Frame(size, index=i) for i, size in enumerate(grids)], 3)
    kwargs = inputs(model, layout, batch, seed)
    if model.config.pos_embed_type == "rope":
        plain = {**kwargs, "layout": None, "img_ids": layout.ids(), "txt_ids": torch.zeros(3, 3)}
    else:  # sin-cos positions do not know frames: only one frame is the plain model
        layout = FrameLayout.build([Frame((2, 3))], 3)
        kwargs = inputs(model, layout, batch, seed)
        tokens = kwargs["hidden_states"].view(batch, 2, 3, 4, 2, 2)
        plain = {**kwargs, "layout": None, "hidden_states": tokens.permute(0, 3, 1, 4, 2, 5).reshape(batch, 4, 4, 6)}
    expected = run(model, **plain)
    if expected.ndim == 4:
        expected = expected.view(batch, 4, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, 6, 16)
    torch.testing.assert_close(run(model, **kwargs), expected, **TOLERANCE)
    levels = kwargs["timestep"][:, None].expand(-1, len(layout.frames))
    per_frame = {**kwargs, "timestep": levels}
    torch.testing.assert_close(run(model, **per_frame), expected, **TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(models, st.permutations(range(4)), st.sampled_from(["all", "joint", "self"]), st.integers(0, 9))
def test_the_order_of_conditions_does_not_matter(name, order, sees, seed):
    model = MODELS[name]
    conditions = [
        Frame((1 + i % 2, 2), sigma=0.1 * i, adapter=f"a{i}", sees=sees, offset=(0, -2 * i), guidance=1.0)
        for i in range(4)
    ]
    target = Frame((2, 3))
    layout = FrameLayout.build([target, *conditions], 2, main_adapters=())
    kwargs = inputs(model, layout, seed=seed)
    expected = run(model, **kwargs)
    parts = kwargs["hidden_states"].split(list(layout.lengths), dim=1)
    kwargs["layout"] = FrameLayout.build([*(conditions[i] for i in order), target], 2, main_adapters=())
    kwargs["hidden_states"] = torch.cat([*(parts[1 + i] for i in order), parts[0]], dim=1)
    torch.testing.assert_close(run(model, **kwargs), expected, **TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(models, sizes, st.integers(0, 9))
def test_a_frame_nobody_sees_changes_nothing(name, size, seed):
    model = MODELS[name]
    alone = FrameLayout.build([Frame((2, 2))], 3)
    kwargs = inputs(model, alone, seed=seed)
    expected = run(model, **kwargs)
    visible = torch.ones(3, 3, dtype=torch.bool)
    visible[:2, 2] = False
    stranger = Frame(size, sigma=0.3, index=1)
    kwargs["layout"] = FrameLayout.build([Frame((2, 2)), stranger], 3, visible=visible)
    tokens = torch.randn(1, stranger.length, model.token_channels)
    kwargs["hidden_states"] = torch.cat([kwargs["hidden_states"], tokens], dim=1)
    torch.testing.assert_close(run(model, **kwargs), expected, **TOLERANCE)
    visible[:2, 2] = True
    kwargs["layout"] = FrameLayout.build([Frame((2, 2)), stranger], 3, visible=visible)
    assert (run(model, **kwargs) - expected).abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(models, st.lists(st.tuples(sizes, st.integers(1, 4), st.booleans()), min_size=1, max_size=4), st.integers(0, 9))
def test_packed_equals_one_by_one(name, scenes, seed):
    model = MODELS[name]
    layouts = []
    for size, text, condition in scenes:
        frames = [Frame(size)]
        if condition:
            frames.append(Frame((1, 2), sigma=0.0, sees="self", offset=(0, 2), guidance=1.0))
        layouts.append(FrameLayout.build(frames, text))
    single = [inputs(model, layout, seed=seed + i) for i, layout in enumerate(layouts)]
    expected = torch.cat([run(model, **kwargs) for kwargs in single], dim=1)
    packed = {
        key: torch.cat([kwargs[key] for kwargs in single], dim=1 if "hidden" in key else 0)
        for key in single[0]
        if key != "layout"
    }
    got = run(model, **packed, layout=FrameLayout.pack(layouts))
    torch.testing.assert_close(got, expected, **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(models, st.integers(0, 2), st.integers(1, 2), st.integers(0, 9))
def test_cached_equals_uncached(name, given_frames, batch, seed):
    """Steps that read the frozen frames equal steps that compute them, whatever the level of the writing step."""
    model = MODELS[name]
    frames = [Frame((2, 2))]
    frames += [Frame((1, 3), sigma=0.0, sees="self", offset=(0, -3 * i), guidance=1.0) for i in range(2)]
    frames += [Frame((1, 1), sigma=0.0, index=i + 1, guidance=1.0) for i in range(given_frames)]
    layout = FrameLayout.build(frames, 3)
    kwargs = inputs(model, layout, batch, seed)
    cache = KVCache()
    torch.testing.assert_close(run(model, **kwargs, cache=cache), run(model, **kwargs), atol=0, rtol=0)
    cache.freeze()
    kwargs["timestep"] = kwargs["timestep"] * 0.5
    kwargs["hidden_states"][:, :4] += 1
    expected = run(model, **kwargs)
    parts = kwargs["hidden_states"].split(list(layout.lengths), dim=1)
    kwargs["hidden_states"] = torch.cat([parts[0], *parts[3:]], dim=1)
    kwargs["layout"] = layout.without_frozen()
    assert kwargs["layout"].live == (0, *range(3, 3 + given_frames))
    torch.testing.assert_close(run(model, **kwargs, cache=cache), expected, **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(models, st.integers(1, 4), st.integers(0, 9))
def test_padded_text_is_as_if_it_were_not_there(name, padding, seed):
    model = MODELS[name]
    layout = FrameLayout.build([Frame((2, 2))], 3)
    kwargs = inputs(model, layout, 2, seed)
    expected = run(model, **kwargs)
    kwargs["layout"] = FrameLayout.build([Frame((2, 2))], 3 + padding)
    kwargs["encoder_hidden_states"] = torch.cat(
        [kwargs["encoder_hidden_states"], torch.randn(2, padding, 32) * 10], dim=1
    )
    kwargs["encoder_attention_mask"] = torch.arange(3 + padding).expand(2, -1) < 3
    torch.testing.assert_close(run(model, **kwargs), expected, **TOLERANCE)


LAYOUT = FrameLayout.build([Frame((2, 2)), Frame((1, 3), 0.0, sees="self", offset=(0, 3), guidance=1.0)], 3)


@pytest.mark.parametrize("name", MODELS)
def test_deepcopy_and_save_load_change_nothing(name, tmp_path):
    model = MODELS[name]
    kwargs = inputs(model, LAYOUT)
    expected = run(model, **kwargs)
    assert torch.equal(run(copy.deepcopy(model), **kwargs), expected)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MMDiT.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded, **kwargs), expected, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_changes_little(name):
    kwargs = inputs(MODELS[name], LAYOUT)
    expected = run(MODELS[name], **kwargs)
    half = copy.deepcopy(MODELS[name]).to(torch.bfloat16)
    kwargs = {k: v.bfloat16() if torch.is_tensor(v) and k != "timestep" else v for k, v in kwargs.items()}
    got = run(half, **kwargs)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_no_gradient(name):
    model = copy.deepcopy(MODELS[name])
    kwargs = inputs(model, LAYOUT)

    def gradients():
        model.zero_grad()
        model(**kwargs).sample.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    assert plain.keys() == again.keys() == dict(model.named_parameters()).keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [FrameLayout.build([Frame((2, 2))], 3), LAYOUT], ids=["one frame", "two frames"])
def test_regional_compile_changes_nothing(name, layout):
    model = copy.deepcopy(MODELS[name])
    kwargs = inputs(model, layout)
    expected = run(model, **kwargs)
    torch.compiler.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(model, **kwargs), expected, **TOLERANCE)


FIRST, *OTHERS = MODELS


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_blocks_are_compiled_whole_for_texts_of_any_length(name):
    """With the second length rows become symbols, which a compiled block can neither sort nor keep as numbers."""
    model = copy.deepcopy(MODELS[name])
    frames = [
        Frame((2, 2)),
        Frame((1, 3), 0.0, sees="joint", adapter="a"),
        Frame((1, 3), 0.0, sees="self", strength=0.5),
    ]
    calls = [inputs(model, FrameLayout.build(frames, length)) for length in (3, 5, 8)]
    expected = [run(model, **call) for call in calls]
    torch.compiler.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for call, alone in zip(calls, expected):
        torch.testing.assert_close(run(model, **call), alone, **TOLERANCE)


def with_adapters(name, **config):
    model = copy.deepcopy(MODELS[name])
    for i, adapter in enumerate(("canny", "depth")):
        model.add_adapter(
            LoraConfig(
                r=2 + i, target_modules=["to_q", "to_v", "net.2", "linear", "proj_mlp", "add_k_proj"], **config
            ),
            adapter_name=adapter,
        )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.set_adapters(["canny", "depth"])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_acts_on_its_frame_alone(name):
    """Identity, effect, removal."""
    plain, model = MODELS[name], with_adapters(name)
    kwargs = inputs(plain, LAYOUT)
    target, condition = LAYOUT.frames

    def layout(adapter):
        return FrameLayout.build([target, dataclasses.replace(condition, adapter=adapter)], 3, main_adapters=())

    expected = run(plain, **kwargs)
    # Loaded, and no frame has it: the base model.
    torch.testing.assert_close(run(model, **{**kwargs, "layout": layout(None)}), expected, **TOLERANCE)
    # On a frame: the image changes, by each adapter in its own way.
    canny, depth = (run(model, **{**kwargs, "layout": layout(a)}) for a in ("canny", "depth"))
    assert (canny - expected).abs().max() > 1e-3 and (canny - depth).abs().max() > 1e-3
    # On a frame that the target does not see: the base model without that frame.
    visible = torch.eye(3, dtype=torch.bool)
    visible[:2, :2] = True
    hidden = FrameLayout.build(layout("canny").frames, 3, visible=visible, main_adapters=())
    alone = {**kwargs, "layout": FrameLayout.build([target], 3)}
    alone["hidden_states"] = kwargs["hidden_states"][:, : target.length]
    torch.testing.assert_close(run(model, **{**kwargs, "layout": hidden}), run(plain, **alone), **TOLERANCE)
    # Gone again: bitwise the base model.
    model.unload_lora()
    assert torch.equal(run(model, **kwargs), expected)


def test_adapters_of_the_text_and_target():
    model, plain = with_adapters("rope"), MODELS["rope"]
    kwargs = inputs(plain, LAYOUT)
    frames = [LAYOUT.frames[0], dataclasses.replace(LAYOUT.frames[1], adapter="depth")]
    everyone = run(model, **{**kwargs, "layout": FrameLayout.build(frames, 3)})
    named = run(model, **{**kwargs, "layout": FrameLayout.build(frames, 3, main_adapters=["canny"])})
    nobody = run(model, **{**kwargs, "layout": FrameLayout.build(frames, 3, main_adapters=())})
    assert torch.equal(everyone, named)
    assert (everyone - nobody).abs().max() > 1e-3
    model.set_adapters(["canny", "depth"], [0.0, 1.0])
    torch.testing.assert_close(run(model, **{**kwargs, "layout": FrameLayout.build(frames, 3)}), nobody, **TOLERANCE)


def test_a_fused_adapter_cannot_act_on_rows():
    model = with_adapters("rope")
    model.fuse_lora()
    frames = [LAYOUT.frames[0], dataclasses.replace(LAYOUT.frames[1], adapter="depth")]
    with pytest.raises(ValueError, match="is fused into the base weights"):
        run(model, **{**inputs(model, LAYOUT), "layout": FrameLayout.build(frames, 3)})


def test_dora_cannot_act_on_rows():
    model = with_adapters("rope", use_dora=True)
    frames = [LAYOUT.frames[0], dataclasses.replace(LAYOUT.frames[1], adapter="depth")]
    with pytest.raises(ValueError, match="'canny' is not a plain LoRA"):
        run(model, **{**inputs(model, LAYOUT), "layout": FrameLayout.build(frames, 3)})


def test_sincos_positions_beyond_the_table_continue_it():
    """One frame off the table switches all to the formula: the others stay where the table had them."""
    model = MODELS["sincos, dual attention"]
    frames = [Frame((2, 3)), Frame((2, 2), 0.0, offset=(1, 1))]
    table = table_positions(model.pos_embed, FrameLayout.build(frames, 1))
    formula = table_positions(model.pos_embed, FrameLayout.build([*frames, Frame((1, 1), 0.0, offset=(40, 0))], 1))
    torch.testing.assert_close(formula[:-1], table, atol=1e-6, rtol=1e-6)
    assert (formula[-1] - table).abs().amax(1).min() > 0.1
    half = Frame((1, 1), 0.0, scale=2.0)  # between four cells
    assert table_positions(model.pos_embed, FrameLayout.build([frames[0], half], 1)).isfinite().all()


def test_a_lora_on_the_patch_convolution_acts_on_tokens_too():
    """A sin-cos model embeds a latent grid by a convolution and a layout's tokens by a linear layer: same adapters."""
    model = copy.deepcopy(MODELS["sincos, dual attention"])
    model.add_adapter(LoraConfig(r=2, target_modules=["pos_embed.proj"]), adapter_name="canny")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    layout = FrameLayout.build([Frame((2, 3))], 3)
    kwargs = inputs(model, layout)
    grid = kwargs["hidden_states"].view(1, 2, 3, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 4, 6)
    expected = run(model, **{**kwargs, "hidden_states": grid, "layout": None})
    expected = expected.view(1, 4, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 6, 16)
    torch.testing.assert_close(run(model, **kwargs), expected, **TOLERANCE)
    owned = FrameLayout.build([Frame((2, 3), adapter="canny")], 3, main_adapters=())
    torch.testing.assert_close(run(model, **{**kwargs, "layout": owned}), expected, **TOLERANCE)
    unowned = FrameLayout.build([Frame((2, 3))], 3, main_adapters=())
    plain = run(MODELS["sincos, dual attention"], **kwargs)
    torch.testing.assert_close(run(model, **{**kwargs, "layout": unowned}), plain, **TOLERANCE)
    assert (plain - expected).abs().max() > 1e-3
