"""diffusers' step caches for six steps of a tiny pipeline: configured to skip nothing, and to skip something."""

from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

STEPS = 6


def _first_block(pipe):
    return FirstBlockCacheConfig(0.0), FirstBlockCacheConfig(10.0)


def _taylor(pipe):
    return (
        TaylorSeerCacheConfig(cache_interval=100, disable_cache_before_step=100),
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=1),
    )


def _mag(pipe):
    return (
        MagCacheConfig(threshold=0.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, retention_ratio=0.99),
        MagCacheConfig(threshold=1.0, num_inference_steps=STEPS, mag_ratios=[0.9] * STEPS, retention_ratio=0.2),
    )


def _pyramid(pipe):
    def config(skip):
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skip,
            spatial_attention_timestep_skip_range=(0, 2000),
            current_timestep_callback=lambda: pipe.current_timestep,
            spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
        )

    return config(1), config(2)


STEP_CACHES = {"first block": _first_block, "mag": _mag, "taylor": _taylor, "pyramid": _pyramid}
"""Name -> function of the pipeline that returns both configurations."""
