"""Reading scenes: the objectives of the caption reader and of the probe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training.batches import Movable, ObjectiveOutput


@dataclass(frozen=True, eq=False)
class Captions(Movable):
    """Captions with questions about them."""

    input_ids: torch.Tensor
    """(B, T)."""
    mask: torch.Tensor
    """Boolean (B, T), true on real tokens."""
    answers: torch.Tensor
    """(B, Q) number of the right answer of each question."""


@dataclass(frozen=True, eq=False)
class Readings(Movable):
    """Images with what is to be read in them."""

    pixels: torch.Tensor
    """(B, 3, H, W) in [-1, 1]."""
    answers: torch.Tensor
    """(B, Q) number of the right answer of each question."""
    depth: torch.Tensor
    """(B, 1, H, W) z-depth."""
    classes: torch.Tensor
    """(B, H, W) segmentation."""
    shows: torch.Tensor
    """Boolean (B,): whether depth and segmentation can be read."""


def read_captions(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler | None,
    batch: Captions,
    generator: torch.Generator | None,
) -> ObjectiveOutput:
    """Cross-entropy of a `CaptionReader`'s answers, the mean over its questions.

    Args:
        model: reader, wrapped for distributed training or not.
        scheduler, generator: not used.
        batch: captions.
    """
    logits = model(batch.input_ids, batch.mask)
    pairs = list(zip(logits, batch.answers.unbind(1), strict=True))
    loss = torch.stack([F.cross_entropy(guess.float(), answer) for guess, answer in pairs]).mean()
    right = torch.stack([guess.argmax(1) == answer for guess, answer in pairs])  # (Q, B)
    return ObjectiveOutput(loss, {"right": right.float().mean(), "all_right": right.all(0).float().mean()})


def read_images(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler | None,
    batch: Readings,
    generator: torch.Generator | None,
    *,
    depth_weight: float = 5.0,
) -> ObjectiveOutput:
    """Cross-entropy of a `SceneProbe`'s answers (their mean) and of its segmentation, and its depth's relative error.

    Args:
        model: probe, wrapped for distributed training or not.
        scheduler, generator: not used.
        batch: images.
        depth_weight: of the depth's error.
    """
    reading = model(batch.pixels)
    pairs = list(zip(reading.answers.values(), batch.answers.unbind(1), strict=True))
    answers = torch.stack([F.cross_entropy(guess.float(), answer) for guess, answer in pairs]).mean()
    right = torch.stack([guess.argmax(1) == answer for guess, answer in pairs])  # (Q, B)
    depth, truth = reading.depth[batch.shows], batch.depth[batch.shows]
    relative = ((depth - truth).abs() / truth).mean()
    segmentation = F.cross_entropy(reading.segmentation[batch.shows].float(), batch.classes[batch.shows])
    metrics = {
        "answers": answers.detach(),
        "right": right.float().mean(),
        "all_right": right.all(0).float().mean(),
        "abs_rel": relative.detach(),
        "segmentation": segmentation.detach(),
    }
    return ObjectiveOutput(answers + segmentation + depth_weight * relative, metrics)
