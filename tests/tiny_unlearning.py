"""A tiny pipeline with labels to unlearn, and what methods learn about them."""

import dataclasses

import torch

from imgdit.benchmarks.unlearning.methods.material import Material, collect
from imgdit.sae.config import SAEConfig
from imgdit.sae.model import SparseAutoencoder

HOOKPOINT = "transformer.single_transformer_blocks.0"
TEXT = "transformer.context_embedder"
CALL = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 24}
KINDS = {"style": ("photo", "sketch", "small"), "object": ("cube", "sphere", "cone")}
COLOURS = ("red", "green", "blue")


def tiny_sae(hookpoint=HOOKPOINT):
    config = SAEConfig(32, 64, k=8, hookpoint=hookpoint)
    return SparseAutoencoder(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)


def tiny_material(pipe, **changes):
    """With statistics."""
    prompts = {
        "style": {label: [f"a {colour} cube on the left {label}" for colour in COLOURS] for label in KINDS["style"]},
        "object": {
            label: [f"a {colour} {label} on the left photo" for colour in COLOURS] for label in KINDS["object"]
        },
    }
    words = {label: label for labels in KINDS.values() for label in labels}
    material = Material(
        prompts, words, {place: tiny_sae(place) for place in (HOOKPOINT, TEXT)}, CALL, batch_size=2, **changes
    )
    return dataclasses.replace(material, statistics=collect(pipe, material))


def images(pipe, **call):
    """Latents of two captions of unequal length."""
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    options = {"generator": generators, "output_type": "latent", **CALL, **call}
    return pipe(["a red cube photo", "a blue sphere sketch on the left"], **options).images
