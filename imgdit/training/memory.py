"""How much memory training takes, before it begins: the plan of `imgdit train --plan`.

P parameters of the model, T trained ones, G GPUs that share weights (FSDP2).

| part | bytes per GPU |
|---|---|
| weights | those of each parameter's type / G; of quantised ones as `imgdit.models.quantized` says |
| gradients | 4 T / G |
| optimiser | 8 T / G, 2 T / G with moments in 8 bits; of matrices that Muon trains 4 T / G |
| average | 4 T / G |
| gathered | with G > 1 as in `imgdit.mup.cost` |
| step | what a step holds besides, at its peak |

The last is not a formula: the model runs forwards and backwards on tensors without memory (`FakeTensorMode`), in the
recipe's precision, with its adapter, checkpointing and frames, while the bytes of live tensors are counted. What
libraries keep for themselves, such as a CUDA context, and what is lost between blocks of memory is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint

from imgdit.adapters.stock_frames import StockFrames
from imgdit.compat import FakeTensorMode, TorchDispatchMode, tree_leaves
from imgdit.family import find_family
from imgdit.layout import FrameLayout
from imgdit.models.functional import table_positions
from imgdit.models.mmdit import MMDiT
from imgdit.models.quantized import KINDS, Int8Linear, quantize_rows
from imgdit.mup.cost import AVERAGE_BYTES, GATHERED_BYTES, GRADIENT_BYTES
from imgdit.training.batches import Batch, Text
from imgdit.training.blocks import block_paths
from imgdit.training.build import add_adapter, pretrained_folder
from imgdit.training.objectives.frames import predict_velocity, stock_inputs
from imgdit.training.optimizers import state_bytes
from imgdit.training.recipe import Recipe
from imgdit.training.stock import transformer_class


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
        recipe: of an MMDiT, or of a transformer that is trained in its own class.
        load: of a micro-batch.
        gpus: that share weights by FSDP2; with DDP each is as one alone, and has another copy of the gradients.

    Raises:
        ValueError: another kind of model.
    """
    model = skeleton(recipe)
    weights = sum(_bytes(module, recipe.model.quantize) for module in model.modules())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if gpus > 1 and recipe.run.mixed_precision != "no":  # then gathered weights are half, not casts of float32 ones
        model = skeleton(recipe, torch.bfloat16)
    peak = _step_peak(recipe, model, load, keep_gradients=gpus == 1)
    gradients = GRADIENT_BYTES * trained
    blocks = [model.get_submodule(path) for path in block_paths(model)]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return Memory(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=trained,
        weights=weights / gpus,
        gradients=gradients / gpus,
        optimizer=state_bytes(model, recipe.optimizer.kind) / gpus,
        average=(AVERAGE_BYTES * trained if recipe.ema.decay else 0.0) / gpus,
        gathered=GATHERED_BYTES * largest if gpus > 1 else 0.0,
        # The optimiser's step has the gradients, and copies of the moments' size on a GPU, but no activations.
        step=max(peak - gradients, gradients if torch.cuda.is_available() else 0.0) if gpus == 1 else peak,
    )


def check_planned(recipe: Recipe) -> None:
    """Refuse a kind of model whose costs are not known.

    Raises:
        ValueError: it is one.
    """
    if recipe.model.kind not in ("mmdit", "transformer"):
        raise ValueError(f"costs are known for model.kind 'mmdit' and 'transformer', got {recipe.model.kind!r}")


def skeleton(recipe: Recipe, dtype: torch.dtype | None = None) -> Any:
    """The model of a recipe on the meta device: everything but the weights.

    Args:
        recipe: of an MMDiT, or of a transformer that is trained in its own class.
        dtype: of the weights that are not quantised and not an adapter's; `None`: the recipe's.

    Raises:
        ValueError: a kind of model whose costs are not known.
    """
    config = recipe.model
    check_planned(recipe)
    owner, arguments = MMDiT, config.arguments
    if config.kind == "transformer":
        owner, arguments = transformer_class(pretrained_folder(config), config.subfolder or None)
    elif config.pretrained is not None:
        arguments = owner.load_config(pretrained_folder(config), subfolder=config.subfolder or None)
    with torch.device("meta"):
        model = owner.from_config(arguments)
        if (dtype or getattr(torch, config.dtype)) == torch.bfloat16:
            model.bfloat16()
        if config.quantize != "none":
            quantize_rows(model)
        if recipe.adapter.rank:
            add_adapter(model, recipe.adapter, recipe.run.seed)
    if _is_stock(model):
        StockFrames(model)
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
    with _no_memory(model, load):
        return _run_step(recipe, model, load, keep_gradients)


@contextmanager
def without_memory(recipe: Recipe, load: Load) -> Iterator[tuple[Any, Callable[[], torch.Tensor]]]:
    """The model of a recipe on tensors without memory, and a function that runs it forwards on a load."""
    model = skeleton(recipe)
    with _no_memory(model, load):
        yield model, lambda: predict_velocity(model, *_inputs(model, load), load.layout, 1.0)


@contextmanager
def _no_memory(model: Any, load: Load) -> Iterator[None]:
    """Let a model on the meta device run on tensors without memory."""
    _ = load.layout.groups, load.layout.image_groups  # made of real tensors, once
    stock = StockFrames.of(model)
    if stock is not None:
        stock.prepare(*stock_inputs(model.config, *_inputs(model, load), load.layout, 1.0))
    table: Any = getattr(model, "pos_embed", None)
    if hasattr(table, "pos_embed_max_size"):  # SD3's positions, which are looked up by values
        side, base, width = table.pos_embed_max_size, table.base_size, table.pos_embed.shape[-1]
        empty = torch.zeros(1, 1, width).expand(1, side**2, width)
        table_positions(SimpleNamespace(pos_embed=empty, pos_embed_max_size=side, base_size=base), load.layout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            _without_memory(module)
        yield


def _without_memory(module: torch.nn.Module) -> None:
    """Give a module on the meta device tensors of a CPU; call it under `FakeTensorMode`."""
    for name, parameter in module.named_parameters(recurse=False):
        fake = torch.empty(parameter.shape, dtype=parameter.dtype)
        setattr(module, name, torch.nn.Parameter(fake, requires_grad=parameter.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    for name, value in list(vars(module).items()):  # tables that are neither (Qwen-Image)
        if isinstance(value, torch.Tensor) and value.is_meta:
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype))


def _is_stock(model: Any) -> bool:
    """Whether a model is trained in another library's class."""
    family = find_family(model)
    return family is not None and family.training is not None


def _inputs(model: Any, load: Load) -> tuple[torch.Tensor, Text, torch.Tensor]:
    """Tokens, text and noise levels of a load, all zeros."""
    family, config = find_family(model), model.config
    if family is not None and family.training is not None and family.tokens is not None:
        channels, width = family.tokens.channels(model), family.training.text_width(model)
    else:
        channels, width = model.token_channels, config.joint_attention_dim
    tokens = torch.zeros(load.samples, load.layout.image_length, channels)
    text = torch.zeros(load.samples, load.text_tokens, width)
    pooled = torch.zeros(load.samples, getattr(config, "pooled_projection_dim", None) or 0)
    return tokens, Text(text, pooled), torch.zeros(load.samples, len(load.layout.live))


def _run_step(recipe: Recipe, model: Any, load: Load, keep_gradients: bool) -> float:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.run.mixed_precision)
    inputs = _inputs(model, load)
    if not keep_gradients:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with _Live() as live:
        for _ in range(min(recipe.run.accumulation, 2)):  # from the second on, gradients are there from the start
            with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
                out = predict_velocity(model, *inputs, load.layout, 1.0)
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
