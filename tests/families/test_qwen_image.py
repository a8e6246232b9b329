"""Qwen-Image beside what all families have: its pipelines, several images in a call, layers, LoRA names."""

from dataclasses import replace

import pytest
import tiny_qwen_image
import torch
from diffusers import (
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
)
from safetensors.torch import load_file, save_file
from tiny import randomize
from tiny_control import image, lora_file
from tiny_families import differs, loaded, near, passes, random
from tiny_qwen_image import autoencoder, dense, qwen_image, references

from imgdit import Condition, OmniControl
from imgdit.families.qwen_image import FAMILY
from imgdit.images.latents import cell_size, decode_latents, encode_images
from imgdit.lora.files import adapter_pairs
from imgdit.training.user_images.encoder import Encoder

CASE = tiny_qwen_image.CASES["Qwen-Image"]


def controlnet(kind):
    pipe = qwen_image()
    torch.manual_seed(0)
    model = QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = kind(**pipe.components, controlnet=randomize(model).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {
    "image to image": (QwenImageImg2ImgPipeline, lambda: {"image": references(1)[0], "strength": 0.9}),
    "inpainting": (
        QwenImageInpaintPipeline,
        lambda: {"image": references(1)[0], "mask_image": references(2)[1].convert("L"), "strength": 1.0},
    ),
    "ControlNet": (QwenImageControlNetPipeline, lambda: {"control_image": references(1)[0]}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_conditions_in_its_other_pipelines(name, tmp_path):
    kind, options = PIPELINES[name]
    build = controlnet if "ControlNet" in name else qwen_image
    case = replace(CASE, pipeline=lambda: build(kind), options=options())
    control = loaded(case, case.pipeline(), tmp_path)
    found, riding = passes(case, control, [Condition(image(), "canny")], mode="independent", call={"steps": 3})
    assert len(found) >= 4
    for given, out in found:
        near(out, dense(control.transformer, given, riding))
        differs(out, dense(control.transformer, given))
    assert ("controlnet_block_samples" in found[0][0]) == ("ControlNet" in name)


def call(shapes, **further):
    lengths = [frames * rows * columns for frames, rows, columns in shapes]
    return {
        "hidden_states": random(1, sum(lengths), 16),
        "encoder_hidden_states": random(1, 6, 24, seed=4),
        "timestep": torch.tensor([0.6]),
        "img_shapes": [shapes],
        "return_dict": False,
        **further,
    }


SEVERAL = [Condition(image(), "canny"), Condition(image(size=8), "depth", scale=2.0)]
CALLS = {
    "editing, 2509": ({}, call([(1, 4, 4), (1, 6, 2), (1, 3, 5)])),
    "editing, 2511": ({"zero_cond_t": True}, call([(1, 4, 4), (1, 6, 2), (1, 3, 5)])),
    "layers": (
        {"use_layer3d_rope": True, "use_additional_t_cond": True},
        call([(1, 4, 4)] * 3 + [(1, 4, 4)], additional_t_cond=torch.tensor([0])),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_several_images_in_a_call(name, tmp_path):
    changes, given = CALLS[name]
    control = loaded(CASE, qwen_image(**changes), tmp_path)
    model = control.transformer
    near(dense(model, given), model(**given)[0])
    for mode in ("joint", "independent"):
        with control.use(SEVERAL, mode=mode):
            for _ in range(2):
                near(model(**given)[0], dense(model, given, control.run.conditions))
    grids = [grid for _, grid in FAMILY.places(model, given)]
    assert grids == [(4, 4)] * (3 if name == "layers" else 1)


@pytest.mark.parametrize("level", ["image", "clean"])
@torch.no_grad()
def test_the_models_own_references_are_conditions(level, tmp_path):
    """A context image, and one of Qwen-Image-Edit 2511, with a LoRA that acts on all tokens; each with a strength."""
    control = loaded(replace(CASE, targets=CASE.style), qwen_image(zero_cond_t=level == "clean"), tmp_path)
    model, alone, photo = control.transformer, call([(1, 4, 4)]), image(2)
    tokens = FAMILY.tokens.encode(model, control.pipe.vae, photo[None] * 2 - 1, None)
    joined = call([(1, 4, 4), (1, 4, 4)]) | {"hidden_states": torch.cat([alone["hidden_states"], tokens], dim=1)}
    model.set_adapters(["canny"])
    stock = model(**joined)[0][:, :16]
    with control.references(strength=0.4):
        weak = model(**joined)[0][:, :16]
    differs(weak, stock)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter([])
    for strength, expected in ((1.0, stock), (0.4, weak)):
        reference = Condition(
            photo, "canny", position="centred", index=1, level=level, acts_on="all", strength=strength
        )
        with control.use(reference):
            near(model(**alone)[0], expected)


@torch.no_grad()
def test_references_that_are_left_out(tmp_path):
    control = loaded(CASE, qwen_image(zero_cond_t=True), tmp_path)
    model, joined = control.transformer, call([(1, 4, 4), (1, 4, 4), (1, 2, 3)])
    alone = joined | {"hidden_states": joined["hidden_states"][:, :16], "img_shapes": [[(1, 4, 4)]]}
    expected = model(**alone)[0]
    with control.references(strength=0.0):
        near(model(**joined)[0][:, :16], expected)


def test_autoencoders_of_films(tmp_path):
    vae, pixels = autoencoder(), image()[None] * 2 - 1
    pipe = qwen_image(tiny_qwen_image.EditPlus)
    latents = pipe._encode_vae_image(pixels[:, :, None], None)
    expected = pipe._pack_latents(latents, 1, 4, 8, 8)
    near(FAMILY.tokens.encode(pipe.transformer, vae, pixels, None), expected, 1e-6)
    assert cell_size(vae) == 2
    decoded = vae.decode(
        latents * torch.tensor(vae.config.latents_std).view(1, 4, 1, 1, 1)
        + torch.tensor(vae.config.latents_mean).view(1, 4, 1, 1, 1)
    ).sample[:, :, 0]
    near(decode_latents(vae, encode_images(vae, pixels)), decoded, 1e-5)
    opaque = torch.cat([pixels, torch.ones(1, 1, 16, 16)], dim=1)[:, :, None]
    vae = autoencoder(input_channels=4)
    raw = vae.encode(opaque).latent_dist.mode()[:, :, 0]
    mean, deviation = (
        torch.tensor(values).view(1, 4, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    near(encode_images(vae, pixels), (raw - mean) / deviation, 1e-6)
    assert decode_latents(vae, encode_images(vae, pixels)).shape == (1, 3, 16, 16)


def test_captions_are_encoded_for_training(tmp_path):
    """Without padding: the pipeline gives no mask where all tokens are real."""
    encoder = Encoder(str(tiny_qwen_image.folder(tmp_path)))
    embeddings, pooled, _ = encoder.text("a red cube")
    expected, mask = encoder.pipe.encode_prompt(["a red cube", "a red cube on the left of a cone"])
    length = int(mask[0].sum())
    near(embeddings, expected[0, :length])
    assert pooled.shape == (0,) and encoder.cell == 2
    assert encoder.latents(image()).shape == (4, 8, 8)


# LoRA names

DIALECTS = {
    "diffusers": lambda name, side: f"transformer.{name}.lora_{side}.weight",
    "bare": lambda name, side: f"{name}.lora_{side}.default.weight",
    "comfyui": lambda name, side: f"diffusion_model.{name}.lora_{side}.weight",
    "kohya": lambda name, side: f"lora_unet_{name.replace('.', '_')}.lora_{KOHYA[side]}.weight",
}
KOHYA = {"A": "down", "B": "up"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_lora_files_are_read_whole(dialect, tmp_path):
    """Also layers that FLUX.1's repository calls otherwise, such as `img_in`, alone."""
    for targets in (CASE.style + "|txt_in", "img_in"):
        pipe = qwen_image()
        tensors = load_file(lora_file(tmp_path / "own.safetensors", pipe.transformer, targets))
        names = {name.removeprefix("transformer.").split(".lora_")[0] for name in tensors}
        renamed = {
            DIALECTS[dialect](name, side): tensors[f"transformer.{name}.lora_{side}.weight"]
            for name in names
            for side in "AB"
        }
        save_file(renamed, tmp_path / "other.safetensors")
        report = OmniControl(pipe).load(tmp_path / "other.safetensors")
        assert not report.unused and set(report.matched) == names
        for name, pair in adapter_pairs(pipe.transformer, "other").items():
            assert torch.equal(pair.down, tensors[f"transformer.{name}.lora_A.weight"])
