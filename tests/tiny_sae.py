"""Tiny pipelines of every kind of denoiser, and autoencoders for them."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny import randomize, rope_config, tiny_pipeline, tiny_vae

from imgdit.sae.concepts import ConceptBook, ConceptSelection
from imgdit.sae.config import SAEConfig
from imgdit.sae.edits import ChosenFeatures, Edit
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner

WIDTH = 32


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(*names, batch=2, shape=(5, 32)):
    generator = torch.Generator().manual_seed(3)
    shapes = {name: (shape[1],) if "pooled" in name else shape for name in names}
    return {name: torch.randn(batch, *shapes[name], generator=generator) for name in names}


def ours(config=None):
    pipe = tiny_pipeline(config)
    inputs = {"prompt": ["a red cube", "the blue sphere left"], "height": 16, "width": 24, "guidance_scale": 3.0}
    return pipe, inputs


def small_unet(**channels):
    """A random U-Net of one level with attention; `channels` in and out if they are not 4."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        **channels,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def unet():
    model = small_unet()
    pipe = StableDiffusionPipeline(None, None, None, model, DDIMScheduler(), None, None, None, False)
    return pipe, {**embeds("prompt_embeds", "negative_prompt_embeds"), "height": 64, "width": 96}


def pixart():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
        use_additional_conditions=False,
    )
    pipe = PixArtAlphaPipeline(None, None, tiny_vae(), randomize(model), DDIMScheduler())
    masks = {f"{name}prompt_attention_mask": torch.ones(2, 5, dtype=torch.long) for name in ("", "negative_")}
    options = {"height": 16, "width": 24, "use_resolution_binning": False, "negative_prompt": None, "prompt": None}
    return pipe, {**embeds("prompt_embeds", "negative_prompt_embeds"), **masks, **options, "guidance_scale": 3.0}


def dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2)
    pipe = DiTPipeline(randomize(model).eval(), vae, DDIMScheduler())
    return pipe, {"class_labels": [3, 7], "guidance_scale": 3.0, "output_type": "np"}


def sd3():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(randomize(model), FlowMatchEulerDiscreteScheduler(), tiny_vae(), *(None,) * 6)
    names = [f"{sign}{kind}prompt_embeds" for sign in ("", "negative_") for kind in ("", "pooled_")]
    return pipe, {**embeds(*names), "height": 16, "width": 24, "guidance_scale": 3.0}


def flux():
    names = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
    names += ("joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")
    torch.manual_seed(0)
    model = randomize(FluxTransformer2DModel(**{name: rope_config()[name] for name in names}))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), None, None, None, None, model)
    return pipe, {**embeds("prompt_embeds", "pooled_prompt_embeds"), "height": 16, "width": 24}


def flux_guided():
    pipe, inputs = flux()
    negative = embeds("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    return pipe, {**inputs, **negative, "true_cfg_scale": 3.0}


def flux2():
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    pipe = Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, randomize(model))
    return pipe, {**embeds("prompt_embeds"), "height": 64, "width": 96}


def sana():
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    pipe = SanaPipeline(None, None, None, randomize(model), FlowMatchEulerDiscreteScheduler())
    masks = {f"{name}prompt_attention_mask": torch.ones(2, 5) for name in ("", "negative_")}
    options = {"height": 128, "width": 192, "use_resolution_binning": False, "negative_prompt": None}
    return pipe, {**embeds("prompt_embeds", "negative_prompt_embeds"), **masks, **options, "guidance_scale": 3.0}


def hunyuan():
    torch.manual_seed(0)
    model = HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, num_attention_heads=2, attention_head_dim=16, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=4, hidden_size=32, text_len=5,
        text_len_t5=5,
    )  # fmt: skip
    pipe = HunyuanDiTPipeline(
        None, None, None, randomize(model), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    kinds = [f"{name}{{}}{number}" for name in ("", "negative_") for number in ("", "_2")]
    masks = {kind.format("prompt_attention_mask"): torch.ones(2, 5) for kind in kinds}
    options = {"height": 64, "width": 96, "use_resolution_binning": False, "guidance_scale": 3.0}
    return pipe, {**embeds(*(kind.format("prompt_embeds") for kind in kinds)), **masks, **options}


def run(pipe, inputs, steps=3):
    options = {"output_type": "latent", **inputs}
    with torch.no_grad():
        images = quiet(pipe)(**options, num_inference_steps=steps, generator=torch.Generator().manual_seed(4)).images
    return torch.as_tensor(images)


def tiny_sae(hookpoint="transformer.transformer_blocks.1", **changes):
    config = SAEConfig(WIDTH, 64, k=4, hookpoint=hookpoint, **changes)
    sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    return sae


def selection(name, features, factor_means, timesteps=(1000.0, 500.0, 0.0), threshold=0.0):
    steps, count = len(timesteps), len(features)
    return ConceptSelection(
        name=name,
        timesteps=timesteps,
        features=torch.tensor(features),
        selected=torch.ones(steps, count, dtype=torch.bool),
        means=torch.tensor([factor_means] * steps, dtype=torch.float32).view(steps, count),
        thresholds=torch.full((steps, count), threshold),
        replacement=torch.ones(steps, WIDTH),
        mean=torch.zeros(steps, WIDTH),
        others=("another",),
    )


def unlearner_of(pipe, hookpoint, selections, sae=None):
    sae = sae or tiny_sae(hookpoint)
    book = ConceptBook.empty(sae.fingerprint(), getattr(pipe, hookpoint.partition(".")[0])).with_selections(selections)
    return ConceptUnlearner({hookpoint: sae}, {hookpoint: book})


def all_features(name="everything", factor=-3.0):
    return selection(name, list(range(64)), [factor] * 64)


def edit(sae: SparseAutoencoder, x: torch.Tensor, change: Edit) -> torch.Tensor:
    """Activations x (N, d) with chosen features changed; the rest, the reconstruction error too, stays."""
    chosen = ChosenFeatures(sae, change.features, change.thresholds)
    rows, scale = sae.normalize(x.to(sae.W_dec.dtype))
    acts = chosen.activations(rows, chosen.scores(rows))
    return chosen.added(x, acts, change.factors, scale)
