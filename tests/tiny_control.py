"""Tiny diffusers pipelines with LoRA files to put on them."""

import json
import re

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import save_file
from tiny import randomize, rope_config, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Qwen3Config, Qwen3ForCausalLM

from imgdit.benchmarks.speed.conditions import TARGETS
from imgdit.lora.dialects import LoraPair
from imgdit.lora.files import AdapterInfo, write_adapter
from imgdit.pipelines.few_steps import TURBO

SIZE = 16
"""Pixels per side: 4x4 tokens of 4 pixels."""


def flux(**changes) -> FluxPipeline:
    torch.manual_seed(0)
    names = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
    names += ("joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")
    config = {name: rope_config()[name] for name in names} | changes
    transformer = randomize(FluxTransformer2DModel(**config)).eval()
    return quiet(FluxPipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), None, None, None, None, transformer))


def sd3(dual=(0,)) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=dual,
    )
    transformer = randomize(transformer).eval()
    return quiet(
        StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(), *(None,) * 6)
    )


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_texts(pipe):
    """The pipeline with tiny text encoders, so that its folder generates images from captions."""
    if isinstance(pipe, Flux2KleinPipeline):
        pipe.register_modules(text_encoder=_qwen3(), tokenizer=_chat_tokenizer())
        return pipe
    words = {"tokenizer": tiny_tokenizer(), "text_encoder_2": tiny_text_encoder(), "tokenizer_2": tiny_tokenizer()}
    if isinstance(pipe, FluxPipeline):
        words["text_encoder"] = _clip(32, CLIPTextModel)
    else:
        words |= {"text_encoder_3": words["text_encoder_2"], "tokenizer_3": words["tokenizer_2"]}
        words |= {name: _clip(16, CLIPTextModelWithProjection) for name in ("text_encoder", "text_encoder_2")}
    pipe.register_modules(**words)
    return pipe


def folder_of(pipe, path):
    """The folder of a pipeline with tiny text encoders, as diffusers writes it."""
    with_texts(pipe).save_pretrained(path)
    return str(path)


def _qwen3():
    """Of whose hidden states FLUX.2 klein reads the 9th, 18th and 27th."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, bos_token_id=0, eos_token_id=1, max_position_embeddings=512,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def _chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


def _clip(width, kind):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    return kind(CLIPTextConfig(vocab_size=32, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, **sizes))


def text(pipe, seed=3) -> dict:
    """Embeddings of one prompt, and what a call needs besides."""
    generator = torch.Generator().manual_seed(seed)
    names = [""] if isinstance(pipe, FluxPipeline) or "Flux" in type(pipe).__name__ else ["", "negative_"]
    embeds = {}
    for name in names:
        embeds[f"{name}prompt_embeds"] = torch.randn(1, 5, 32, generator=generator)
        embeds[f"{name}pooled_prompt_embeds"] = torch.randn(1, 32, generator=generator)
    return embeds | {"height": SIZE, "width": SIZE, "num_inference_steps": 3, "output_type": "latent"}


def make(pipe, seed=5, **changes) -> torch.Tensor:
    """Latents of a call."""
    arguments = text(pipe) | changes
    return pipe(**arguments, generator=torch.Generator().manual_seed(seed), return_dict=False)[0]


def image(seed=0, size=SIZE) -> torch.Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))


def lora_file(path, transformer, targets=TARGETS, rank=2, seed=0, info=None, std=0.3):
    """A random LoRA file for the modules that match a pattern."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in transformer.named_modules():
        module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if re.fullmatch(targets, name) and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            out, *inner = module.weight.shape
            down = torch.randn(rank, *inner, generator=generator) * std
            up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator) * std
            pairs[name] = LoraPair(down, up)
    return write_adapter(path, pairs, info or AdapterInfo(task="test"))


SD3_TARGETS = r"pos_embed\.proj|transformer_blocks\.\d+\.(norm1\.linear|attn2?\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
STYLE_TARGETS = r"x_embedder|.*attn\.(to_q|add_k_proj)|.*ff\.net\.0\.proj|.*proj_mlp"

ONE_LAYER = "transformer.transformer_blocks.0.attn.to_q"


def one_layer(path, out=32, columns=32, name=ONE_LAYER, seed=0, **metadata):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(2, columns, generator=generator)
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": torch.randn(out, 2, generator=generator)}
    save_file(tensors, path, metadata=metadata or None)
    return path


def strangers(folder):
    """What lies beside adapters in people's folders."""
    folder.mkdir(exist_ok=True)
    good = one_layer(folder / "edges-v1.1.safetensors", imgdit=json.dumps({"task": "canny"}))
    data = good.read_bytes()
    (folder / "._edges-v1.1.safetensors").write_bytes(b"\0\5\x16\7" + bytes(100))
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "notes.txt").write_text("edges: strength 0.8")
    (folder / "half.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "x.safetensors.incomplete").write_bytes(data[:50])
    (folder / "old.ckpt").write_bytes(b"x")
    (folder / "empty.safetensors").write_bytes(b"")
    save_file({"lora_te1_layers_0_fc1.lora_down.weight": torch.ones(2, 4)}, folder / "words.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 4)}, folder / "model.safetensors")
    save_file({"lycoris_x_embedder.lokr_w1": torch.ones(2, 4)}, folder / "lokr.safetensors")
    (folder / "style").mkdir()
    one_layer(folder / "style" / "adapter_model.safetensors")
    (folder / "samples").mkdir()
    return folder


def few_step_folder(folder):
    """The tiny embedded pipeline with an adapter for canny edges and a few-step LoRA."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder)
    attention = r".*attn\.to_[qkv]"
    info = AdapterInfo(task="canny", position="aligned", mode="independent")
    lora_file(folder / "adapters/canny.safetensors", pipe.transformer, attention, info=info)
    lora_file(folder / TURBO, pipe.transformer, attention, seed=1, info=AdapterInfo(num_inference_steps=4))
    return folder
