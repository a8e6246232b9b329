"""Tiny pipelines of the families whose stock transformers take conditions, and what tests of all of them need."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_control import lora_file

from imgdit import OmniControl
from imgdit.adapters.stock_frames import StockFrames
from imgdit.training.build import add_adapter
from imgdit.training.recipe import AdapterConfig


@dataclass(frozen=True)
class FamilyCase:
    """A family, in one of its pipelines."""

    pipeline: Callable[[], Any]
    """A tiny pipeline, always of the same weights: images of 16 pixels are 4x4 tokens."""
    prompts: Callable[[int], dict[str, Any]]
    """Arguments of the pipeline for so many prompts: embeddings, masks, guidance."""
    dense: Callable[..., torch.Tensor]
    """`dense(model, arguments, conditions)`: what the transformer gives, by `dense_rows`."""
    targets: str
    """Layers that an adapter of a condition has."""
    style: str
    """Layers that a style LoRA has: those of the text too."""
    hookpoints: tuple[str, ...]
    """Blocks to read activations from, one of each kind."""
    calls: int = 1
    """Of the transformer in a step."""
    references: Callable[[], dict[str, Any]] | None = None
    """Arguments by which the pipeline gets reference images of its own."""
    residuals: Callable[..., dict[str, Any]] | None = None
    """`residuals(model, arguments)`: arguments of the transformer with the residuals of a ControlNet."""
    compiled: bool = True
    """Whether the quick tests compile its blocks; those that are like another family's, or take long, wait for the
    slow."""
    completes: bool = True
    """Whether conditions can complete an image."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of every call."""
    read: Callable[[Any], Any] = lambda out: out
    """Of what the transformer gives: what its pipeline reads."""


def make(case, pipe, batch=1, steps=3, **changes):
    """Latents of a call."""
    options = {"height": 16, "width": 16, "num_inference_steps": steps, "output_type": "latent"}
    options |= case.prompts(batch) | case.options | changes

    def cast(value):
        if isinstance(value, list):
            return [cast(one) for one in value]
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(pipe.transformer.dtype) if is_float else value

    given = {name: cast(value) for name, value in options.items()}
    return pipe(**given, generator=torch.Generator().manual_seed(5), return_dict=False)[0]


def loaded(case, pipe, tmp_path):
    """`OmniControl` with the adapters canny and depth."""
    control = OmniControl(pipe)
    for seed, name in enumerate(("canny", "depth")):
        control.load(lora_file(tmp_path / f"{name}.safetensors", pipe.transformer, case.targets, seed=seed, std=0.2))
    return control


def used(case, control, *conditions, call=None, **options):
    """Latents of a call under conditions."""
    with control.use(conditions, **options):
        return make(case, control.pipe, **(call or {}))


def random(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def differs(a, b, least=1e-3):
    a, b = tensor(a), tensor(b)
    assert a.shape == b.shape and (a - b).abs().max() > least, (a - b).abs().max()


def near(a, b, tolerance=2e-5):
    a, b = tensor(a), tensor(b)
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


def tensor(x):
    """A result of a transformer, also of one that returns a list of samples."""
    return torch.stack(x) if isinstance(x, (list, tuple)) else x


@torch.no_grad()
def passes(case, control, conditions=(), call=None, run=make, **options):
    """Arguments and result of each call of the transformer, and the encoded conditions; the result as it is where no
    case says how it is read."""
    read = FamilyCase.read if case is None else case.read
    found, names = [], list(inspect.signature(type(control.transformer).forward).parameters)[1:]
    handle = control.transformer.register_forward_hook(
        lambda module, args, kwargs, output: found.append((dict(zip(names, args)) | kwargs, read(output[0]))),
        with_kwargs=True,
    )
    try:
        with control.use(conditions, **options):
            run(case, control.pipe, **(call or {}))
            riding = () if control.run is None else control.run.conditions
    finally:
        handle.remove()
    return found, riding


def trained_model(case):
    """The transformer of a family's tiny pipeline, always of the same weights, with an adapter that changes something
    already."""
    model = case.pipeline().transformer
    add_adapter(model, AdapterConfig(rank=2, targets=(case.targets,)), 0)
    generator = torch.Generator().manual_seed(9)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    StockFrames(model)
    return model.train()
