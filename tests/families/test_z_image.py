"""Z-Image beside conditions: its pipelines, its order of tokens and of guidance, what is refused, LoRA names."""

import pytest
import torch
from diffusers import (
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
)
from diffusers.loaders import ZImageLoraLoaderMixin
from repository_names import comfyui, kohya, own_tensors, scaled
from safetensors.torch import save_file
from tiny import randomize
from tiny_control import image, quiet
from tiny_families import loaded, make, near, passes
from tiny_z_image import CASES, folder, z_image

from imgdit import Condition, OmniControl
from imgdit.families.z_image import FAMILY
from imgdit.images.latents import encode_images
from imgdit.lora.dialects import family_of
from imgdit.lora.files import adapter_pairs
from imgdit.sae.hooks import hooked
from imgdit.training.user_images.encoder import Encoder

CASE = CASES["Z-Image"]


def test_tokens_are_the_models_patches():
    pipe = z_image()
    latents = encode_images(pipe.vae, image()[None] * 2 - 1)
    patches, _, _ = pipe.transformer._patchify_image(latents[0][:, None], 2, 1)
    tokens = FAMILY.tokens.encode(pipe.transformer, pipe.vae, image()[None] * 2 - 1, None)
    assert torch.equal(tokens[0], patches)


@pytest.mark.parametrize("kind", [ZImageImg2ImgPipeline, ZImageInpaintPipeline])
def test_conditions_in_pipelines_that_begin_with_an_image(kind, tmp_path):
    control = loaded(CASE, kind.from_pipe(z_image()), tmp_path)
    mask = {"mask_image": torch.ones(1, 1, 16, 16)} if kind is ZImageInpaintPipeline else {}
    call = {"image": image(5)[None], "strength": 0.6, **mask}
    found, riding = passes(CASE, control, [Condition(image(), "canny", start=0.5)], call=call)
    assert len(found) == 2
    near(found[0][1], CASE.dense(control.transformer, found[0][0]))
    near(found[1][1], CASE.dense(control.transformer, found[1][0], riding))


def test_a_controlnet_acts_beside_conditions(tmp_path):
    """It shares modules with the transformer, which are the model's own in its call."""
    plain = z_image()
    config = {"dim": 32, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2}
    side = ZImageControlNetModel([0], control_in_dim=4, **config)
    pipe = quiet(ZImageControlNetPipeline(**plain.components, controlnet=randomize(side, std=0.1).eval()))
    control = loaded(CASE, pipe, tmp_path)
    call = {"control_image": image(5)[None], "steps": 1, "controlnet_conditioning_scale": 1.0}
    found, riding = passes(CASE, control, [Condition(image(), "canny")], call=call)
    ((given, out),) = found
    assert given["controlnet_block_samples"][0].any()
    near(out, CASE.dense(control.transformer, given, riding))
    plain, _ = passes(CASE, control, call=call)
    near(plain[0][0]["controlnet_block_samples"][0], given["controlnet_block_samples"][0])


def test_turbo_runs_without_guidance(tmp_path):
    control = loaded(CASE, z_image(), tmp_path)
    found, riding = passes(CASE, control, [Condition(image(), "canny")], call={"guidance_scale": 0.0, "steps": 1})
    ((given, out),) = found
    assert len(given["x"]) == 1
    near(out, CASE.dense(control.transformer, given, riding))


def test_gradients_stay_after_a_second_backward_pass(tmp_path):
    """Blocks are run again in each, in reverse order."""
    control = loaded(CASE, z_image(), tmp_path)
    given = passes(CASE, control, call={"steps": 1})[0][0][0]
    weights = [p.requires_grad_() for name, p in control.transformer.named_parameters() if "lora_" in name]
    control.transformer.enable_gradient_checkpointing()
    control.transformer.train()
    with control.use([Condition(image(), "canny")]):
        loss = torch.stack(control.transformer(**given)[0]).square().sum()
        first, second = (torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for _ in range(2))
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_refused(tmp_path):
    pipe = z_image()
    omni = ZImageOmniPipeline(**pipe.components, siglip=None, siglip_processor=None)
    with pytest.raises(ValueError, match=r"ZImageOmniPipeline, which cannot have conditions: .* several images"):
        OmniControl(omni)
    control = loaded(CASE, pipe, tmp_path)
    given = passes(CASE, control, call={"steps": 1})[0][0][0]
    with control.use([Condition(image(), "canny")]):
        with pytest.raises(ValueError, match="each sample of this call is several images"):
            control.transformer(**given | {"x": [[one] for one in given["x"]]})
        with pytest.raises(ValueError, match=r"of one size, got \(4, 1, 4, 8\), \(4, 1, 8, 8\)"):
            control.transformer(**given | {"x": [given["x"][0], given["x"][1][..., :4, :]]})


def test_activations_tell_the_prompt_from_the_negative_one():
    pipe, seen = z_image(), {}
    names = [
        f"transformer.{name}" for name in ("noise_refiner.0", "context_refiner.1", "layers.1", "layers.1.attention")
    ]
    with hooked(pipe, {name: lambda tokens, name=name: seen.setdefault(name, tokens) and None for name in names}):
        make(CASE, pipe, steps=2)
    assert [tuple(seen[name].values.shape[1:]) for name in names] == [(16, 32), (64, 32), (16, 32), (16, 32)]
    call = seen[names[0]].call
    assert (call.conditional, call.unconditional) == (slice(0, 1), slice(1, 2))
    assert call.timestep == pytest.approx(1000.0)


def test_captions_and_images_are_encoded_for_training(tmp_path):
    encoder = Encoder(str(folder(tmp_path)))
    embeddings, pooled, _ = encoder.text("w1 w2")
    assert embeddings.shape[1] == 24 and len(embeddings) < 64 and pooled.shape == (0,)
    assert encoder.latents(image()).shape == (4, 8, 8)


# LoRA names

PARTS = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "feed_forward.w2": ("feed_forward.w2",),
    "adaLN_modulation.0": ("adaLN_modulation.0",),
}
LAYERS = {
    **{
        f"{block}.{own}": tuple(f"{block}.{part}" for part in parts)
        for block in ("layers.1", "noise_refiner.0", "context_refiner.1")
        for own, parts in PARTS.items()
        if (block, own) != ("context_refiner.1", "adaLN_modulation.0")
    },
    "x_embedder": ("all_x_embedder.2-1",),
    "cap_embedder.1": ("cap_embedder.1",),
    "t_embedder.mlp.2": ("t_embedder.mlp.2",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
}


@pytest.mark.parametrize("key", [comfyui, scaled, kohya])
def test_files_by_the_repositorys_names_are_read_whole(key, tmp_path):
    pipe = z_image()
    tensors, changes = own_tensors(pipe.transformer, LAYERS, key)
    save_file(tensors, tmp_path / "own.safetensors")
    report = OmniControl(pipe).load(tmp_path / "own.safetensors")
    assert not report.unused and report.used == len(tensors) and set(report.matched) == set(changes)
    for name, pair in adapter_pairs(pipe.transformer, "own").items():
        torch.testing.assert_close(pair.up @ pair.down, changes[name])


def test_files_that_diffusers_reads_are_read_alike(tmp_path):
    """It leaves the fused projection of the repository as it is."""
    pipe = z_image()
    layers = {name: parts for name, parts in LAYERS.items() if len(parts) == 1 and "embedder" not in name}
    layers = {name: parts for name, parts in layers.items() if "final" not in name}
    tensors, changes = own_tensors(pipe.transformer, layers, kohya)
    expected = ZImageLoraLoaderMixin.lora_state_dict(dict(tensors))
    assert {name.removeprefix("transformer.").partition(".lora_")[0] for name in expected} == set(changes)
    for name, change in changes.items():
        up, down = (expected[f"transformer.{name}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(up @ down, change)


def test_layers_tell_the_family():
    assert family_of(["noise_refiner.0.attention.to_q"]) == "Z-Image"
    assert family_of(["layers.0.attention.to_q"]) == "Z-Image or Ideogram 4"  # whose layers are called so too
