"""A tiny pipeline folder of a model without a text head, with text frames beside its parts."""

from pathlib import Path

import torch
from peft import LoraConfig
from tiny import rope_config, tiny_pipeline, tiny_tokenizer

from imgdit import OneDiffusionPipeline
from imgdit.models.text_head import add_text_head
from imgdit.pipelines.text_frames import FOLDER, QuestionForms, save_text_frames

LENGTH = 12
"""Tokens of a text."""


def pipeline() -> OneDiffusionPipeline:
    pipe = OneDiffusionPipeline(**tiny_pipeline(rope_config(joint_attention_dim=32)).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_model(place: Path, questions: QuestionForms | None = None) -> Path:
    pipe = pipeline()
    pipe.save_pretrained(place)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.model_max_length = LENGTH
    model = pipe.transformer
    add_text_head(model, len(tokenizer), rope_axis=2, embeds=True, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.text_proj_out.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    targets = r"context_embedder|.*single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "reads")
    save_text_frames(model, "reads", tokenizer, place / FOLDER, questions=questions)
    return place
