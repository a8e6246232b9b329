"""Features of a block aligned with what the renderer knows of an image: depth, normals and segmentation.

B batch, N tokens of the frames, n tokens of the target frames, P cells of a token (`PATCH` squared).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from imgdit.layout import take_rows
from imgdit.models.functional import PATCH, pack
from imgdit.scenes.geometry import FAR, geometry
from imgdit.scenes.tasks import NEAR, PALETTE, scene_classes
from imgdit.scenes.world import Scene
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training.batches import Batch, ObjectiveOutput
from imgdit.training.objectives.alignment import (
    aligned,
    head_of,
    noisy_frames,
    pass_with_features,
    target_rows,
    with_head,
)
from imgdit.training.objectives.frames import generated_frames

CELLS = PATCH**2
SURFACE = 4
"""Numbers of a cell's surface: depth from 0 at `FAR` to 1 at `NEAR`, and the normal's three."""


@dataclass(frozen=True, eq=False)
class MappedBatch(Batch):
    """Frames, and what is seen at each cell of those that are images of scenes."""

    surface: torch.Tensor | None = None
    """(B, N, P * 4): depth and normals; zeros in frames that are no images."""
    classes: torch.Tensor | None = None
    """(B, N, P) int64: the segmentation's classes."""
    images: tuple[bool, ...] = ()
    """Of each frame: whether it is an image."""


def with_maps(batch: Batch, shown: Sequence[Sequence[Scene | None]]) -> MappedBatch:
    """A batch with the maps of its images, rendered at the latents' cells.

    Args:
        batch: frames.
        shown: of each sample: the scene that each frame is an image of, with its camera; `None`: it is no image.
    """
    size, device = len(batch.tokens), batch.tokens.device
    surface = torch.zeros(size, batch.layout.image_length, CELLS * SURFACE)
    classes = torch.zeros(size, batch.layout.image_length, CELLS, dtype=torch.int64)
    for number, (frame, rows) in enumerate(zip(batch.layout.frames, batch.layout.rows, strict=True)):
        scenes = [scene for row in shown if (scene := row[number]) is not None]
        if scenes:
            seen = geometry(scenes, (frame.size[0] * PATCH, frame.size[1] * PATCH))
            depth = (FAR - seen.depth.clamp(NEAR, FAR)) / (FAR - NEAR)
            surface[:, rows] = pack(torch.cat([depth, seen.normals], dim=1), PATCH)
            kinds = torch.stack([scene_classes(scene, seen.indices[row]) for row, scene in enumerate(scenes)])
            classes[:, rows] = pack(kinds[:, None].float(), PATCH).long()
    fields: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    images = tuple(scene is not None for scene in shown[0])
    return MappedBatch(**fields, surface=surface.to(device), classes=classes.to(device), images=images)


@with_head(lambda model: CELLS * (SURFACE + len(PALETTE)))
def map_alignment(
    model: torch.nn.Module,
    scheduler: MultiFrameFlowMatchScheduler,
    batch: MappedBatch,
    generator: torch.Generator | None,
    *,
    weight: float = 0.5,
    depth: float = 0.5,
    distribution: str = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    clean: float = 0.0,
    text_dropout: float = 0.1,
    condition_dropout: float = 0.0,
) -> ObjectiveOutput:
    """Flow matching, and from the features of a block depth, normals and segmentation of the clean image are read:

        loss = velocity loss + weight * (smooth L1 of depth and normals + cross-entropy of the classes)

    of every cell of an image with noise. The form is that of REPA (arXiv 2410.06940, equation 8) with exact maps in
    place of another network's features. While the model does not train, the loss is that of `flow_matching` alone.

    Args:
        model: built by the recipe, with its head.
        batch: of `SceneFrames(maps=True)`.
        scheduler, generator, distribution, mean, std, clean, text_dropout, condition_dropout: see `flow_matching`.
        weight: of the alignment.
        depth: of the block, as a fraction of the blocks.

    Raises:
        ValueError: as `flow_matching`, a batch without maps, or a model without the head.
    """
    output, seen, features = pass_with_features(
        model, scheduler, batch, generator, depth, distribution=distribution, mean=mean, std=std, clean=clean,
        text_dropout=text_dropout, condition_dropout=condition_dropout,
    )  # fmt: skip
    if not model.training:
        return output
    surface, classes = getattr(batch, "surface", None), getattr(batch, "classes", None)
    if surface is None or classes is None:
        raise ValueError("map_alignment needs batches with maps; set data.arguments.maps: true")
    layout = batch.layout
    read = head_of(model)(target_rows(features, layout)).float()
    surfaces, logits = read.split([CELLS * SURFACE, CELLS * len(PALETTE)], dim=-1)
    truth, kinds = take_rows(surface, layout.predicted), take_rows(classes, layout.predicted)
    errors = F.smooth_l1_loss(surfaces, truth, reduction="none").mean(-1)  # (B, n)
    logits = logits.unflatten(-1, (len(PALETTE), CELLS)).movedim(-2, 1)  # (B, classes, n, P)
    errors = errors + F.cross_entropy(logits, kinds, reduction="none").mean(-1)
    images = torch.tensor([batch.images[n] for n in generated_frames(layout)], device=errors.device)
    return aligned(output, errors, layout, noisy_frames(seen) & images, weight)
