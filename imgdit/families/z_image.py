"""Z-Image of diffusers (Turbo, Base): the image before the text, both padded to whole 32 tokens, refined apart first.

B batch, N image tokens with their padding, T text tokens of the longest caption with its padding, n condition tokens,
S all tokens, C channels of a token, D width, V width of the conditioning vectors, F frames, d features of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

from imgdit import compat
from imgdit.attention.cache import LayerCache
from imgdit.families.step import (
    Step,
    block_lists,
    embed_tokens,
    entered,
    known_vector,
    one_image,
    read_image,
    text_edges,
)
from imgdit.families.streams import gated_between_norms, gated_feed_forward
from imgdit.family import (
    Arguments,
    Call,
    Conditions,
    Family,
    Grid,
    LoraNames,
    NoisyImages,
    Preset,
    PromptEncoding,
    TokenFormat,
    Training,
)
from imgdit.frames import Frame
from imgdit.images.latents import encode_images
from imgdit.lora.rows import linear
from imgdit.models.blocks import BlockPlan, joint_attention
from imgdit.models.functional import PATCH, pack, rope_table, unpack
from imgdit.mup.structure import Structure

WHOLE = 32
"""The model pads image and caption to multiples of so many tokens, with tokens of their own that are seen."""
_OMNI = (
    "it gives the model several images of a sample, whose order conditions and activation hooks do not know. Load the "
    "model as a ZImagePipeline"
)


def _patch(model: Any, vae: Any) -> int:
    return model.all_patch_size[0]


def _channels(model: Any) -> int:
    return model.in_channels * model.all_patch_size[0] ** 2


def _encode(model: Any, vae: Any, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Tokens whose features are ordered (row, column, channel)."""
    return _tokens(encode_images(vae, pixels, generator), _patch(model, vae))


def _tokens(latents: torch.Tensor, patch: int) -> torch.Tensor:
    return pack(latents, patch).unflatten(-1, (latents.shape[1], -1)).transpose(-1, -2).flatten(-2)


def _samples(arguments: Arguments) -> list[torch.Tensor]:
    """Each (C, 1, h, w).

    Raises:
        ValueError: samples of several images, or of unequal sizes.
    """
    samples = list(arguments["x"])
    if isinstance(samples[0], (list, tuple)):
        raise ValueError(f"each sample of this call is several images; this is ZImageOmniPipeline's way: {_OMNI}")
    sizes = {tuple(sample.shape) for sample in samples}
    if len(sizes) > 1:
        raise ValueError(f"the images of a batch are of one size, got {', '.join(map(str, sorted(sizes)))}")
    return samples


def _latents(arguments: Arguments) -> torch.Tensor:
    """(B, C, 1, h, w)."""
    return torch.stack(_samples(arguments))


def _grid(arguments: Arguments) -> Grid:
    *_, height, width = _samples(arguments)[0].shape
    patch = arguments.get("patch_size", 2)
    return height // patch, width // patch


def _padded(tokens: int) -> int:
    return -(-tokens // WHOLE) * WHOLE


def _text_lengths(arguments: Arguments) -> tuple[int, ...]:
    """Text tokens of each sample, with the padding that is seen."""
    return tuple(_padded(len(caption)) for caption in arguments["cap_feats"])


@functools.lru_cache(maxsize=32)
def _as_tensor(lengths: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """(B, 1); the same tensor in every step, so that nothing is compared."""
    return torch.tensor(lengths, dtype=dtype)[:, None]


def _call(model: Any, arguments: Arguments) -> Call:
    latents, captions, lengths = _latents(arguments), arguments["cap_feats"], _text_lengths(arguments)
    rows, columns = _grid(arguments)
    image, text = _padded(rows * columns), max(lengths)
    mask = None
    if min(lengths) < text:
        place = torch.arange(image + text, device=latents.device)
        mask = torch.stack([place < image + length for length in lengths])
    return Call(
        frames=(Frame((1, image)),),
        text_length=text,
        length=image,
        latents=latents,
        texts=(torch.nn.utils.rnn.pad_sequence(list(captions), batch_first=True),),
        cached_by=_as_tensor(lengths, latents.dtype),
        key_mask=mask,
        places=lengths,
    )


def _rope(model: Any, arguments: Arguments, conditions: Sequence[Frame], kept: torch.Tensor | None) -> torch.Tensor:
    """Of image, text and conditions, the model's own order. Image and conditions begin behind the text: the first
    coordinate of a sample's is its text length + 1."""
    lengths, grid = _text_lengths(arguments), _grid(arguments)
    device, longest = arguments["x"][0].device, max(lengths)
    text = F.pad(torch.arange(1.0, longest + 1)[:, None], (0, 2))
    padding = torch.zeros(_padded(grid[0] * grid[1]) - grid[0] * grid[1], 3)
    riders = [frame.ids() for frame in conditions]

    def table(length: int) -> torch.Tensor:
        behind = torch.tensor([length + 1.0, 0.0, 0.0])
        ids = torch.cat([Frame(grid).ids() + behind, padding, text, *(ids + behind for ids in riders)])
        return rope_table(ids.to(device), model.axes_dims, model.rope_theta)

    tables = {length: table(length) for length in set(lengths)}
    return tables[longest] if len(tables) == 1 else torch.stack([tables[length] for length in lengths])


def _vector(model: Any, arguments: Arguments, frame: Frame) -> torch.Tensor:
    """The model counts time from 0, noise, to 1."""
    time = arguments["t"] if frame.sigma is None else torch.full_like(arguments["t"], 1.0 - frame.sigma)
    return model.t_embedder(time * model.t_scale).type_as(arguments["x"][0])


def _training_arguments(model: Any, images: NoisyImages) -> dict[str, Any]:
    """The model counts time from 0, noise, to 1, and takes planes and captions each for itself."""
    tokens = images.tokens.unflatten(-1, (PATCH**2, -1)).transpose(-1, -2).flatten(-2)
    texts = images.text if images.mask is None else [one[mask] for one, mask in zip(images.text, images.mask)]
    return {
        "x": list(unpack(tokens, PATCH, images.grid)[:, :, None]),
        "t": 1.0 - images.sigma,
        "cap_feats": list(texts),
    }


def _velocity(samples: list[torch.Tensor]) -> torch.Tensor:
    """The model gives data minus noise, as planes (C, 1, h, w)."""
    return _tokens(-torch.stack(samples)[:, :, 0], PATCH)


# Edges and blocks. Condition tokens enter with the first block of the noise refiner and lie behind the image; the
# model drops them after its last one; they enter again with the first layer and lie behind image and text.


def _embed(step: Step, module: Any, original: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """Of the embedding of tokens, which the model calls on (B * N, C): (B * N, D)."""
    length = step.image_length
    embedded = embed_tokens(step, module, original, tokens.unflatten(0, (-1, length)))
    step.waiting["refiner"] = step.waiting["layers"] = embedded[:, length:]
    return embedded[:, :length].flatten(0, 1)


def _refine_image(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> torch.Tensor:
    """Image and conditions (B, N + n, D)."""
    image, text = step.image_length, step.layout.text_length
    x = entered(arguments["x"], step, image, "refiner")
    assert step.rope is not None
    rope = step.rope[..., :image, :]
    if step.condition_length:
        rope = torch.cat([rope, step.rope[..., image + text :, :]], dim=-2)
    x = _compute(block, x, rope, step, plan, cache, "image")
    step.waiting["layers"] = x[:, image:]
    return x


def _refine_text(
    block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None
) -> torch.Tensor:
    """Text (B, T, D)."""
    x = arguments["x"]
    alone = BlockPlan((x.shape[1],), (), key_mask=arguments["attn_mask"])
    if plan.lora is not None:
        alone = alone._replace(lora=plan.lora._replace(joint=plan.lora.text))
    return _compute(block, x, arguments["freqs_cis"], step, alone, None, "joint")


def _layer(block: Any, arguments: Arguments, step: Step, plan: BlockPlan, cache: LayerCache | None) -> torch.Tensor:
    """Image, text and conditions (B, N + T + n, D). Image and text see and are seen alike, and no adapter tells them
    apart: a plan for text before image holds for the model's own order too."""
    x = entered(arguments["x"], step, step.image_length + step.layout.text_length, "layers")
    assert step.rope is not None
    return _compute(block, x, step.rope, step, plan, cache, "joint")


def _compute(
    block: Any, x: torch.Tensor, rope: torch.Tensor, step: Step, plan: BlockPlan, cache: LayerCache | None, stream: str
) -> torch.Tensor:
    """A `ZImageTransformerBlock`, whose branches have norms at both ends."""
    rows = plan.adapters(stream)
    backend = compat.processor_backend(block.attention)
    compute = functools.partial(_attention, block.attention, plan=plan, cache=cache, stream=stream, backend=backend)

    def attend(normed: torch.Tensor) -> torch.Tensor:
        return compat.called(block.attention, compute, normed, freqs_cis=rope)

    if not block.modulation:
        x = x + block.attention_norm2(attend(block.attention_norm1(x)))
        return x + block.ffn_norm2(
            gated_feed_forward(block.feed_forward, ("w1", "w3", "w2"), block.ffn_norm1(x), rows)
        )
    modulation = linear(block.adaLN_modulation[0], step.shared, plan.adapters("image_vectors"))  # (B, F, 4D)
    return gated_between_norms(block, x, modulation, attend, plan, stream)


def _attention(attn: Any, hidden_states: torch.Tensor, freqs_cis: torch.Tensor, **options: Any) -> Any:
    return joint_attention(attn, hidden_states, None, freqs_cis, **options)


# Names of Z-Image's repository.
_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    **{name: (name,) for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}
_ROOT = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    **{name: (name,) for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
}

_ROLES = Structure(
    roles=(
        ("all_x_embedder.*.weight", "input"),
        ("all_final_layer.*.adaLN_modulation.1.weight", "modulation"),
        ("all_final_layer.*.linear.weight", "output"),
        ("all_final_layer.*.linear.bias", "finite"),
        ("*_pad_token", "input", 0.02),
        ("t_embedder.mlp.0.*", "finite"),
        ("t_embedder.mlp.2.weight", "input"),
        ("*_embedder.0.weight", "finite"),
        ("*_embedder.1.weight", "input"),
        ("*.attention.norm_[qk].weight", "head"),
        ("*.attention.to_*.weight", "hidden"),
        ("*.feed_forward.w[123].weight", "hidden"),
        ("*.attention_norm[12].weight", "vector"),
        ("*.ffn_norm[12].weight", "vector"),
        ("*.adaLN_modulation.0.weight", "modulation"),
        ("*.bias", "vector"),
    ),
    queries=(("*.norm_q.weight",), ("*.to_q.weight",)),
    branches=("*.attention_norm2.weight", "*.ffn_norm2.weight"),
    blocks=("layers.*", "*_refiner.*"),
    depth=("n_layers", "n_refiner_layers"),
    width=("dim",),
    heads="n_heads",
    kv_heads="n_kv_heads",
    capped=("t_embedder.mlp.2.*", "*adaLN_modulation.*.weight"),
    cap=256,
)


def _edges(model: Any) -> dict[str, Any]:
    return {
        **{f"all_x_embedder.{size}": _embed for size in model.all_x_embedder},
        "t_embedder": known_vector,
        **text_edges(model, ["cap_embedder"]),
        **{f"all_final_layer.{size}": read_image for size in model.all_final_layer},
    }


FAMILY = Family(
    classes=("ZImageTransformer2DModel",),
    places=lambda model, arguments: one_image(_grid(arguments)),
    timestep=lambda model, arguments: 1000.0 * (1.0 - float(arguments["t"][0])),
    latents=_latents,
    text_length=lambda model, arguments: max(_text_lengths(arguments)),
    text_parts=r"^(cap_|context_refiner|siglip_)",
    joint_parts=r"^layers$",
    image_first=True,
    prompt_first=True,
    guides_by_second_call=True,
    tokens=TokenFormat(patch=_patch, channels=_channels, encode=_encode),
    conditions=Conditions(
        call=_call,
        rope=_rope,
        vector=_vector,
        blocks=block_lists(
            {"noise_refiner": _refine_image, "context_refiner": _refine_text, "layers": _layer}, ("attention",)
        ),
        edges=_edges,
        processors=(ZSingleStreamAttnProcessor,),
        refused={"ZImageOmniPipeline": _OMNI},
        residual_arguments=("controlnet_block_samples",),
    ),
    lora=LoraNames(
        blocks={name: (name, _BLOCK) for name in ("noise_refiner", "context_refiner", "layers")},
        root=_ROOT,
        inputs=("all_x_embedder.2-1",),
        written=True,
        label="Z-Image",
        marks=r"\w+_refiner[._]\d+[._](attention|feed_forward|adaLN_modulation)[._]|all_x_embedder|cap_embedder",
        shared=r"^layers[._]\d+[._](attention|feed_forward|adaLN_modulation)[._]",
        targets=(r"all_x_embedder\.2-1|(noise_refiner|layers)\.\d+\.(attention\.to_([qkv]|out\.0)|feed_forward\.w2)",),
        presets=(Preset("in-context LoRA (SimpleTuner)", "", {"position": "subject", "acts_on": "all"}),),
    ),
    prompts={"ZImagePipeline": PromptEncoding((0, None, None))},
    mup=_ROLES,
    training=Training(_training_arguments, _velocity, text_width=lambda model: model.config.cap_feat_dim),
)
