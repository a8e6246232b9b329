"""Our transformer in diffusers' own pipelines: given embeddings, the same latents after 8 steps."""

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import randomize, rope_config, tiny_vae

from imgdit import MMDiT, MultiFrameFlowMatchScheduler


def flux(guidance_embeds):
    names = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
    names += ("joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")
    config = {name: rope_config()[name] for name in names}
    torch.manual_seed(0)
    transformer = randomize(FluxTransformer2DModel(**config, guidance_embeds=guidance_embeds)).eval()
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), tiny_vae(), None, None, None, None, transformer
    )
    inputs = {"prompt_embeds": torch.randn(2, 5, 32), "pooled_prompt_embeds": torch.randn(2, 32)}
    return pipe, inputs, {"height": 16, "width": 24, "guidance_scale": 3.5}


def sd3(qk_norm, dual):
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 12,
        "qk_norm": qk_norm,
        "dual_attention_layers": dual,
    }
    transformer = randomize(SD3Transformer2DModel(**config)).eval()
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(), *(None,) * 6)
    inputs = {
        f"{kind}{name}": torch.randn(2, *shape)
        for kind in ("", "negative_")
        for name, shape in (("prompt_embeds", (5, 32)), ("pooled_prompt_embeds", (32,)))
    }
    return pipe, inputs, {"height": 16, "width": 24, "guidance_scale": 5.0}


@pytest.mark.parametrize(
    ("make", "arguments"),
    [(flux, (False,)), (flux, (True,)), (sd3, (None, ())), (sd3, ("rms_norm", (0, 1)))],
    ids=["flux", "flux with guidance", "sd3", "sd3.5 with dual attention"],
)
def test_same_latents_after_8_steps(make, arguments):
    pipe, inputs, options = make(*arguments)
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            **inputs,
            **options,
            num_inference_steps=8,
            output_type="latent",
            generator=torch.Generator().manual_seed(4),
        ).images

    expected = run()
    pipe.transformer = MMDiT.from_diffusers(pipe.transformer)
    pipe.scheduler = MultiFrameFlowMatchScheduler.from_config(pipe.scheduler.config)
    got = run()
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 1e-4
