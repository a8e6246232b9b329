"""A tiny pipeline with labels to unlearn, and what methods learn about them."""

import dataclasses

import torch
from tiny import tiny_pipeline
from transformers import T5Config, T5EncoderModel

from imgdit.benchmarks.unlearning.methods.material import Material, collect
from imgdit.sae.config import SAEConfig
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.readings import QUESTIONS
from imgdit.scenes.tokenizer import caption_tokenizer

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


def benchmark_folders(folder):
    """A pipeline that reads captions, a probe and autoencoders, as options of a command."""
    torch.manual_seed(0)
    pipe, tokenizer = tiny_pipeline(), caption_tokenizer()
    size = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_heads": 4, "num_layers": 1, "dropout_rate": 0.0}
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **size)).eval()
    pipe.register_modules(tokenizer=tokenizer, text_encoder=text_encoder)
    pipe.save_pretrained(folder / "pipeline")
    questions = [(name, list(choices)) for name, choices in QUESTIONS.items()]
    SceneProbe(questions, channels=(8, 8, 16, 16), size=32).save_pretrained(folder / "probe")
    saes = {
        hookpoint: SparseAutoencoder(SAEConfig(32, 64, k=8), generator=torch.Generator().manual_seed(seed))
        for seed, hookpoint in enumerate((HOOKPOINT, TEXT))
    }
    ConceptUnlearner(saes).save_pretrained(folder / "saes")
    return ["--model", folder / "pipeline", "--probe", folder / "probe", "--saes", folder / "saes"]
