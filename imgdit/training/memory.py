"""How much memory training takes, before it begins: the plan of `imgdit train --plan`.

P parameters of the model, T trained ones, G GPUs that share weights (FSDP2).

| part | bytes per GPU |
|---|---|
| weights | those of each parameter's type / G; of quantised ones as `imgdit.models.quantized` says |
| gradients | 4 T / G |
| optimiser | 8 T / G, 2 T / G with moments in 8 bits |
| average | 4 T / G |
| gathered | with G > 1 as in `imgdit.mup.cost` |
| step | what a step holds besides, at its peak |

The last is not a formula: the model runs forwards and backwards on tensors without memory (`FakeTensorMode`), in the
recipe's precision, with its adapter, checkpointing and frames, while the bytes of live tensors are counted. What
libraries keep for themselves, such as a CUDA context, and what is lost between blocks of memory is not counted.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint

from imgdit.compat import FakeTensorMode, TorchDispatchMode, tree_leaves
from imgdit.layout import FrameLayout
from imgdit.models.quantized import KINDS, Int8Linear, quantize_rows
from imgdit.mup.cost import AVERAGE_BYTES, GATHERED_BYTES, GRADIENT_BYTES
from imgdit.training.batches import Batch
from imgdit.training.build import add_adapter, pretrained_folder
from imgdit.training.optimizers import STATE_BYTES
from imgdit.training.recipe import Recipe


class Load(NamedTuple):
    """What a GPU computes on at once."""

    layout: FrameLayout
    """Frames of a sample."""
    samples: int
    text_tokens: int
    """Of a sample."""


class Memory(NamedTuple):
    """Bytes per GPU."""

    parameters: int
    """Of the whole model and its adapter; a number, not bytes."""
    trained: int
    """Those of them that are trained; a number."""
    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    """What FSDP2 puts together of others' shards."""
    step: float
    """What a step holds besides, at its peak: activations above all."""

    @property
    def total(self) -> float:
        """At the peak."""
        return self.weights + self.gradients + self.optimizer + self.average + self.gathered + self.step

    @property
    def state(self) -> float:
        """What stays from step to step."""
        return self.total - self.step - self.gathered


def load_of(batch: Batch) -> Load:
    """The load of a batch."""
    return Load(batch.layout, len(batch.tokens), batch.text.embeddings.shape[1])


def memory_plan(recipe: Recipe, load: Load, *, gpus: int = 1) -> Memory:
    """Memory of a training run by a recipe; nothing is loaded or run.

    Args:
        recipe: of an MMDiT.
        load: of a micro-batch.
        gpus: that share weights by FSDP2; with DDP each is as one alone, and has another copy of the gradients.

    Raises:
        ValueError: another kind of model.
    """
    _ = load.layout.groups, load.layout.image_groups  # made of real tensors, once
    model = skeleton(recipe)
    weights = sum(_bytes(module, recipe.model.quantize) for module in model.modules())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if gpus > 1 and recipe.run.mixed_precision != "no":  # then gathered weights are half, not casts of float32 ones
        model = skeleton(recipe, torch.bfloat16)
    peak = _step_peak(recipe, model, load, keep_gradients=gpus == 1)
    gradients = GRADIENT_BYTES * trained
    blocks = [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("_blocks")]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return Memory(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=trained,
        weights=weights / gpus,
        gradients=gradients / gpus,
        optimizer=STATE_BYTES[recipe.optimizer.kind] * trained / gpus,
        average=(AVERAGE_BYTES * trained if recipe.ema.decay else 0.0) / gpus,
        gathered=GATHERED_BYTES * largest if gpus > 1 else 0.0,
        # The optimiser's step has the gradients, and copies of the moments' size on a GPU, but no activations.
        step=max(peak - gradients, gradients if torch.cuda.is_available() else 0.0) if gpus == 1 else peak,
    )


def skeleton(recipe: Recipe, dtype: torch.dtype | None = None) -> Any:
    """The model of a recipe on the meta device: everything but the weights.

    Args:
        recipe: of an MMDiT.
        dtype: of the weights that are not quantised and not an adapter's; `None`: the recipe's.

    Raises:
        ValueError: a kind of model whose costs are not known.
    """
    config = recipe.model
    if config.kind != "mmdit":
        raise ValueError(f"costs are known for model.kind 'mmdit', got {config.kind!r}")
    owner, arguments = config.model_class, config.arguments
    if config.pretrained is not None:
        arguments = owner.load_config(pretrained_folder(config), subfolder=config.subfolder or None)
    with torch.device("meta"):
        model = owner.from_config(arguments)
        if (dtype or getattr(torch, config.dtype)) == torch.bfloat16:
            model.bfloat16()
        if config.quantize != "none":
            quantize_rows(model)
        if recipe.adapter.rank:
            add_adapter(model, recipe.adapter, recipe.run.seed)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing(_checkpoint)
    return model.train()


def _checkpoint(function: Any, *arguments: Any) -> Any:
    """diffusers' own, but without the random numbers' state, which tensors without memory do not have."""
    return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _bytes(module: torch.nn.Module, quantize: str) -> float:
    """Bytes of a module's own parameters and buffers."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    rest: float = sum(t.numel() * t.element_size() for t in own if t.dtype != torch.int8)
    if isinstance(module, Int8Linear):
        rest += module.weight.numel() * KINDS[quantize]
    return rest


def _step_peak(recipe: Recipe, model: Any, load: Load, *, keep_gradients: bool) -> float:
    """Most bytes that a step's forward and backward passes hold at once; with gradients, or with one at a time."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            _without_memory(module)
        return _run_step(recipe, model, load, keep_gradients)


def _without_memory(module: torch.nn.Module) -> None:
    """Give a module on the meta device tensors of a CPU; call it under `FakeTensorMode`."""
    for name, parameter in module.named_parameters(recurse=False):
        fake = torch.empty(parameter.shape, dtype=parameter.dtype)
        setattr(module, name, torch.nn.Parameter(fake, requires_grad=parameter.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _run_step(recipe: Recipe, model: Any, load: Load, keep_gradients: bool) -> float:
    config = model.config
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.run.mixed_precision)
    tokens = torch.zeros(load.samples, load.layout.image_length, model.token_channels)
    text = torch.zeros(load.samples, load.text_tokens, config.joint_attention_dim)
    pooled = torch.zeros(load.samples, config.pooled_projection_dim)
    options: dict[str, Any] = {"guidance": torch.ones(load.samples)} if config.guidance_embeds else {}
    if not keep_gradients:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with _Live() as live:
        for _ in range(min(recipe.run.accumulation, 2)):  # from the second on, gradients are there from the start
            with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
                out = model(tokens, text, pooled, torch.ones(load.samples), layout=load.layout, **options).sample
            out.float().square().mean().backward()
            del out
    return live.peak


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of what operations make, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in inputs and id(storage) not in self.known:  # no view of what was there
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def gone(_: Any) -> None:
            self.bytes -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
