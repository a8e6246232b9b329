"""Scenes to images with everything that is true of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from imgdit.scenes.geometry import (
    FAR,
    GeometryBuffers,
    Size,
    back_project,
    camera_to_world,
    edges,
    geometry,
    intrinsics,
    project,
)
from imgdit.scenes.shading import shade
from imgdit.scenes.world import Scene

__all__ = [
    "FAR",
    "GeometryBuffers",
    "Rendering",
    "back_project",
    "boxes",
    "camera_to_world",
    "edges",
    "geometry",
    "intrinsics",
    "project",
    "render",
    "rendering",
    "shade",
]


class Rendering(NamedTuple):
    """Images of B scenes, H rows and W columns, and their ground truth, which is exact at the pixels' centres."""

    rgb: torch.Tensor
    """(B, 3, H, W) sRGB in [0, 1], edges softened."""
    depth: torch.Tensor
    """(B, 1, H, W) z-depth in world units, at most `FAR`."""
    normals: torch.Tensor
    """(B, 3, H, W) unit normals in world coordinates."""
    indices: torch.Tensor
    """(B, H, W) int64: 0 ground and beyond, 1 the scene's first object, 2 its second."""
    edges: torch.Tensor
    """(B, 1, H, W) boolean, one pixel thick."""
    boxes: torch.Tensor
    """(B, 2, 4) left, top, right, bottom in pixels, right and bottom outside; zeros where no such object is seen."""
    pose: torch.Tensor
    """(B, 4, 4) camera to world; OpenCV's camera: x right, y down, z forward."""
    intrinsics: torch.Tensor
    """(3, 3) in pixels; the middle of the first pixel is at (0.5, 0.5)."""

    def one(self, row: int) -> Rendering:
        """One of the scenes, as a batch of 1."""
        chosen = slice(row, row + 1)
        return Rendering(
            self.rgb[chosen],
            self.depth[chosen],
            self.normals[chosen],
            self.indices[chosen],
            self.edges[chosen],
            self.boxes[chosen],
            self.pose[chosen],
            self.intrinsics,
        )


def boxes(indices: torch.Tensor) -> torch.Tensor:
    """Index map (B, H, W) to boxes (B, 2, 4): left, top, right, bottom of what is visible of each object."""
    found = torch.stack([indices == 1, indices == 2], dim=1)  # (B, 2, H, W)

    def extent(present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = present.shape[-1]
        steps = torch.arange(size, device=indices.device)
        return torch.where(present, steps, size).amin(-1), torch.where(present, steps + 1, 0).amax(-1)

    left, right = extent(found.any(2))
    top, bottom = extent(found.any(3))
    corners = torch.stack([left, top, right, bottom], dim=-1).float()
    return corners * found.flatten(2).any(-1)[..., None]


@torch.no_grad()
def render(scenes: Sequence[Scene], size: Size = 128, device: torch.device | str = "cpu") -> Rendering:
    """Images of scenes and their ground truth.

    Args:
        scenes: B of them.
        size: pixels per side, or rows and columns, at least 8.
        device: where to compute, and where the result stays.
    """
    return rendering(geometry(scenes, size, device, oversample=2), scenes)


@torch.no_grad()
def rendering(buffers: GeometryBuffers, scenes: Sequence[Scene]) -> Rendering:
    """The images and ground truth of scenes whose geometry is known already.

    Args:
        buffers: of `geometry`, with `oversample` 2 for soft edges.
        scenes: B of them.
    """
    pixels = buffers.at_pixels()
    size, device = (pixels.depth.shape[-2], pixels.depth.shape[-1]), pixels.depth.device
    return Rendering(
        rgb=shade(buffers, scenes),
        depth=pixels.depth,
        normals=pixels.normals,
        indices=pixels.indices,
        edges=edges(pixels),
        boxes=boxes(pixels.indices),
        pose=camera_to_world([scene.camera for scene in scenes]).to(device),
        intrinsics=intrinsics(size).to(device),
    )
