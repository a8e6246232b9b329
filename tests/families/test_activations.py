"""Activations of families whose sequences are laid out token by token are read where the generated image is."""

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    ErnieImageTransformer2DModel,
    Flux3Transformer2DModel,
    Ideogram4Transformer2DModel,
    QwenImage21Transformer2DModel,
)
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR
from tiny import randomize
from tiny_families import random

from imgdit import OmniControl
from imgdit.sae.hooks import hooked

GRID = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), dim=-1).flatten(0, 1)


class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


def qwen_image21():
    """A reference image between texts of 5 and 2 tokens, then the image; each place of the encoder is 2 x 2 tokens."""
    mask = torch.tensor([[False] * 5 + [True] * 4 + [False] * 2 + [True] * 4])
    model = QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": random(1, 32, 16),
        "encoder_hidden_states": random(1, 11, 24, seed=4),
        "timestep": torch.tensor([0.6]),
        "img_shapes": [[(1, 4, 4), (1, 4, 4)]],
        "img_mask": mask,
    }


def flux3():
    model = Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    ids = torch.nn.functional.pad(GRID * 0.5, (1, 1))
    return model, {
        "hidden_states": random(1, 16, 16),
        "encoder_hidden_states": random(1, 5, 24, seed=4),
        "timestep": torch.tensor([0.6]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 4),
        "image_cond_hidden_states": random(1, 16, 16, seed=5),
        "image_cond_ids": ids - torch.tensor([0.0, 0.0, 0.0, 1.0]),
    }


def ideogram4():
    model = Ideogram4Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=48, adaln_dim=16,
        llm_features_dim=24, mrope_section=(4, 2, 2),
    )  # fmt: skip
    places = torch.cat([torch.arange(6)[:, None].expand(6, 3), torch.nn.functional.pad(GRID, (1, 0)) + 65536])
    return model, {
        "hidden_states": random(1, 22, 16),
        "encoder_hidden_states": random(1, 22, 24, seed=4),
        "timestep": torch.tensor([0.4]),
        "position_ids": places[None],
        "segment_ids": torch.ones(1, 22, dtype=torch.long),
        "indicator": torch.tensor([[LLM_TOKEN_INDICATOR] * 6 + [OUTPUT_IMAGE_INDICATOR] * 16]),
    }


def ernie_image():
    model = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=16, out_channels=16,
        text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": random(1, 16, 4, 4),
        "timestep": torch.tensor([600.0]),
        "text_bth": random(1, 5, 24, seed=4),
        "text_lens": torch.tensor([5]),
    }


BUILDERS = {
    "Qwen-Image 2.1": (qwen_image21, ("img_in", "transformer_blocks.0", "transformer_blocks.1.attn"), "proj_out"),
    "FLUX.3": (flux3, ("mode_blocks.image.0", "single_transformer_blocks.0"), "proj_out"),
    "Ideogram 4": (ideogram4, ("layers.0", "layers.1.attention"), "final_layer"),
    "ERNIE-Image": (ernie_image, ("x_embedder", "layers.0", "layers.1.self_attention"), "final_linear"),
}
"""How a model is made and called, modules to read from, and the last one."""


def build(name):
    builder, places, last = BUILDERS[name]
    torch.manual_seed(0)
    model, arguments = builder()
    return ToyPipeline(randomize(model).eval()), arguments | {"return_dict": False}, places, last


def image_tokens(name, out):
    """Of the generated image (1, 16, C) in the order of its tokens, in what the model returns."""
    return out.flatten(2).transpose(1, 2) if out.ndim == 4 else out[:, -16:]


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_activations_are_those_of_the_image(name):
    pipe, arguments, places, last = build(name)
    model = pipe.transformer
    plain, seen = model(**arguments)[0], []
    with hooked(pipe, {f"transformer.{last}": seen.append}):
        assert torch.equal(model(**arguments)[0], plain)
    assert seen[0].grids == ((4, 4),) and seen[0].call.timestep == pytest.approx(600.0)
    torch.testing.assert_close(seen[0].values, image_tokens(name, plain))
    for place in places:
        with hooked(pipe, {f"transformer.{place}": lambda tokens: tokens.values}):
            torch.testing.assert_close(model(**arguments)[0], plain)
        with hooked(pipe, {f"transformer.{place}": lambda tokens: tokens.values.flip(1)}):
            assert (image_tokens(name, model(**arguments)[0]) - image_tokens(name, plain)).abs().max() > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_changes_are_made_to_the_image_alone(name):
    """Against a hook of PyTorch on the rows where the image is."""
    pipe, arguments, places, _ = build(name)
    model, place = pipe.transformer, places[1]
    with hooked(pipe, {f"transformer.{place}": lambda tokens: tokens.values * 2}):
        got = model(**arguments)[0]

    def double(module, args, output):
        text, tokens = output if isinstance(output, tuple) else (None, output)
        tokens = tokens.clone()
        rows = {"ERNIE-Image": slice(0, 16), "FLUX.3": (slice(None), slice(0, 16))}
        tokens[rows.get(name, (slice(None), slice(-16, None)))] *= 2
        return tokens if text is None else (text, tokens)

    handle = model.get_submodule(place).register_forward_hook(double)
    torch.testing.assert_close(model(**arguments)[0], got)
    handle.remove()


@torch.no_grad()
def test_qwen_images_own_cache():
    """Later steps hold the image's tokens alone."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    pipe, arguments, _, _ = build("Qwen-Image 2.1")
    cache, found = QwenImage21KVCache(2), []
    for mode in ("extract", "cached"):
        with hooked(pipe, {"transformer.transformer_blocks.1": lambda tokens: found.append(tokens.values)}):
            pipe.transformer(**arguments, kv_cache=cache, kv_cache_mode=mode)
    torch.testing.assert_close(*found)


def test_a_class_without_conditions_is_refused():
    model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4)
    with pytest.raises(ValueError, match=r"OmniControl needs .* with DiTTransformer2DModel"):
        OmniControl(ToyPipeline(model))
