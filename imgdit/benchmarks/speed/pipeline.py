"""A guided image against diffusers' own pipeline on the same weights, and what diffusers' step caches do to both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from imgdit import DiffusionPipeline
from imgdit.benchmarks.metrics import psnr, ssim
from imgdit.benchmarks.scenes.text_to_image import held_out
from imgdit.benchmarks.speed.timing import Comparison, compare
from imgdit.models.functional import pack, unpack
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.schedulers.flow_match import linear_sigmas

# As long as each other: diffusers' FLUX pipeline takes no mask.
PROMPT, NEGATIVE_PROMPT = "a red cube left of a blue sphere, photo", "a blue sphere left of a red cube, photo"


def load(model: Path) -> ImgDiTPipeline:
    """A text-to-image pipeline that prints nothing and whose steps draw no noise: diffusers' own pipelines hand theirs
    no generator, and a step cache counts on steps that are like each other."""
    pipe = ImgDiTPipeline(**DiffusionPipeline.from_pretrained(model).components)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.register_to_config(stochastic_sampling=False)
    return pipe


def image_comparison(pipe: ImgDiTPipeline, *, steps: int = 28, guidance: float = 3.0, rounds: int = 5) -> Comparison:
    """Prompt to pixels: ours, against `FluxPipeline` with `true_cfg_scale` over `to_diffusers()`.

    diffusers' pipeline runs the transformer once for each half of guidance. Encoding the text and decoding the latents
    are ours on both sides, as FLUX's encoders are others; both start from the same noise.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = FluxPipeline(scheduler, None, None, None, None, None, pipe.transformer.to_diffusers())
    other.set_progress_bar_config(disable=True)
    size = pipe.default_size
    cells = size // pipe.vae_scale_factor
    channels = pipe.vae.config.latent_channels
    noise = torch.randn(1, channels, cells, cells, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"num_inference_steps": steps, "height": size, "width": size}

    def ours() -> torch.Tensor:
        options: dict[str, Any] = {"guidance_scale": guidance, "latents": noise, "output_type": "pt"}
        return pipe(PROMPT, NEGATIVE_PROMPT, return_dict=False, **options, **call)[0]

    def theirs() -> torch.Tensor:
        embeds, negative, pooled, negative_pooled, *_ = pipe.encode_prompt(PROMPT, NEGATIVE_PROMPT)
        tokens = other(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative,
            negative_pooled_prompt_embeds=negative_pooled,
            true_cfg_scale=guidance,
            latents=pack(noise, pipe.patch_size),
            sigmas=linear_sigmas(steps),
            output_type="latent",
            **{**call, "height": cells * other.vae_scale_factor, "width": cells * other.vae_scale_factor},
        ).images
        grid = (cells // pipe.patch_size, cells // pipe.patch_size)
        return pipe.decode_latents(unpack(tokens, pipe.patch_size, grid), "pt")

    work = f"guided text to image, {steps} steps"
    return compare(work, "FluxPipeline, the same weights", ours, theirs, rounds=rounds)


class CacheRow(NamedTuple):
    """What a step cache does to images."""

    cache: str
    ratio: float
    """Time over that without it: median of the pairs, process time."""
    low: float
    high: float
    psnr: float
    """In dB, of its images against those without it: mean over the images."""
    ssim: float


def cache_table(
    pipe: ImgDiTPipeline, *, count: int = 8, steps: int = 28, guidance: float = 3.0, rounds: int = 3
) -> Iterator[CacheRow]:
    """diffusers' step caches on held-out scenes, against the same images without a cache."""
    prompts = held_out(count).prompts
    transformer: Any = pipe.transformer
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}

    def make(config: Any = None) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        if config is not None:
            transformer.enable_cache(config)
        try:
            return pipe(prompts, generator=generators, return_dict=False, **call)[0]
        finally:
            if config is not None:
                transformer.disable_cache()

    plain = make()
    for name, config in _configs(pipe, _magnitude_ratios(pipe, make), steps):
        images = make(config)
        row = compare(name, "no cache", partial(make, config), make, rounds=rounds)
        change = statistics.mean(psnr(images, plain).tolist())
        yield CacheRow(name, row.ratio, row.low, row.high, change, statistics.mean(ssim(images, plain).tolist()))


def _configs(pipe: ImgDiTPipeline, ratios: list[float], steps: int) -> Iterator[tuple[str, Any]]:
    for threshold in (0.05, 0.1, 0.2):
        yield f"FirstBlockCache, threshold {threshold}", FirstBlockCacheConfig(threshold)
    for interval in (2, 4):
        yield (
            f"TaylorSeer, every {interval} steps, order 1",
            TaylorSeerCacheConfig(cache_interval=interval, taylor_factors_dtype=torch.float32),
        )
    for threshold in (0.06, 0.24):
        config = MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios)
        yield f"MagCache, threshold {threshold}", config
    for skip in (2, 3):
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skip,
            spatial_attention_timestep_skip_range=(100, 900),
            current_timestep_callback=lambda: pipe.current_timestep,
            spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
        )
        yield f"PyramidAttentionBroadcast, range {skip}", config


def _magnitude_ratios(pipe: ImgDiTPipeline, make: Callable[[], Any]) -> list[float]:
    """MagCache's ratios of this model: how much longer what the blocks add to each token is than a step before.

    diffusers' own calibration prints them only.
    """
    ends = (pipe.transformer.transformer_blocks[0], [*pipe.transformer.single_transformer_blocks][-1])
    entered: list[torch.Tensor] = []
    lengths: list[torch.Tensor] = []
    hooks = [
        ends[0].register_forward_pre_hook(lambda module, args: entered.append(args[0])),
        ends[1].register_forward_hook(
            lambda module, args, out: lengths.append(torch.linalg.norm((out[0] - entered.pop()).float(), dim=-1))
        ),
    ]
    try:
        make()
    finally:
        for hook in hooks:
            hook.remove()
    return [1.0, *((b / (a + 1e-8)).mean().item() for a, b in pairwise(lengths))]
