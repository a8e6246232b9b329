"""What MMDiT refuses, and that it says what it got, what it expects and what to do."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from tiny import rope_config, sincos_config, tiny_mmdit, tiny_vae

from imgdit import Frame, FrameLayout, KVCache, MMDiT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes_dims_rope": (4, 6, 8)}, r"add up to attention_head_dim=16, got \(4, 6, 8\) \(sum 18\)"),
        ({"axes_dims_rope": (3, 6, 7)}, "three even numbers"),
        ({"axes_dims_rope": (8, 8)}, "three even numbers"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive, got 0"),
        ({"num_layers": -1}, "cannot be negative"),
        ({"num_layers": 0, "num_single_layers": 0}, "at least one block"),
        ({"pos_embed_type": "learned"}, "pos_embed_type must be one of 'rope', 'sincos', got 'learned'"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be one of 'rms_norm', None, got 'layer_norm'"),
        ({"dual_attention_layers": (0, 5)}, r"names blocks \[5\], but there are num_layers=2"),
        ({"context_pre_only": True}, "set num_single_layers=0 or context_pre_only=False"),
        ({"mup_base_width": 24}, "multiple of attention_head_dim=16 .* got 24"),
        ({"mup_base_width": 8}, "multiple of attention_head_dim=16 .* got 8"),
        ({"mup_adaln_init": "ones"}, "'zero', 'normal', got 'ones'"),
        (
            {"pos_embed_type": "sincos", "num_attention_heads": 1, "attention_head_dim": 6},
            "width divisible by 4, got 6",
        ),
    ],
)
def test_wrong_config(changes, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(**rope_config(**changes))


def arguments(model, **changes):
    rope = model.config.pos_embed_type == "rope"
    return {
        "hidden_states": torch.randn(2, 6, 16) if rope else torch.randn(2, 4, 4, 6),
        "encoder_hidden_states": torch.randn(2, 3, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.rand(2),
        **({"img_ids": torch.zeros(6, 3)} if rope else {}),
        **changes,
    }


LAYOUT = FrameLayout.build([Frame((2, 3))], 3)
HELD = FrameLayout.build([Frame((2, 3), sigma=0.0)], 3)
PACKED = FrameLayout.pack([LAYOUT, LAYOUT])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.randn(6, 16)}, r"must be \(batch, tokens, channels\), got shape \(6, 16\)"),
        ({"hidden_states": torch.randn(2, 4, 4, 6)}, r"must be \(batch, tokens, channels\), got shape \(2, 4, 4, 6\)"),
        ({"hidden_states": torch.randn(2, 6, 12)}, "16 channels per token, got 12"),
        ({"encoder_hidden_states": torch.randn(2, 32)}, r"must be \(batch, tokens, 32\), got \(2, 32\)"),
        ({"encoder_hidden_states": torch.randn(2, 3, 8)}, r"must be \(batch, tokens, 32\), got \(2, 3, 8\)"),
        ({"encoder_hidden_states": torch.randn(1, 3, 32)}, "hidden_states has batch 2, encoder_hidden_states 1"),
        ({"pooled_projections": torch.randn(2, 8)}, r"must be \(2, 32\), got \(2, 8\)"),
        ({"timestep": torch.rand(3)}, r"timestep must be \(2,\), one per sample, or \(2, 1\), one per frame"),
        ({"img_ids": None}, r"img_ids must be \(6, 3\), one \(frame, row, column\) per token, got nothing"),
        ({"img_ids": torch.zeros(5, 3)}, r"img_ids must be \(6, 3\).* got shape \(5, 3\)"),
        ({"img_ids": torch.zeros(2, 6, 3)}, r"img_ids must be \(6, 3\)"),
        ({"txt_ids": torch.zeros(4, 3)}, r"txt_ids must be \(3, 3\)"),
        ({"guidance": torch.ones(2)}, "has no guidance embedding"),
        ({"joint_attention_kwargs": {"mask": 1}}, r"knows only 'scale', got \['mask'\]"),
        ({"encoder_attention_mask": torch.ones(2, 4)}, r"must be \(2, 3\), got \(2, 4\)"),
        ({"layout": LAYOUT}, "pass either img_ids or layout"),
        ({"layout": FrameLayout.build([Frame((2, 2))], 3), "img_ids": None}, r"frames \(4,\) have 4"),
        ({"layout": FrameLayout.build([Frame((2, 3))], 4), "img_ids": None}, "has 3 tokens, the layout expects 4"),
        ({"layout": HELD, "img_ids": None}, "nothing to predict"),
        ({"cache": KVCache()}, "pass layout= as well"),
        (
            {
                "layout": PACKED,
                "img_ids": None,
                "hidden_states": torch.randn(2, 12, 16),
                "encoder_hidden_states": torch.randn(2, 6, 32),
            },
            "one sequence of batch 1, got batch 2",
        ),
        (
            {
                "layout": PACKED,
                "img_ids": None,
                "hidden_states": torch.randn(1, 12, 16),
                "encoder_hidden_states": torch.randn(1, 6, 32),
                "encoder_attention_mask": torch.ones(1, 6),
            },
            "a packed layout has no padding",
        ),
    ],
)
def test_wrong_arguments(changes, message):
    model = tiny_mmdit()
    model(**arguments(model))
    with pytest.raises(ValueError, match=message):
        model(**arguments(model, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.randn(2, 4, 5, 6)}, "latents of 5x6 cells do not divide into patches of 2x2"),
        ({"hidden_states": torch.randn(2, 3, 4, 6)}, "must have 4 channels, got 3"),
        ({"hidden_states": torch.randn(2, 4, 26, 4)}, "13x2 patches, the position table ends at 12x12"),
        ({"hidden_states": torch.randn(2, 6, 16)}, "needs a layout to place tokens"),
        ({"img_ids": torch.zeros(6, 3)}, "img_ids are rotary positions"),
    ],
)
def test_wrong_arguments_of_a_sincos_model(changes, message):
    model = tiny_mmdit(sincos_config())
    model(**arguments(model))
    with pytest.raises(ValueError, match=message):
        model(**arguments(model, **changes))


def test_a_missing_guidance():
    model = tiny_mmdit(rope_config(guidance_embeds=True))
    with pytest.raises(ValueError, match=r"takes the guidance scale as an input .* pass guidance="):
        model(**arguments(model))


def test_an_unknown_attention_backend():
    with pytest.raises(ValueError, match=r"backend=.flashy.. must be one of the following: .*native"):
        tiny_mmdit().set_attention_backend("flashy")


def test_xformers_without_cuda():
    pytest.importorskip("xformers")
    from diffusers.models.attention_dispatch import attention_backend

    model = tiny_mmdit()
    with attention_backend("xformers"), pytest.raises(ValueError, match="kernels for CUDA only"):
        model(**arguments(model))
    with pytest.raises((ValueError, ModuleNotFoundError), match=r"cuda|xformers"):
        model.enable_xformers_memory_efficient_attention()


@pytest.mark.parametrize("other", [tiny_vae(), DiTTransformer2DModel(2, 8, 4, num_layers=1)])
def test_a_folder_of_another_architecture(other, tmp_path):
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"this folder holds a {type(other).__name__}; MMDiT reads its own, Flux"):
        MMDiT.from_pretrained(tmp_path)
    if isinstance(other, AutoencoderKL):
        with pytest.raises(ValueError, match="from_diffusers takes a FluxTransformer2DModel or SD3Transformer2DModel"):
            MMDiT.from_diffusers(other)


def test_unknown_configuration_keys_name_the_nearest(tmp_path):
    tiny_mmdit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_layer"] = config.pop("num_layers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown configuration key 'num_layer'; did you mean 'num_layers'"):
        MMDiT.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_layer"):
        MMDiT(num_layer=3)


def test_a_truncated_checkpoint(tmp_path):
    tiny_mmdit().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((OSError, ValueError, RuntimeError), match=r"(?i)safetensor|incomplete|checkpoint"):
        MMDiT.from_pretrained(tmp_path)


WITH_FROZEN = FrameLayout.build([Frame((2, 3)), Frame((2, 2), sigma=0.0, sees="self")], 3)


@torch.no_grad()
def test_a_cache_of_something_else():
    model = tiny_mmdit(rope_config())

    def run(layout, batch=2, cache=None):
        inputs = {"encoder_hidden_states": torch.randn(batch, 3, 32), "pooled_projections": torch.randn(batch, 32)}
        tokens = torch.randn(batch, layout.image_length, 16)
        return model(tokens, **inputs, timestep=torch.rand(batch), layout=layout, cache=cache).sample

    rest, cache = WITH_FROZEN.without_frozen(), KVCache()
    with pytest.raises(ValueError, match="leaves its frozen frames to a key/value cache; pass the cache="):
        run(rest)
    with pytest.raises(ValueError, match="still written; run one step with all frames first"):
        run(rest, cache=cache)
    run(WITH_FROZEN, cache=cache)
    cache.freeze()
    run(rest, cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens of batch 2, this call reads 4 of batch 3; call clear"):
        run(rest, batch=3, cache=cache)
    other = FrameLayout.build([Frame((2, 3)), Frame((2, 3), sigma=0.0, sees="self")], 3).without_frozen()
    with pytest.raises(ValueError, match="holds 4 tokens of batch 2, this call reads 6 of batch 2"):
        run(other, cache=cache)
    run(rest, cache=cache)
