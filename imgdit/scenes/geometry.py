"""What a camera sees of a scene: depth, normals, shadows, and which object is where.

Solids are signed distances; a ray steps by the distance until it touches (sphere tracing). Only rays that meet a
solid's bounding sphere are followed, rays that are done leave the batch, and all solids of a kind march together. The
ground is a plane and needs no marching.

B scenes, H rows, W columns, N rays. Points of N rays are (3, N), coordinates first, because each coordinate is used by
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from imgdit.scenes.world import FIELD_OF_VIEW, SOLIDS, Camera, Scene

FAR = 9.0
"""z-depth of what is beyond the ground: nothing is farther."""
LIGHT = (-0.5, -0.55, 0.72)
"""World direction towards the light, left of, behind and above a camera at azimuth 0; not normalised."""
STEPS = 48
"""Longest march of a ray."""
TOUCH = 2e-4
"""Distance to a solid of size 1 at which a ray has arrived."""
PENUMBRA = 7.0
"""Sharpness of shadows: the inverse of the light's apparent radius."""


Size = int | tuple[int, int]
"""Pixels per side of a square image, or rows and columns; the field of view is that of the shorter side."""


def sides(size: Size) -> tuple[int, int]:
    """Rows and columns."""
    return (size, size) if isinstance(size, int) else size


class GeometryBuffers(NamedTuple):
    """What is seen at each sample. With `oversample` 1 the samples are the pixels' centres; with 2 every second row
    and column, from the first, are pixels' centres and the others lie half-way to the next."""

    depth: torch.Tensor
    """(B, 1, H, W) z-depth: the world length along the camera's forward axis, not along the ray; at most `FAR`."""
    normals: torch.Tensor
    """(B, 3, H, W) unit normals of the surface in world coordinates; beyond the ground, the camera's backward axis."""
    indices: torch.Tensor
    """(B, H, W) int64: 0 ground and beyond, 1 the scene's first object, 2 its second."""
    shadow: torch.Tensor
    """(B, 1, H, W) fraction of the light that another surface holds back, in [0, 1]: 0 lit, 1 dark."""
    positions: torch.Tensor
    """(B, 3, H, W) world coordinates of what is seen."""
    oversample: int
    """Samples per pixel and side."""

    def at_pixels(self) -> GeometryBuffers:
        """The samples at the pixels' centres alone."""
        n = self.oversample
        return self._each(lambda x: x[..., ::n, ::n], 1)

    def one(self, row: int) -> GeometryBuffers:
        """One of the scenes, as a batch of 1."""
        return self._each(lambda x: x[row : row + 1], self.oversample)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor], oversample: int) -> GeometryBuffers:
        return GeometryBuffers(
            change(self.depth),
            change(self.normals),
            change(self.indices),
            change(self.shadow),
            change(self.positions),
            oversample,
        )


def edges(buffers: GeometryBuffers) -> torch.Tensor:
    """(B, 1, H, W) boolean: samples whose right or lower neighbour shows another object, a face turned by more than
    about 35°, or the same object behind itself. The ground has no edges but where an object stands before it."""
    index = buffers.indices[:, None]
    found = torch.zeros_like(index, dtype=torch.bool)
    # A surface seen at less than about 11° changes as much in depth as one that ends: five widths of a sample.
    jump = 5 * 2 * math.tan(math.radians(FIELD_OF_VIEW / 2)) / min(index.shape[-2:]) * buffers.depth
    for dim in (2, 3):
        (here, there), (normal, next_normal) = _neighbours(index, dim), _neighbours(buffers.normals, dim)
        (depth, next_depth), (limit, _) = _neighbours(buffers.depth, dim), _neighbours(jump, dim)
        turned = (normal * next_normal).sum(1, keepdim=True) < 0.82
        behind = (depth - next_depth).abs() > limit
        found.narrow(dim, 0, here.shape[dim]).logical_or_((here != there) | ((here > 0) & (turned | behind)))
    return found


def _neighbours(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = x.shape[dim] - 1
    return x.narrow(dim, 0, n), x.narrow(dim, 1, n)


# Cameras as tensors


def camera_to_world(cameras: Sequence[Camera]) -> torch.Tensor:
    """(B, 4, 4) float32: camera coordinates to world. OpenCV's camera: x right, y down, z forward."""
    matrices = torch.zeros(len(cameras), 4, 4, dtype=torch.float64)
    for matrix, camera in zip(matrices, cameras):
        matrix[:3, :3] = torch.tensor(camera.axes, dtype=torch.float64).T
        matrix[:3, 3] = torch.tensor(camera.position, dtype=torch.float64)
    matrices[:, 3, 3] = 1.0
    return matrices.float()


def intrinsics(size: Size) -> torch.Tensor:
    """(3, 3) float32 in pixels. The middle of the first pixel is at (0.5, 0.5), so the principal point is size / 2."""
    rows, columns = sides(size)
    focal = min(rows, columns) / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
    return torch.tensor([[focal, 0.0, columns / 2], [0.0, focal, rows / 2], [0.0, 0.0, 1.0]])


def back_project(depth: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """z-depth (B, 1, H, W) at pixels' centres and poses (B, 4, 4) to world positions (B, 3, H, W)."""
    rays = _camera_rays((depth.shape[-2], depth.shape[-1]), 1, depth.device)
    points = rays[None] * depth.flatten(1)[:, None]  # (B, 3, H*W)
    world = pose[:, :3, :3] @ points + pose[:, :3, 3:]
    return world.unflatten(2, depth.shape[-2:])


def project(points: torch.Tensor, pose: torch.Tensor, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """World points (B, 3, N) to pixel coordinates (B, 2, N), column then row, and z-depth (B, N)."""
    inside = pose[:, :3, :3].mT @ (points - pose[:, :3, 3:])
    pixels = intrinsics(size).to(points) @ inside
    return pixels[:, :2] / pixels[:, 2:], inside[:, 2]


def _camera_rays(size: Size, oversample: int, device: torch.device | str) -> torch.Tensor:
    """(3, N) directions in camera coordinates with z = 1, one per sample in reading order."""
    shorter = min(sides(size))
    down, across = (
        (torch.arange(side * oversample, device=device, dtype=torch.float32) / oversample + 0.5 - side / 2)
        * (2 * math.tan(math.radians(FIELD_OF_VIEW / 2)) / shorter)
        for side in sides(size)
    )
    rows, columns = torch.meshgrid(down, across, indexing="ij")
    return torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1)


# Solids of size 1 around their centre: signed distances of points (3, N), none larger than the true distance


def _length(p: torch.Tensor) -> torch.Tensor:
    # `norm` over a leading dimension of three takes twenty times as long.
    return (p[0] * p[0] + p[1] * p[1] + p[2] * p[2]).sqrt()


def _sphere(p: torch.Tensor) -> torch.Tensor:
    return _length(p) - 1.0


def _cube(p: torch.Tensor) -> torch.Tensor:
    q = p.abs() - 0.78
    return _length(q.clamp(min=0)) + torch.maximum(q[0], torch.maximum(q[1], q[2])).clamp(max=0)


def _cylinder(p: torch.Tensor) -> torch.Tensor:
    side, top = torch.hypot(p[0], p[1]) - 0.78, p[2].abs() - 0.88
    return torch.hypot(side.clamp(min=0), top.clamp(min=0)) + torch.maximum(side, top).clamp(max=0)


def _cone(p: torch.Tensor) -> torch.Tensor:
    # The mantle's straight line from the rim (1.04, -1.04) to the tip (0, 1.04), and the base. Beyond the rim or the
    # tip this is shorter than the distance, never longer.
    mantle = (torch.hypot(p[0], p[1]) * 2 + (p[2] - 1.04)) / math.sqrt(5)
    return torch.maximum(mantle, -p[2] - 1.04)


def _torus(p: torch.Tensor) -> torch.Tensor:
    # Upright: its axis is y, so that its hole faces whoever stands before it.
    return torch.hypot(torch.hypot(p[0], p[2]) - 0.79, p[1]) - 0.35


def _capsule(p: torch.Tensor) -> torch.Tensor:
    beyond = p[2] - p[2].clamp(-0.5, 0.5)
    return (p[0] * p[0] + p[1] * p[1] + beyond * beyond).sqrt() - 0.68


def _octahedron(p: torch.Tensor) -> torch.Tensor:
    return (p.abs().sum(dim=0) - 1.28) * 0.57735027


def _pyramid(p: torch.Tensor) -> torch.Tensor:
    # Four sides from a square of half-width 0.95 at -0.85 to the tip at 0.85, and the base.
    slant = math.hypot(0.95, 1.7)
    sides = (torch.maximum(p[0].abs(), p[1].abs()) * 1.7 + (p[2] - 0.85) * 0.95) / slant
    return torch.maximum(sides, -p[2] - 0.85)


DISTANCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "capsule": _capsule,
    "octahedron": _octahedron,
    "pyramid": _pyramid,
}


class _Placed(NamedTuple):
    """All solids of one kind in the batch; a solid is one row of each tensor."""

    kind: str
    scene: torch.Tensor
    """(O,) int64: row of the scene."""
    number: torch.Tensor
    """(O,) int64: 1 or 2."""
    centre: torch.Tensor
    """(O, 3) world coordinates."""
    size: torch.Tensor
    """(O,)"""
    turn: torch.Tensor
    """(O, 3, 3) world directions to the solid's own."""

    def local(self, points: torch.Tensor) -> torch.Tensor:
        """World points (O, 3, N) in the solids' own coordinates, in units of their size."""
        return self.turn @ (points - self.centre[:, :, None]) / self.size[:, None, None]


def _place(scenes: Sequence[Scene], device: torch.device | str) -> list[_Placed]:
    groups: dict[str, list[tuple[int, int]]] = {}
    for row, scene in enumerate(scenes):
        for number, thing in enumerate(scene.objects):
            groups.setdefault(thing.kind, []).append((row, number))
    placed = []
    for kind, members in groups.items():
        things = [scenes[row].objects[number] for row, number in members]
        yaw = torch.tensor([math.radians(thing.yaw) for thing in things], dtype=torch.float64)
        cos, sin, zero, one = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
        turn = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], dim=-1).view(-1, 3, 3)
        placed.append(
            _Placed(
                kind,
                scene=torch.tensor([row for row, _ in members], device=device),
                number=torch.tensor([number + 1 for _, number in members], device=device),
                centre=torch.tensor([thing.centre for thing in things], dtype=torch.float32, device=device),
                size=torch.tensor([thing.size for thing in things], dtype=torch.float32, device=device),
                turn=turn.float().to(device),
            )
        )
    return placed


def _meets(origin: torch.Tensor, ray: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rays (…, 3, N), of any length, enter and leave a sphere around 0, as factors (…, N) of the ray.

    Rays that miss leave before they enter.
    """
    square = (ray * ray).sum(-2)
    along = (origin * ray).sum(-2)
    root = along**2 - square * ((origin * origin).sum(-2) - radius**2)
    half = root.clamp(min=0).sqrt()
    enter, leave = (-along - half) / square, (-along + half) / square
    return enter, torch.where(root > 0, leave, enter - 1)


def _march(
    distance: Callable[[torch.Tensor], torch.Tensor],
    origin: torch.Tensor,
    ray: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
) -> torch.Tensor:
    """First touch along rays (3, N) from points (3, N): factors (N,) of the ray, infinite for a miss."""
    found = torch.full_like(start, math.inf)
    length = _length(ray)
    rows = torch.arange(len(start), device=start.device)
    at = start
    for step in range(STEPS):
        gap = distance(origin + at * ray)
        arrived = gap < TOUCH
        at = at + gap / length
        done = arrived | (at > stop)
        # Leaving the batch copies what stays, which pays from time to time only.
        if step % 4 == 3 or step == STEPS - 1:
            found[rows[arrived]] = at[arrived]
            stay = ~done
            if not stay.any():
                return found
            rows, at, stop, length = rows[stay], at[stay], stop[stay], length[stay]
            origin, ray = origin[:, stay], ray[:, stay]
    # A ray that grazes an edge comes closer and closer; what is left within a tenth of a pixel has touched.
    near = distance(origin + at * ray) < 10 * TOUCH
    found[rows[near]] = at[near]
    return found


def _normal(distance: Callable[[torch.Tensor], torch.Tensor], p: torch.Tensor) -> torch.Tensor:
    """Unit gradient (3, N) of a distance at points on its surface, from the corners of a tetrahedron around them."""
    total = torch.zeros_like(p)
    for corner in ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0)):
        k = p.new_tensor(corner)[:, None]
        total += k * distance(p + 5e-4 * k)
    return F.normalize(total, dim=0)


def _occlusion(
    distance: Callable[[torch.Tensor], torch.Tensor], origin: torch.Tensor, light: torch.Tensor, reach: float
) -> torch.Tensor:
    """Fraction (N,) of the light held back from points (3, N); all in a solid's own coordinates.

    The narrowest angle between the ray to the light and the solid, against the light's radius (Quilez, "Soft shadows
    in raymarched SDFs").
    """
    shadow = torch.zeros_like(origin[0])
    enter, leave = _meets(origin, light, reach * 1.25)
    rows = ((leave > enter) & (leave > 0)).nonzero()[:, 0]
    origin, light, at, leave = origin[:, rows], light[:, rows], enter[rows].clamp(min=0.01), leave[rows]
    open_fraction = torch.ones_like(at)
    for _ in range(14):
        gap = distance(origin + at * light)
        open_fraction = torch.minimum(open_fraction, torch.where(at < leave, PENUMBRA * gap / at, 1.0))
        at = at + gap.clamp(0.04, 0.4)
    open_fraction = open_fraction.clamp(-0.3, 1) * 0.5 + 0.5  # from within the rim, which widens the half-shadow
    shadow[rows] = 1 - ((open_fraction - 0.35) / 0.65).clamp(0, 1)
    return shadow


@torch.no_grad()
def geometry(
    scenes: Sequence[Scene], size: Size = 128, device: torch.device | str = "cpu", oversample: int = 1
) -> GeometryBuffers:
    """What the scenes' cameras see. Style, colours and background change nothing of it.

    Args:
        scenes: B of them.
        size: pixels per side, or rows and columns.
        device: where to compute.
        oversample: samples per pixel and side; 2 lets `shade` soften edges.
    """
    if not scenes:
        raise ValueError("no scenes to look at; give at least one")
    if min(sides(size)) < 8:
        raise ValueError(f"an image needs at least 8 pixels per side, got size={size}")
    if oversample not in (1, 2):
        raise ValueError(f"oversample must be 1 or 2, got {oversample}")
    # One scene's rays stay in the cache of a core. A GPU wants many, and 32 at 128 pixels take it about a gigabyte.
    many = 1 if torch.device(device).type == "cpu" else 32
    parts = [_geometry(scenes[i : i + many], size, device, oversample) for i in range(0, len(scenes), many)]
    return GeometryBuffers(
        torch.cat([part.depth for part in parts]),
        torch.cat([part.normals for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.shadow for part in parts]),
        torch.cat([part.positions for part in parts]),
        oversample,
    )


def _geometry(scenes: Sequence[Scene], size: Size, device: torch.device | str, oversample: int) -> GeometryBuffers:
    rows, columns = (side * oversample for side in sides(size))
    pose = camera_to_world([scene.camera for scene in scenes]).to(device)
    eye = pose[:, :3, 3]  # (B, 3)
    rays = pose[:, :3, :3] @ _camera_rays(size, oversample, device)  # (B, 3, N); factor of the ray = z-depth
    ground = -eye[:, 2, None] / rays[:, 2]
    depth = torch.where((ground > 0) & (ground < FAR), ground, FAR)  # (B, N)
    up = torch.zeros_like(rays)
    up[:, 2] = 1.0
    normals = torch.where((depth < FAR)[:, None], up, -pose[:, :3, 2, None].expand_as(rays))
    index = torch.zeros_like(depth, dtype=torch.long)
    placed = _place(scenes, device)

    for group in placed:
        distance = DISTANCES[group.kind]
        origin = group.local(eye[group.scene][:, :, None])  # (O, 3, 1)
        ray = group.turn @ rays[group.scene] / group.size[:, None, None]
        enter, leave = _meets(origin, ray, SOLIDS[group.kind].reach)
        solid, sample = (leave > enter).nonzero().unbind(1)
        start, stop = enter[solid, sample].clamp(min=0), leave[solid, sample]
        begin, along = origin[solid, :, 0].T.contiguous(), ray[solid, :, sample].T.contiguous()
        touch = _march(distance, begin, along, start, stop)
        row = group.scene[solid]
        seen = touch < depth[row, sample]
        solid, sample, row, touch = solid[seen], sample[seen], row[seen], touch[seen]
        normal = _normal(distance, begin[:, seen] + touch * along[:, seen])
        # Of two objects of one kind in a scene, the second may overwrite only what it hides.
        for number in (1, 2):
            mine = (group.number[solid] == number) & (touch < depth[row, sample])
            at = row[mine], sample[mine]
            depth[at] = touch[mine]
            index[at] = number
            normals[at[0], :, at[1]] = torch.einsum("nji,jn->ni", group.turn[solid[mine]], normal[:, mine])

    positions = eye[:, :, None] + depth[:, None] * rays
    shadow = _shadow(placed, positions, normals, depth, index)
    shape = (len(scenes), -1, rows, columns)
    return GeometryBuffers(
        depth.view(shape),
        normals.view(shape),
        index.view(len(scenes), rows, columns),
        shadow.view(shape),
        positions.view(shape),
        oversample,
    )


def _shadow(
    placed: list[_Placed],
    positions: torch.Tensor,
    normals: torch.Tensor,
    depth: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """Fraction (B, N) of the light held back: on the ground by every object, on an object by the other one.

    What an object hides from itself its normals tell.
    """
    light = F.normalize(positions.new_tensor(LIGHT), dim=0)
    shadow = torch.zeros_like(depth)
    for group in placed:
        distance, reach = DISTANCES[group.kind], SOLIDS[group.kind].reach
        towards = group.turn @ light  # (O, 3), of length 1 in units of the size
        other = index[group.scene] != group.number[:, None]
        solid, sample = (other & (depth[group.scene] < FAR)).nonzero().unbind(1)
        row = group.scene[solid]
        points = positions[row, :, sample] + 0.01 * normals[row, :, sample]  # (N, 3)
        own = torch.einsum("nij,nj->in", group.turn[solid], points - group.centre[solid]) / group.size[solid]
        occluded = _occlusion(distance, own, towards[solid].T.contiguous(), reach)
        shadow[row, sample] = torch.maximum(shadow[row, sample], occluded)
    return shadow
