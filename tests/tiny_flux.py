"""A tiny FLUX and a tiny SD3 folder in diffusers' layout, complete with text encoders, of random weights."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from tiny import tiny_text_encoder, tiny_tokenizer, tiny_vae
from tiny_control import flux, sd3
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CLIP = {"vocab_size": 19, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def flux_folder(path) -> str:
    """FLUX: embeddings of 32 features, 4 pixels per token."""
    torch.manual_seed(0)
    clip = CLIPTextModel(CLIPTextConfig(**CLIP, hidden_size=32)).eval()
    parts = (clip, tiny_tokenizer(), tiny_text_encoder(), tiny_tokenizer())
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), *parts, flux().transformer)
    pipe.save_pretrained(path)
    return str(path)


def sd3_folder(path) -> str:
    """SD3.5 with dual attention: two CLIPs of 16 features side by side."""
    torch.manual_seed(0)
    clips = [
        CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, hidden_size=16, projection_dim=16)).eval() for _ in range(2)
    ]
    parts = (clips[0], tiny_tokenizer(), clips[1], tiny_tokenizer(), tiny_text_encoder(), tiny_tokenizer())
    pipe = StableDiffusion3Pipeline(sd3().transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(), *parts)
    pipe.save_pretrained(path)
    return str(path)
