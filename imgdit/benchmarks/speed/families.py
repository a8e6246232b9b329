"""What conditions cost in each family of stock transformers, against the same model without: ratios of one run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from peft import LoraConfig

from imgdit.adapters.condition import Condition
from imgdit.adapters.omni_control import OmniControl
from imgdit.adapters.options import Mode
from imgdit.benchmarks.speed.timing import Comparison, compare
from imgdit.family import find_family
from imgdit.frames import Frame
from imgdit.kernels import prefer_onednn
from imgdit.lora.config import OMINICONTROL_TARGETS
from imgdit.lora.files import activate


class Size(NamedTuple):
    """Of the models; the image and the condition have `side` x `side` tokens each."""

    heads: int = 12
    head_dim: int = 64
    double: int = 2
    """Double-stream blocks, of families with both kinds."""
    single: int = 4
    """Single-stream blocks; of families with one kind of block, so many of that."""
    side: int = 16
    text: int = 64
    """Tokens; whole multiples of 32."""
    text_width: int = 512


LARGE = Size()
"""Width 768."""
TINY = Size(heads=2, head_dim=16, double=1, single=1, side=4, text=32, text_width=24)
"""To see that everything runs."""

LOADED, JOINT, CACHED = "LoRA loaded, no condition", "1 condition, joint", "1 condition, independent, cached"
BARS = {LOADED: 1.02, JOINT: 1.95, CACHED: 1.10}
"""What the ratio of each row must reach."""


class Case(NamedTuple):
    """A family in one of its pipelines."""

    pipeline: str
    """Class of diffusers: a pipeline, or the blocks of a modular one."""
    vae: Callable[[], Any]
    model: Callable[[Size], Any]
    inputs: Callable[[Size], dict[str, Any]]
    """Of the transformer."""


def _three_axes(size: Size) -> tuple[int, int, int]:
    """Features of a head by the axes of its rotations."""
    return size.head_dim // 4, size.head_dim * 3 // 8, size.head_dim * 3 // 8


def _heads(size: Size) -> dict[str, int]:
    return {"attention_head_dim": size.head_dim, "num_attention_heads": size.heads}


def _both_kinds(size: Size) -> dict[str, Any]:
    """Settings of classes with the blocks of FLUX.1."""
    return _heads(size) | {
        "num_layers": size.double,
        "num_single_layers": size.single,
        "joint_attention_dim": size.text_width,
        "axes_dims_rope": _three_axes(size),
    }


def _ids(size: Size, axes: int = 3) -> dict[str, torch.Tensor]:
    """Position ids of text and image."""
    return {
        "txt_ids": torch.zeros(size.text, axes),
        "img_ids": F.pad(Frame((size.side, size.side)).ids(), (0, axes - 3)),
    }


def _tokens(size: Size, channels: int = 64) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(1, size.side**2, channels),
        "encoder_hidden_states": torch.randn(1, size.text, size.text_width),
        "timestep": torch.full((1,), 0.5),
    }


def _planes_vae() -> Any:
    """A small autoencoder of two pixels a cell; it is not timed."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        norm_num_groups=2,
        shift_factor=0.0,
    ).eval()


def _film_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, dim_mult=[1, 1], num_res_blocks=1, attn_scales=[], temperal_downsample=[False]
    ).eval()


def _flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def _sd3(size: Size) -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=2 * size.side,
        num_layers=size.single,
        joint_attention_dim=size.text_width,
        caption_projection_dim=size.heads * size.head_dim,
        pooled_projection_dim=256,
        pos_embed_max_size=size.side,
        qk_norm="rms_norm",
        **_heads(size),
    )


def _flux2(size: Size) -> Any:
    changes = {"axes_dims_rope": (size.head_dim // 4,) * 4, "guidance_embeds": False}
    return diffusers.Flux2Transformer2DModel(**_both_kinds(size) | changes)


def _flux3(size: Size) -> Any:
    return diffusers.Flux3Transformer2DModel(**_both_kinds(size) | {"axes_dims_rope": (size.head_dim // 4,) * 4})


def _flux3_inputs(size: Size) -> dict[str, Any]:
    """The model's pipelines halve rows and columns."""
    ids = _ids(size, axes=4)
    return _tokens(size, channels=128) | ids | {"img_ids": ids["img_ids"] / 2}


def _qwen_image(size: Size) -> Any:
    return diffusers.QwenImageTransformer2DModel(
        num_layers=size.single,
        joint_attention_dim=size.text_width,
        axes_dims_rope=_three_axes(size),
        **_heads(size),
    )


def _z_image(size: Size) -> Any:
    return diffusers.ZImageTransformer2DModel(
        dim=size.heads * size.head_dim,
        n_layers=size.single,
        n_refiner_layers=1,
        n_heads=size.heads,
        n_kv_heads=size.heads,
        cap_feat_dim=size.text_width,
        axes_dims=list(_three_axes(size)),
    )


def _krea2(size: Size) -> Any:
    return diffusers.Krea2Transformer2DModel(
        num_layers=size.single,
        num_key_value_heads=size.heads // 2,
        intermediate_size=size.heads * size.head_dim * 8 // 3,
        text_hidden_dim=size.text_width,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=size.text_width,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=_three_axes(size),
        **_heads(size),
    )


def _chroma(size: Size) -> Any:
    return diffusers.ChromaTransformer2DModel(
        approximator_hidden_dim=256, approximator_layers=1, in_channels=64, **_both_kinds(size)
    )


def _four_channel_vae() -> Any:
    """Of four pixels a cell, with opacity."""
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        is_residual=False,
        scale_factor_spatial=4,
    ).eval()


def _qwen_image21(size: Size) -> Any:
    return diffusers.QwenImage21Transformer2DModel(
        num_layers=size.single, context_in_dim=size.text_width, axes_dims_rope=_three_axes(size), **_heads(size)
    )


def _qwen_image21_inputs(size: Size) -> dict[str, Any]:
    slots = torch.arange(size.text + size.side**2 // 4) >= size.text
    return _tokens(size) | {"img_shapes": [[(1, size.side, size.side)]], "img_mask": slots[None]}


def _ideogram4(size: Size) -> Any:
    return diffusers.Ideogram4Transformer2DModel(
        num_layers=size.single,
        intermediate_size=size.heads * size.head_dim * 8 // 3,
        llm_features_dim=size.text_width,
        mrope_section=(size.head_dim // 4, size.head_dim // 8, size.head_dim // 8),
        **_heads(size),
    )


def _ideogram4_inputs(size: Size) -> dict[str, Any]:
    ids, count = _ids(size), size.text + size.side**2
    is_image = (torch.arange(count) >= size.text)[None].long()
    return {
        "hidden_states": torch.randn(1, count, 128),
        "encoder_hidden_states": torch.randn(1, count, size.text_width),
        "timestep": torch.full((1,), 0.5),
        "position_ids": torch.cat([ids["txt_ids"], ids["img_ids"]])[None].long(),
        "segment_ids": torch.ones_like(is_image),
        "indicator": 3 - is_image,
    }


def _ernie_image(size: Size) -> Any:
    """With values in the layers that begin at zero."""
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=size.heads * size.head_dim,
        num_attention_heads=size.heads,
        num_layers=size.single,
        ffn_hidden_size=size.heads * size.head_dim * 8 // 3,
        text_in_dim=size.text_width,
        rope_axes_dim=_three_axes(size),
    )
    for layer in (model.adaLN_modulation[1], model.final_linear):
        torch.nn.init.normal_(layer.weight, std=0.02)
    return model


def _krea2_inputs(size: Size) -> dict[str, Any]:
    ids = _ids(size)
    return _tokens(size) | {
        "encoder_hidden_states": torch.randn(1, size.text, 2, size.text_width),
        "encoder_attention_mask": torch.ones(1, size.text, dtype=torch.bool),
        "position_ids": torch.cat([ids["txt_ids"], ids["img_ids"]]),
    }


CASES = {
    "FLUX.1": Case(
        "FluxPipeline",
        _planes_vae,
        lambda size: diffusers.FluxTransformer2DModel(pooled_projection_dim=256, **_both_kinds(size)),
        lambda size: _tokens(size) | _ids(size) | {"pooled_projections": torch.randn(1, 256)},
    ),
    "SD3": Case(
        "StableDiffusion3Pipeline",
        _planes_vae,
        _sd3,
        lambda size: {
            **_tokens(size),
            "hidden_states": torch.randn(1, 16, 2 * size.side, 2 * size.side),
            "pooled_projections": torch.randn(1, 256),
            "timestep": torch.full((1,), 500.0),
        },
    ),
    "FLUX.2": Case(
        "Flux2KleinPipeline", _flux2_vae, _flux2, lambda size: _tokens(size, channels=128) | _ids(size, axes=4)
    ),
    "FLUX.3": Case("Flux3AutoBlocks", _flux2_vae, _flux3, _flux3_inputs),
    "Qwen-Image": Case(
        "QwenImagePipeline",
        _film_vae,
        _qwen_image,
        lambda size: _tokens(size) | {"img_shapes": [[(1, size.side, size.side)]]},
    ),
    "Z-Image": Case(
        "ZImagePipeline",
        _planes_vae,
        _z_image,
        lambda size: {
            "x": [torch.randn(16, 1, 2 * size.side, 2 * size.side)],
            "t": torch.full((1,), 0.5),
            "cap_feats": [torch.randn(size.text, size.text_width)],
        },
    ),
    "Krea 2": Case("Krea2Pipeline", _film_vae, _krea2, _krea2_inputs),
    "Chroma": Case("ChromaPipeline", _planes_vae, _chroma, lambda size: _tokens(size) | _ids(size)),
    "LongCat-Image": Case(
        "LongCatImagePipeline",
        _planes_vae,
        lambda size: diffusers.LongCatImageTransformer2DModel(**_both_kinds(size)),
        lambda size: _tokens(size) | _ids(size),
    ),
    # The pipeline of its own class asks its processor when it is made.
    "Qwen-Image 2.1": Case("QwenImagePipeline", _four_channel_vae, _qwen_image21, _qwen_image21_inputs),
    "Ideogram 4": Case("Ideogram4Pipeline", _flux2_vae, _ideogram4, _ideogram4_inputs),
    "ERNIE-Image": Case(
        "ErnieImagePipeline",
        _flux2_vae,
        _ernie_image,
        lambda size: {
            "hidden_states": torch.randn(1, 128, size.side, size.side),
            "timestep": torch.full((1,), 500.0),
            "text_bth": torch.randn(1, size.text, size.text_width),
            "text_lens": torch.tensor([size.text]),
        },
    ),
}
"""Families whose stock transformers take conditions."""


def family_costs(names: Iterable[str] | None = None, *, rounds: int = 9, size: Size = LARGE) -> Iterator[Comparison]:
    """Steps with a loaded LoRA, with one condition in joint mode, and with one whose keys and values are cached, for
    each family, on a CPU in float32. The stock model has the same weights and runs by the same kernels.

    Args:
        names: of `CASES`; `None`: all.
        rounds: counted pairs of runs.
        size: of the models.
    """
    for name in CASES if names is None else names:
        yield from _costs(name, CASES[name], rounds, size)


def stock_pipeline(kind: Any, parts: dict[str, Any]) -> Any:
    """A pipeline of these components, without text encoders."""
    if issubclass(kind, diffusers.ModularPipelineBlocks):
        pipe = kind().init_pipeline()
        pipe.update_components(**parts)
        return pipe
    needed = [one.name for one in inspect.signature(kind).parameters.values() if one.default is one.empty]
    return kind(**dict.fromkeys(needed) | parts)


def add_adapter(model: Any, rank: int = 4) -> None:
    """Give a transformer a LoRA of random weights named "adapter" on its family's layers, which is not active yet."""
    family = find_family(model)
    assert family is not None
    targets = (family.lora.targets if family.lora is not None else ()) or OMINICONTROL_TARGETS
    model.add_adapter(LoraConfig(r=rank, target_modules="|".join(targets), init_lora_weights=False), "adapter")
    activate(model, [])


def step_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What a transformer predicts; of those that return a list, stacked."""
    out = model(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def _costs(name: str, case: Case, rounds: int, size: Size) -> Iterator[Comparison]:
    torch.manual_seed(0)
    plain, inputs = case.model(size).eval(), case.inputs(size)
    model = copy.deepcopy(plain)
    add_adapter(model)
    parts = {"transformer": model, "vae": case.vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    control = OmniControl(stock_pipeline(getattr(diffusers, case.pipeline), parts))
    condition = Condition(torch.rand(3, 4 * size.side, 4 * size.side), "adapter")

    def row(work: str) -> Comparison:
        ours, other = (partial(step_of, one, inputs) for one in (model, plain))
        return compare(f"{name}: {work}", type(plain).__name__, ours, other, rounds=rounds)

    yield row(LOADED)
    prefer_onednn(plain)  # as OmniControl.use does
    modes: tuple[tuple[str, Mode], ...] = ((JOINT, "joint"), (CACHED, "independent"))
    for work, mode in modes:
        with control.use(condition, mode=mode):
            yield row(work)
