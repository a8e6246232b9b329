"""Folders of tiny pipelines, with text encoders, of the families whose transformers are trained in their own class."""

import tiny_krea2
import tiny_qwen_image
import tiny_z_image
import torch
from diffusers import Flux2KleinPipeline, LongCatImagePipeline
from tiny import tiny_tokenizer
from tiny_control import with_texts
from tiny_flux2 import flux2
from tiny_flux_kin import chroma, longcat_image
from transformers import T5Config, T5EncoderModel


def _klein(path):
    with_texts(flux2(Flux2KleinPipeline)).save_pretrained(path)


def _chroma(path):
    pipe = chroma()
    torch.manual_seed(0)
    config = T5Config(vocab_size=19, d_model=24, d_kv=8, d_ff=16, num_heads=2, num_layers=1, dropout_rate=0.0)
    pipe.register_modules(text_encoder=T5EncoderModel(config).eval(), tokenizer=tiny_tokenizer())
    pipe.save_pretrained(path)


def _longcat_image(path):
    own = longcat_image()  # whose processor, which rewrites prompts, is not asked
    pipe = LongCatImagePipeline(
        own.scheduler, own.vae, tiny_qwen_image.text_encoder(), tiny_tokenizer(), tiny_tokenizer(), own.transformer
    )
    pipe.save_pretrained(path)


FOLDERS = {
    "FLUX.2": _klein,
    "Qwen-Image": tiny_qwen_image.folder,
    "Z-Image": tiny_z_image.folder,
    "Krea 2": tiny_krea2.folder,
    "Chroma": _chroma,
    "LongCat-Image": _longcat_image,
}
"""Family -> function that writes a folder of it."""
CALLS = {
    "FLUX.2": {"guidance_scale": 1.0},
    "Qwen-Image": {"true_cfg_scale": 1.0},
    "Z-Image": {"guidance_scale": 0.0},
    "Krea 2": {"guidance_scale": 0.0},
    "Chroma": {"guidance_scale": 1.0},
    "LongCat-Image": {"guidance_scale": 1.0, "enable_prompt_rewrite": False},
}
"""Family -> arguments of a call of its pipeline that calls the transformer once in a step."""
