"""Krea 2 beside conditions: normalisation, the second call of guidance, LoRA names."""

import pytest
import torch
from diffusers.loaders import Krea2LoraLoaderMixin
from repository_names import comfyui, kohya, own_tensors, scaled
from safetensors.torch import save_file
from tiny_control import image
from tiny_families import loaded, make, near, passes
from tiny_krea2 import CASES, folder, krea2
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from imgdit import Condition, OmniControl
from imgdit.families.krea2 import FAMILY
from imgdit.lora.dialects import family_of
from imgdit.lora.files import adapter_pairs
from imgdit.models.functional import unpack
from imgdit.sae.hooks import hooked
from imgdit.training.user_images.encoder import Encoder

CASE = CASES["Krea 2"]


def test_tokens_have_the_normalisation_that_the_pipeline_undoes():
    pipe = krea2()
    pixels = image()[None] * 2 - 1
    latents = unpack(FAMILY.tokens.encode(pipe.transformer, pipe.vae, pixels, None), 2, (4, 4))
    mean, deviation = (
        torch.tensor(x)[:, None, None] for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    near(latents * deviation + mean, pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0])


def test_a_call_without_mask_sees_all_text(tmp_path):
    control = loaded(CASE, krea2(), tmp_path)
    given = passes(CASE, control, call={"steps": 1})[0][0][0]
    whole = given | {"encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool)}
    with torch.no_grad(), control.use([Condition(image(), "canny")]):
        near(control.transformer(**given | {"encoder_attention_mask": None})[0], control.transformer(**whole)[0])


def test_gradients_of_wrapped_blocks(tmp_path):
    """PyTorch's wrapper for activation checkpointing, which FSDP uses: two forward passes before one backward pass."""
    control = loaded(CASE, krea2(), tmp_path)
    model = control.transformer
    (first, _), *_, (last, _) = passes(CASE, control, call={"steps": 2})[0]
    weights = [p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name]
    found = []
    for wrapped in (False, True):
        if wrapped:
            model.transformer_blocks = torch.nn.ModuleList(map(checkpoint_wrapper, model.transformer_blocks))
        with control.use([Condition(image(), "canny")]):
            loss = sum(model(**given)[0].square().sum() for given in (first, last))
        found.append(torch.autograd.grad(loss, weights, allow_unused=True))
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(a is not None and a.any() for a in found[1])


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_activations_tell_the_negative_prompts_call(guidance):
    pipe, calls = krea2(), []
    with hooked(pipe, {"transformer.transformer_blocks.0": lambda tokens: calls.append(tokens.call)}):
        make(CASE, pipe, batch=2, steps=2, guidance_scale=guidance)
    halves = [(call.conditional, call.unconditional) for call in calls]
    whole = slice(0, 2)
    assert halves == [(whole, None), (None, whole)] * 2 if guidance else [(whole, None)] * 2


def test_activations_of_the_text():
    pipe, shapes = krea2(), []
    names = ["text_fusion.refiner_blocks.0", "txt_in"]
    with hooked(pipe, {f"transformer.{name}": lambda tokens: shapes.append(tokens.values.shape) for name in names}):
        make(CASE, pipe, steps=1, guidance_scale=0.0)
    assert shapes == [(1, 6, 24), (1, 6, 64)]


def test_captions_and_images_are_encoded_for_training(tmp_path):
    encoder = Encoder(str(folder(tmp_path)))
    embeddings, pooled, _ = encoder.text("w1 w2")
    assert embeddings.shape[1] == 3 * 24 and len(embeddings) < 64 and pooled.shape == (0,)
    assert encoder.latents(image()).shape == (4, 8, 8)


# LoRA names

BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
LAYERS = {
    **{
        f"{own}.{layer}": (f"{block}.{part}",)
        for own, block in (
            ("blocks.1", "transformer_blocks.1"),
            ("txtfusion.layerwise_blocks.0", "text_fusion.layerwise_blocks.0"),
            ("txtfusion.refiner_blocks.0", "text_fusion.refiner_blocks.0"),
        )
        for layer, part in BLOCK.items()
    },
    "first": ("img_in",),
    "last.linear": ("final_layer.linear",),
    "tmlp.0": ("time_embed.linear_1",),
    "tmlp.2": ("time_embed.linear_2",),
    "tproj.1": ("time_mod_proj",),
    "txtmlp.1": ("txt_in.linear_1",),
    "txtmlp.3": ("txt_in.linear_2",),
    "txtfusion.projector": ("text_fusion.projector",),
}


@pytest.mark.parametrize("key", [comfyui, scaled, kohya])
def test_files_by_the_repositorys_names_are_read_whole(key, tmp_path):
    """diffusers' converter takes no alphas and no underscores."""
    pipe = krea2()
    tensors, changes = own_tensors(pipe.transformer, LAYERS, key)
    if key is comfyui:
        converted = Krea2LoraLoaderMixin.lora_state_dict(dict(tensors))
        assert {name.removeprefix("transformer.").partition(".lora_")[0] for name in converted} == set(changes)
    save_file(tensors, tmp_path / "own.safetensors")
    report = OmniControl(pipe).load(tmp_path / "own.safetensors")
    assert not report.unused and report.used == len(tensors) and set(report.matched) == set(changes)
    for name, pair in adapter_pairs(pipe.transformer, "own").items():
        torch.testing.assert_close(pair.up @ pair.down, changes[name])


def test_a_lora_that_reads_its_condition_by_channels_is_refused(tmp_path):
    pipe = krea2()
    tensors, _ = own_tensors(
        pipe.transformer, {"first": ("img_in",), "blocks.0.attn.wq": LAYERS["blocks.1.attn.wq"]}, comfyui
    )
    tensors["diffusion_model.first.lora_A.weight"] = torch.ones(2, 32)
    save_file(tensors, tmp_path / "depth.safetensors")
    with pytest.raises(ValueError, match=r"as further channels .* \(its img_in reads 32 channels, the model's 16\)"):
        OmniControl(pipe).load(tmp_path / "depth.safetensors")


@pytest.mark.parametrize("name", ["blocks.0.attn.wq", "transformer_blocks.0.ff.gate", "text_fusion.projector"])
def test_layers_tell_the_family(name):
    assert family_of([name]) == "Krea 2"
