"""What objectives share that align features of a block with something else: the head, the features, the error.

B batch, N tokens of the frames, n tokens of the target frames, D width of the model, K features of the other thing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from imgdit import compat
from imgdit.layout import FrameLayout, take_rows
from imgdit.models.mmdit import MMDiT
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training.batches import Batch, ObjectiveOutput
from imgdit.training.blocks import block_paths
from imgdit.training.objectives.flow_matching import draw_levels, flow_matching
from imgdit.training.objectives.frames import check_batch, generated_frames, token_loss, training_fractions

HEAD = "alignment_head"
"""Name of the head in the model that is trained. It is in the run's checkpoints and not in what the run exports."""


class AlignmentHead(torch.nn.Module):
    """Two layers from the features of a block (…, D) to what they are aligned with (…, K).

    Args:
        width: D.
        features: K; `None`: the features of another block, D.
    """

    def __init__(self, width: int, features: int | None) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(width, width)
        if features is None:
            self.to_hidden = torch.nn.Linear(width, width)
        else:
            self.to_features = torch.nn.Linear(width, features)
        for name, layer in self.named_children():
            assert isinstance(layer, torch.nn.Linear)
            torch.nn.init.zeros_(layer.bias)
            if name == "to_features":  # as the model's own readout
                torch.nn.init.zeros_(layer.weight)
            else:
                torch.nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(…, D) of any dtype to (…, K) in the weights' own."""
        last = self.to_hidden if hasattr(self, "to_hidden") else self.to_features
        return last(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))


def with_head(features: Callable[[Any], int | None]) -> Callable[[Any], Any]:
    """Decorator of an objective: the model is built with an `AlignmentHead`.

    Args:
        features: model -> K, see `AlignmentHead`.
    """

    def mark(function: Any) -> Any:
        function.head_features = features
        return function

    return mark


def add_head(model: torch.nn.Module, function: Callable[..., Any], seed: int) -> None:
    """Give a model the head that an objective asks for, if it asks for one; the same weights for the same seed.

    Raises:
        ValueError: it asks for one, and the model is no `MMDiT`.
    """
    features = getattr(function, "head_features", None)
    if features is None:
        return
    if not isinstance(model, MMDiT):
        raise ValueError(f"objectives with an alignment head are for model.kind 'mmdit', got {type(model).__name__}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_module(HEAD, AlignmentHead(model.inner_dim, features(model)))


def drop_head(model: torch.nn.Module) -> None:
    """Take the head away again."""
    if hasattr(model, HEAD):
        delattr(model, HEAD)


def head_of(model: torch.nn.Module) -> AlignmentHead:
    """The head of a model.

    Raises:
        ValueError: it has none, or one that is sharded.
    """
    head = getattr(compat.unwrapped(model), HEAD, None)
    if head is None:
        raise ValueError("the model has no alignment head; build it by its recipe (imgdit.training.build.build_model)")
    if isinstance(head.hidden.weight, DTensor):
        raise ValueError(
            "objectives with an alignment head do not go with FSDP2; start with configs/accelerate/ddp.json"
        )
    return head


@contextmanager
def block_output(model: torch.nn.Module, depth: float) -> Iterator[list[torch.Tensor]]:
    """Collect the image tokens (B, N, D) that the block at a depth gives in the passes meanwhile.

    Args:
        model: whose blocks give the image stream alone or first, such as `MMDiT`; wrapped or not.
        depth: in (0, 1): after that fraction of the blocks; the last one, which may leave out rows, never counts.

    Raises:
        ValueError: a depth out of range, or a model of one block.
    """
    inner = compat.unwrapped(model)
    paths = block_paths(inner)
    if not 0.0 < depth < 1.0 or len(paths) < 2:
        raise ValueError(f"a depth is a fraction of at least two blocks in (0, 1), got {depth} of {len(paths)} blocks")
    number = min(max(round(depth * len(paths)), 1), len(paths) - 1)
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    handle = inner.get_submodule(paths[number - 1]).register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def pass_with_features(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: Batch,
    generator: torch.Generator | None,
    depth: float,
    *,
    distribution: str,
    mean: float,
    std: float,
    clean: float,
    text_dropout: float,
    condition_dropout: float,
) -> tuple[ObjectiveOutput, Batch, torch.Tensor]:
    """Flow matching with the features of a block.

    Args:
        depth: see `block_output`; the others: see `flow_matching`.

    Returns:
        The loss, the batch with its levels, drawn while the model trains, and the features (B, N, D).

    Raises:
        ValueError: as `flow_matching` and `block_output`.
    """
    check_batch(batch)
    if model.training and batch.sigmas is None:
        (fraction,) = training_fractions(model, clean=clean)
        levels = draw_levels(scheduler, batch, generator, distribution, mean, std, clean=fraction)
        batch = dataclasses.replace(batch, sigmas=levels)
    with block_output(model, depth) as found:
        output = flow_matching(
            model, scheduler, batch, generator, text_dropout=text_dropout, condition_dropout=condition_dropout
        )  # fmt: skip
    return output, batch, found[0]


def noisy_frames(batch: Batch) -> torch.Tensor:
    """Boolean (B, generated frames): those with noise, which count. The batch's levels must be set."""
    assert batch.sigmas is not None
    generated = generated_frames(batch.layout)
    weights = (batch.sigmas > 0.0)[:, generated]
    return weights if batch.counts is None else weights & batch.counts[:, generated]


def aligned(
    output: ObjectiveOutput, errors: torch.Tensor, layout: FrameLayout, counted: torch.Tensor, weight: float
) -> ObjectiveOutput:
    """An objective's output with the alignment's error on top.

    Args:
        output: of flow matching.
        errors: (B, n) of the tokens of the target frames.
        layout: of the frames.
        counted: boolean (B, generated frames), see `noisy_frames`.
        weight: of the alignment.
    """
    alignment = token_loss(errors, layout, counted).loss
    metrics = {**output.metrics, "velocity": output.loss.detach(), "alignment": alignment.detach()}
    return ObjectiveOutput(output.loss + weight * alignment, metrics)


def target_rows(features: torch.Tensor, layout: FrameLayout) -> torch.Tensor:
    """Rows of the target frames (B, n, D) of a block's image tokens (B, N, D).

    Raises:
        ValueError: the block gives other rows than the frames'.
    """
    if features.ndim != 3 or features.shape[1] != layout.image_length:
        raise ValueError(
            f"alignment needs a model whose blocks give the image tokens (B, {layout.image_length}, D) apart from the "
            f"text, as MMDiT's do; got {tuple(features.shape)}"
        )
    return take_rows(features, layout.predicted)
