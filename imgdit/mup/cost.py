"""What training an MMDiT costs, on paper: parameters, floating-point operations and memory.

N image tokens, T text tokens, S = N + T, D width, L blocks, b samples of a micro-batch on a GPU, G GPUs, P parameters.

| what | formula |
|---|---|
| forward, per sample | 2 * sum of (entries of a matrix * rows it sees) + 4 * S^2 * D per attention |
| rows | image matrices N, text matrices T, single-stream blocks S, modulation and embedders of conditions 1 |
| step, per sample | 3 forwards (one, and a backward of two), 4 with gradient checkpointing |
| state per GPU, FSDP2 | (4 weights + 4 gradients + 8 Adam + 4 average) * P / G bytes |
| gathered per GPU | (2 * 2 + 4) * largest block: bf16 weights of a block and the next, float32 gradients of one |
| activations per GPU | 34 * b * S * D bytes per block (arXiv 2205.05198, equation 1, without scores) |
| with checkpointing | 2 * b * S * D bytes per block, and 34 * b * S * D of the one that is recomputed |
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from imgdit.mup.roles import mup_table

WEIGHT_BYTES, GRADIENT_BYTES, MOMENT_BYTES, AVERAGE_BYTES = 4, 4, 8, 4
"""Per trained parameter."""
GATHERED_BYTES = 2 * 2 + 4
"""Per parameter of the largest block."""
ACTIVATION_BYTES = 34
"""Of a block, per token and feature, that its backward pass needs."""
_CHECKPOINT_BYTES = 2
# Parts of names of matrices that see the text alone.
_TEXT = ("context_embedder.", ".add_", ".to_add_out.", ".to_added_qkv.", ".ff_context.")


class ModelCost(NamedTuple):
    """What one model costs."""

    parameters: int
    largest_block: int
    """Parameters of the largest block."""
    width: int
    blocks: int
    forward_flops: float
    """Of one sample."""
    tokens: int
    """Of one sample, image and text."""

    def step_flops(self, batch_size: int, *, checkpointing: bool) -> float:
        """Floating-point operations of one optimiser step."""
        return (4 if checkpointing else 3) * self.forward_flops * batch_size

    def memory(self, gpus: int, micro_batch: int, *, checkpointing: bool, average: bool) -> float:
        """Bytes per GPU under FSDP2. `imgdit.training.memory` counts activations instead, for one recipe and batch."""
        per_parameter = WEIGHT_BYTES + GRADIENT_BYTES + MOMENT_BYTES + (AVERAGE_BYTES if average else 0)
        state = per_parameter * self.parameters / gpus
        rows = micro_batch * self.tokens * self.width
        kept = _CHECKPOINT_BYTES * self.blocks + ACTIVATION_BYTES if checkpointing else ACTIVATION_BYTES * self.blocks
        return state + GATHERED_BYTES * self.largest_block + kept * rows


def model_cost(model: Any, image_tokens: int, text_tokens: int) -> ModelCost:
    """Cost of a model, which may be on the meta device.

    Args:
        model: whose linear layers are counted; elementwise work is left out.
        image_tokens: of one sample.
        text_tokens: of one sample.
    """
    config, width = model.config, model.inner_dim
    flops = 0.0
    sizes: dict[str, int] = {}
    for rule in mup_table(model):
        if "transformer_blocks." in rule.name:
            block = rule.name[: rule.name.index(".", rule.name.index("blocks.") + 7)]
            sizes[block] = sizes.get(block, 0) + math.prod(rule.shape)
        if len(rule.shape) < 2:
            continue
        if rule.role == "modulation" or rule.name.startswith("time_text_embed."):
            rows = 1
        elif rule.name.startswith("single_transformer_blocks."):
            rows = image_tokens + text_tokens
        else:
            rows = text_tokens if any(part in rule.name for part in _TEXT) else image_tokens
        flops += 2 * math.prod(rule.shape) * rows
    tokens = image_tokens + text_tokens
    blocks = config.num_layers + config.num_single_layers
    flops += 4 * width * (blocks * tokens**2 + len(config.dual_attention_layers) * image_tokens**2)
    parameters = sum(p.numel() for p in model.parameters())
    return ModelCost(parameters, max(sizes.values()), width, blocks, flops, tokens)
