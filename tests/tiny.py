"""Tiny real models, built the same way for every test."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from imgdit import ImgDiTPipeline, MMDiT, MultiFrameFlowMatchScheduler

WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "cube",
    "sphere",
    "cone",
    "left",
    "right",
    "of",
    "on",
    "photo",
    "sketch",
    "small",
    "large",
]


def randomize(model: torch.nn.Module, seed: int = 1, std: float = 0.05) -> torch.nn.Module:
    """Add noise to every parameter, so that no gate is zero and no gain one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def rope_config(**changes) -> dict:
    """A tiny FLUX-like configuration."""
    return {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "sample_size": 8,
        **changes,
    }


def sincos_config(**changes) -> dict:
    """A tiny SD3-like configuration."""
    return {
        **rope_config(),
        "patch_size": 2,
        "in_channels": 4,
        "num_single_layers": 0,
        "pos_embed_type": "sincos",
        "sample_size": 8,
        "pos_embed_max_size": 12,
        "timestep_scale": 1.0,
        **changes,
    }


def tiny_mmdit(config: dict | None = None, seed: int = 0) -> MMDiT:
    torch.manual_seed(seed)
    return randomize(MMDiT(**(config or rope_config()))).eval()


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        shift_factor=0.1,
        scaling_factor=0.5,
    ).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def tiny_text_encoder(seed: int = 0) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(WORDS) + 3, d_model=32, d_kv=8, d_ff=37, num_heads=4, num_layers=1, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def tiny_pipeline(config: dict | None = None, **scheduler) -> ImgDiTPipeline:
    pipe = ImgDiTPipeline(
        scheduler=MultiFrameFlowMatchScheduler(**scheduler),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        transformer=tiny_mmdit(config),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
