"""Cameras as images: rays as frames a model can be given or asked for (OneDiffusion, arXiv 2411.16318), and back.

Cameras are camera-to-world matrices (V, 4, 4) with OpenCV's axes: x right, y down, z forward. Rays are told relative
to the first camera, in its own frame turned so that x is left, y is up and z is forward: the first camera is always
the identity, and any rigid motion or turn of the world's axes changes nothing. A focal length is in widths of the
(square) image: `1 / (2 * tan(field_of_view / 2))`. Lengths are in the units of the positions.

V views, n rays per row and column of a view. Everything is computed in float64 and returned as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

RAY_SCALE = 1.658
"""What rays are multiplied by as latents; a constant of OneDiffusion, not an autoencoder's factor."""
RAY_CHANNELS = 16
"""Channels of a ray frame: the six numbers twice, and the first four of them again."""
MEETING_DISTANCE = 1.7
"""Distance from the first camera to where the optical axes meet, in OneDiffusion's training."""
FOCAL_LENGTH = 1.3887
"""Focal length that OneDiffusion assumes, in image widths: a field of view of 39.6 degrees."""

_TURN = (-1.0, -1.0, 1.0)  # OpenCV's axes to x left, y up, z forward, and back


class Cameras(NamedTuple):
    """Cameras told by rays, relative to the first one's frame in OpenCV's axes."""

    rotation: torch.Tensor
    """(V, 3, 3): camera's directions to the first camera's."""
    centre: torch.Tensor
    """(V, 3): where the camera is, in the first camera's coordinates."""

    @property
    def camera_to_world(self) -> torch.Tensor:
        """(V, 4, 4)."""
        matrices = torch.eye(4).to(self.rotation).repeat(len(self.rotation), 1, 1)
        matrices[:, :3, :3], matrices[:, :3, 3] = self.rotation, self.centre
        return matrices


def orbit_cameras(
    azimuths: Sequence[float], elevations: Sequence[float], distances: float | Sequence[float] = 1.5
) -> torch.Tensor:
    """Cameras on spheres around the origin that look at it, (V, 4, 4); z is up.

    Args:
        azimuths, elevations: degrees; at 0 and 0 the camera stands on the x axis. At an elevation of 90 or -90, where
            "up" has no direction in the image, y takes its place.
        distances: from the origin; one for all, or one each.
    """
    radii = [float(distances)] * len(azimuths) if isinstance(distances, int | float) else list(distances)
    if not len(azimuths) == len(elevations) == len(radii):
        raise ValueError(
            f"got {len(azimuths)} azimuths, {len(elevations)} elevations and {len(radii)} distances; give one of each "
            "per camera"
        )
    azimuth, elevation = (torch.tensor(list(x), dtype=torch.float64).deg2rad() for x in (azimuths, elevations))
    away = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand_as(away)
    right = torch.linalg.cross(up, away)
    upright = right.norm(dim=-1, keepdim=True) < 1e-6
    right = torch.where(upright, torch.linalg.cross(up.roll(-1, dims=-1), away), right)
    right = torch.nn.functional.normalize(right, dim=-1)
    matrices = torch.eye(4, dtype=torch.float64).repeat(len(away), 1, 1)
    matrices[:, :3, :3] = torch.stack([right, -torch.linalg.cross(away, right), -away], dim=-1)
    matrices[:, :3, 3] = away * torch.tensor(radii, dtype=torch.float64)[:, None]
    return matrices.float()


def opencv_cameras(opengl: torch.Tensor) -> torch.Tensor:
    """Camera-to-world matrices (V, 4, 4) with OpenGL's axes (x right, y up, z backward, as NeRF's transforms.json) to
    ours."""
    return opengl * opengl.new_tensor([1.0, -1.0, -1.0, 1.0])


def scale_positions(camera_to_world: torch.Tensor, distance: float = MEETING_DISTANCE) -> torch.Tensor:
    """Cameras (V, 4, 4) moved away from or towards the first one, all by one factor, until the point nearest to all
    optical axes is `distance` away from it. Cameras that all stand in one place are returned as they are.

    Raises:
        ValueError: the axes are parallel, or meet in the first camera.
    """
    _check_cameras(camera_to_world)
    matrices = camera_to_world.double()
    first = matrices[0, :3, 3]
    axes, places = matrices[:, :3, 2], matrices[:, :3, 3] - first
    if not places.any():
        return camera_to_world
    away = torch.eye(3).to(axes) - axes[:, :, None] * axes[:, None, :]  # (V, 3, 3)
    if torch.linalg.cond(away.sum(0)) > 1e8:
        raise ValueError("the cameras' optical axes are parallel and meet nowhere; scale their positions yourself")
    meeting = torch.linalg.solve(away.sum(0), (away @ places[..., None]).sum(0)).norm()
    if meeting < 1e-6 * places.norm(dim=-1).max():
        raise ValueError("the cameras' optical axes meet in the first camera; scale their positions yourself")
    scaled = matrices.clone()
    scaled[:, :3, 3] = first + places * (distance / meeting)
    return scaled.to(camera_to_world.dtype)


def relative_rays(
    camera_to_world: torch.Tensor, size: int, focal_length: float | torch.Tensor = FOCAL_LENGTH
) -> torch.Tensor:
    """Rays through the middles of n x n cells, relative to the first camera.

    Args:
        camera_to_world: (V, 4, 4).
        size: n.
        focal_length: of all views, in image widths, the principal point in the middle; or intrinsics (3, 3) or
            (V, 3, 3) of an image of side 1, whose first corner is at (0, 0).

    Returns:
        (V, n, n, 6): unit direction, then moment origin x direction. x left, y up, z forward.
    """
    _check_cameras(camera_to_world)
    if size < 1:
        raise ValueError(f"a view needs at least one ray per row, got size={size}")
    matrices = camera_to_world.double()
    turn = matrices.new_tensor(_TURN)
    relative = torch.linalg.inv(matrices[:1]) @ matrices
    inside = _pixel_directions(size, focal_length, matrices)  # (V or 1, n, n, 3)
    directions = torch.einsum("vij,vrcj->vrci", relative[:, :3, :3], inside.expand(len(matrices), -1, -1, -1)) * turn
    directions = torch.nn.functional.normalize(directions, dim=-1)
    origins = (relative[:, :3, 3] * turn)[:, None, None].expand_as(directions)
    return torch.cat([directions, torch.linalg.cross(origins, directions)], dim=-1).float()


def ray_frames(rays: torch.Tensor) -> torch.Tensor:
    """Rays (V, n, n, 6) to latents (V, 16, n, n): the six numbers, again, and the first four, times `RAY_SCALE`."""
    if rays.ndim != 4 or rays.shape[-1] != 6:
        raise ValueError(f"rays must be (views, n, n, 6), got {tuple(rays.shape)}")
    return torch.cat([rays, rays, rays[..., :4]], dim=-1).movedim(-1, 1) * RAY_SCALE


def rays_of_frames(frames: torch.Tensor) -> torch.Tensor:
    """Latents (V, 16, n, n) to rays (V, n, n, 6): the mean of each number's repetitions."""
    if frames.ndim != 4 or frames.shape[1] != RAY_CHANNELS:
        raise ValueError(f"ray frames must be (views, {RAY_CHANNELS}, n, n), got {tuple(frames.shape)}")
    channels = frames.movedim(1, -1) / RAY_SCALE
    twice = channels[..., :6] + channels[..., 6:12]
    return torch.cat([(twice[..., :4] + channels[..., 12:]) / 3, twice[..., 4:] / 2], dim=-1)


def cameras_of_rays(rays: torch.Tensor, focal_length: float | torch.Tensor = FOCAL_LENGTH) -> Cameras:
    """Cameras whose rays are nearest to the given ones, which may be noisy and of any length.

    The centre is the point nearest to all of a view's rays; the rotation turns the directions of the pixels into those
    of the rays (Ray Diffusion, arXiv 2402.14817, section 3.1).

    Args:
        rays: (V, n, n, 6), as `relative_rays` gives them.
        focal_length: as there.
    """
    if rays.ndim != 4 or rays.shape[-1] != 6:
        raise ValueError(f"rays must be (views, n, n, 6), got {tuple(rays.shape)}")
    rays = rays.double()
    turn = rays.new_tensor(_TURN)
    directions = torch.nn.functional.normalize(rays[..., :3], dim=-1)
    inside = torch.nn.functional.normalize(_pixel_directions(rays.shape[1], focal_length, rays), dim=-1)
    directions, moments = directions.flatten(1, 2), rays[..., 3:].flatten(1, 2)  # (V, R, 3)
    away = torch.eye(3).to(rays) - directions[..., :, None] * directions[..., None, :]  # (V, R, 3, 3)
    nearest = torch.linalg.cross(directions, moments)  # the ray's point nearest to the first camera
    centres = torch.linalg.solve(away.sum(1), (away @ nearest[..., None]).sum(1)).squeeze(-1)
    pixels = (inside * turn).flatten(1, 2).expand_as(directions)
    u, _, vh = torch.linalg.svd(directions.mT @ pixels)
    mirrored = torch.linalg.det(u @ vh)
    u = torch.cat([u[..., :2], u[..., 2:] * mirrored[:, None, None]], dim=-1)
    rotation = turn[:, None] * (u @ vh) * turn
    return Cameras(rotation.float(), (centres * turn).float())


def rotation_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angle in degrees (…) between rotations (…, 3, 3); the upper left of camera matrices will do."""
    difference = (a.double()[..., :3, :3].mT @ b.double()[..., :3, :3]) - torch.eye(3).to(a.device, torch.float64)
    # By the chord: the arc cosine of the trace cannot tell angles below about 0.02 degrees from 0 in float32.
    chord = difference.flatten(-2).norm(dim=-1) / (2 * 2**0.5)
    return (2 * chord.clamp(max=1).asin()).rad2deg()


def _check_cameras(matrices: torch.Tensor) -> None:
    if matrices.ndim != 3 or tuple(matrices.shape[1:]) != (4, 4) or len(matrices) == 0:
        raise ValueError(f"cameras are camera-to-world matrices (views, 4, 4), got {tuple(matrices.shape)}")


def _pixel_directions(size: int, focal_length: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(1 or V, n, n, 3) directions with z = 1 in OpenCV's axes."""
    if isinstance(focal_length, torch.Tensor):
        intrinsics = focal_length.to(like).reshape(-1, 3, 3)
    else:
        intrinsics = like.new_tensor([[focal_length, 0.0, 0.5], [0.0, focal_length, 0.5], [0.0, 0.0, 1.0]])[None]
    middles = (torch.arange(size).to(like) + 0.5) / size
    rows, columns = torch.meshgrid(middles, middles, indexing="ij")
    points = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1)  # (n, n, 3)
    return torch.einsum("vij,rcj->vrci", torch.linalg.inv(intrinsics), points)
