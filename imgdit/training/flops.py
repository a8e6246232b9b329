"""Floating-point operations of a forward pass, told by the layers of a model that runs on tensors without memory.

S tokens of the sequence, D width: 2 * sum of (entries of a matrix * rows it sees) + 4 * S^2 * D per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from imgdit.kernels import is_linear
from imgdit.training.blocks import block_paths
from imgdit.training.memory import Load, without_memory
from imgdit.training.recipe import Recipe


class Counted(NamedTuple):
    """What modules told in a pass."""

    products: list[float]
    """Of each linear layer."""
    widths: dict[str, int]
    """Of what modules give, by their paths."""

    def flops(self, load: Load, blocks: int) -> float:
        """Of the linear layers and of the attention of so many blocks as wide as the first module."""
        sequence = load.layout.image_length + load.text_tokens
        return sum(self.products) + 4.0 * sequence**2 * next(iter(self.widths.values())) * blocks


@contextmanager
def counted(model: Any, paths: Sequence[str]) -> Iterator[Counted]:
    """What linear layers compute, and how wide what modules give is, in the passes meanwhile.

    Args:
        paths: of the modules.
    """
    found = Counted([], {})

    def product(module: Any, args: Any, out: torch.Tensor) -> None:
        found.products.append(2.0 * module.in_features * out.numel())

    def width(path: str) -> Any:
        def told(module: Any, args: Any, out: Any) -> None:
            first = out if isinstance(out, torch.Tensor) else next(one for one in out if one is not None)
            found.widths[path] = first.shape[-1]

        return told

    handles = [part.register_forward_hook(product) for part in model.modules() if is_linear(part)]
    handles += [model.get_submodule(path).register_forward_hook(width(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def forward_flops(recipe: Recipe, load: Load) -> float:
    """Floating-point operations of a forward pass on one sample of a load, without those of an adapter.

    Args:
        recipe: of an MMDiT, or of a transformer that is trained in its own class.
    """
    plain = recipe.replace(adapter={"rank": 0}, model={"quantize": "none", "dtype": "float32"})
    one = load._replace(samples=1)
    with without_memory(plain, one) as (model, run):
        blocks = block_paths(model)
        with counted(model, blocks[:1]) as found, torch.no_grad():
            run()
    return found.flops(one, len(blocks))
