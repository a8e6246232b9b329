"""How geometry becomes an image: colours, backgrounds and styles.

Nothing here looks at the shapes: every style reads the same buffers, so a scene can be drawn again in any style,
colour or background for a fraction of what its geometry cost.

B scenes, H = W samples per side (pixels times `oversample`), S pixels per side. Colours are sRGB in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from imgdit.scenes.geometry import FAR, LIGHT, GeometryBuffers, camera_to_world, edges
from imgdit.scenes.world import BACKGROUNDS, STYLES, Scene

COLOUR_VALUES = {
    "red": (0.84, 0.11, 0.12),
    "orange": (0.98, 0.50, 0.08),
    "yellow": (0.98, 0.86, 0.14),
    "green": (0.16, 0.63, 0.24),
    "cyan": (0.14, 0.80, 0.82),
    "blue": (0.14, 0.28, 0.86),
    "purple": (0.52, 0.18, 0.74),
    "pink": (0.99, 0.53, 0.74),
}
"""The colours of `scenes.COLOURS`, as an evenly lit surface shows them."""
PAPER = (0.965, 0.955, 0.925)
PENCIL = (0.20, 0.20, 0.23)
SEPIA = ((0.15, 0.09, 0.05), (0.60, 0.44, 0.29), (0.97, 0.91, 0.78))
"""Shadows, middle tones and lights of the sepia print."""


@torch.no_grad()
def shade(buffers: GeometryBuffers, scenes: Sequence[Scene]) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] of geometry in the scenes' styles, colours and backgrounds.

    Args:
        buffers: of the same objects and cameras. With `oversample` 2 edges come out soft.
        scenes: B of them.
    """
    if len(scenes) != buffers.depth.shape[0]:
        raise ValueError(f"got {len(scenes)} scenes for the geometry of {buffers.depth.shape[0]}; give one for each")
    height, width = (side // buffers.oversample for side in buffers.depth.shape[-2:])
    images = buffers.depth.new_empty(len(scenes), 3, height, width)
    for row, scene in enumerate(scenes):
        images[row : row + 1] = _DRAW[scene.style](_Canvas(buffers.one(row), scene))
    return images.clamp(0, 1)


class _Canvas:
    """What the styles of one scene share, at the samples."""

    def __init__(self, buffers: GeometryBuffers, scene: Scene):
        self.buffers = buffers
        self.oversample = buffers.oversample
        self.height, self.width = (side // buffers.oversample for side in buffers.depth.shape[-2:])
        self.size = min(self.height, self.width)  # what lengths are relative to
        self.object = buffers.indices[:, None] > 0  # (1, 1, H, W)
        colours = [(0.0, 0.0, 0.0), *(COLOUR_VALUES[thing.colour] for thing in scene.objects)]
        self.albedo = buffers.depth.new_tensor(colours).T[:, buffers.indices[0]][None]  # (1, 3, H, W)
        self.backdrop = _BACKDROPS[scene.background](buffers)  # (1, 3, H, W)
        light = F.normalize(buffers.depth.new_tensor(LIGHT), dim=0)
        eye = camera_to_world([scene.camera])[0, :3, 3].to(light)
        view = _unit(eye.view(1, 3, 1, 1) - buffers.positions)
        self.facing = (buffers.normals * view).sum(1, keepdim=True).clamp(0, 1)
        self.lit = _dot(buffers.normals, light).clamp(min=0) * (1 - buffers.shadow)  # (1, 1, H, W)
        gloss = (buffers.normals * _unit(view + light.view(1, 3, 1, 1))).sum(1, keepdim=True).clamp(min=0)
        for _ in range(5):  # to the 32nd power; `pow` costs as much as everything else here
            gloss = gloss * gloss
        self.gloss = gloss * (1 - buffers.shadow)

    def photo(self) -> torch.Tensor:
        """(1, 3, H, W): matt colour under a soft sky and one lamp, a small highlight, a soft shadow."""
        sky = 0.5 + 0.5 * self.buffers.normals[:, 2:]
        thing = self.albedo * (0.32 + 0.24 * sky + 0.60 * self.lit) + 0.27 * self.gloss
        return torch.where(self.object, thing, self.backdrop * (1 - 0.55 * self.buffers.shadow))

    def outline(self, width: float) -> torch.Tensor:
        """(1, 1, H, W) in {0, 1}: the edges, about `width` 128ths of the image thick."""
        radius = max(0, round((width * self.size / 128 * self.oversample - 1) / 2))
        return _spread(edges(self.buffers).float(), radius)

    def soften(self, image: torch.Tensor) -> torch.Tensor:
        """Samples (1, C, H, W) to pixels: each pixel's centre and, by half, its neighbours."""
        if self.oversample == 1:
            return image
        for dim in (2, 3):
            before = torch.cat([image.narrow(dim, 0, 1), image], dim)
            halves = before.narrow(dim, 0, image.shape[dim]) + image  # sums of neighbours
            n = self.height if dim == 2 else self.width
            centre = torch.arange(n, device=image.device) * 2
            image = (halves.index_select(dim, centre) + halves.index_select(dim, centre + 1)) / 4
        return image

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (H, 1) and columns (1, H) of the samples, in 128ths of the image."""
        rows, columns = (
            torch.arange(side * self.oversample, device=self.object.device) * (128 / self.size) / self.oversample
            for side in (self.height, self.width)
        )
        return rows[:, None], columns[None, :]

    def grain(self, seed: int) -> torch.Tensor:
        """Noise (H, W) of the pixels."""
        return _grain(max(self.height, self.width), seed)[: self.height, : self.width]


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors * (vectors * vectors).sum(1, keepdim=True).rsqrt()


def _dot(vectors: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return (vectors * direction.view(1, 3, 1, 1)).sum(1, keepdim=True)


def _mix(a: torch.Tensor, b: torch.Tensor, fraction: torch.Tensor | float) -> torch.Tensor:
    return a + (b - a) * fraction


def _smooth(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """0 below `low`, 1 above `high`, a smooth step between."""
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _spread(image: torch.Tensor, radius: int) -> torch.Tensor:
    """Largest value within a square; rows and columns apart, which costs a third of it in one."""
    width = 2 * radius + 1
    rows = F.max_pool2d(image, (width, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(rows, (1, width), stride=1, padding=(0, radius))


@lru_cache(maxsize=8)
def _grain(side: int, seed: int) -> torch.Tensor:
    """(side, side) in [-1, 1]: the same noise in every image."""
    return torch.rand(side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (1, C, S, S), `sigma` in pixels."""
    radius = max(1, round(2.5 * sigma))
    steps = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, -1)
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, :, None], groups=image.shape[1])
    return F.conv2d(rows, kernel[:, :, None, :], groups=image.shape[1])


# Backgrounds: a floor that fades into the distance, and what is above the horizon


def _scenery(
    buffers: GeometryBuffers,
    floor: torch.Tensor | tuple[float, ...],
    horizon: tuple[float, ...],
    top: tuple[float, ...],
    fade: float = 5.0,
) -> torch.Tensor:
    """(1, 3, H, W): a floor, given evenly or per sample, that turns into `horizon` from z-depth `fade` on; above it a
    gradient up to `top`."""

    def paint(colour: torch.Tensor | tuple[float, ...]) -> torch.Tensor:
        return colour if isinstance(colour, torch.Tensor) else buffers.depth.new_tensor(colour).view(1, 3, 1, 1)

    height = (buffers.positions[:, 2:] / 2.6).clamp(0, 1)
    above = _mix(paint(horizon), paint(top), height)
    below = _mix(paint(floor), paint(horizon), _smooth(buffers.depth, fade, FAR))
    return torch.where(buffers.depth < FAR, below, above)


def _studio(buffers: GeometryBuffers) -> torch.Tensor:
    return _scenery(buffers, (0.80, 0.80, 0.81), (0.88, 0.88, 0.89), (0.62, 0.63, 0.66))


def _sky(buffers: GeometryBuffers) -> torch.Tensor:
    return _scenery(buffers, (0.85, 0.80, 0.68), (0.86, 0.94, 1.0), (0.28, 0.58, 0.95), fade=7.5)


def _checkerboard(buffers: GeometryBuffers) -> torch.Tensor:
    x, y = buffers.positions[:, :1] / 0.8, buffers.positions[:, 1:2] / 0.8
    # Where a tile is about as small as a pixel the pattern would only flicker: there it turns to its mean.
    clear = 1 - _smooth(buffers.depth, 5.0, 8.5)
    tiles = ((x.floor() + y.floor()) % 2 * 2 - 1) * clear  # -1 or 1
    return _scenery(buffers, (0.62 + 0.30 * tiles).expand(-1, 3, -1, -1), (0.74, 0.78, 0.84), (0.52, 0.60, 0.72), 7.5)


def _sunset(buffers: GeometryBuffers) -> torch.Tensor:
    return _scenery(buffers, (0.46, 0.31, 0.36), (1.0, 0.66, 0.30), (0.45, 0.20, 0.45), fade=6.0)


def _night(buffers: GeometryBuffers) -> torch.Tensor:
    scenery = _scenery(buffers, (0.15, 0.18, 0.29), (0.17, 0.20, 0.38), (0.03, 0.04, 0.13))
    # Stars keep their direction when the camera turns.
    x, y, z = buffers.positions.unbind(1)
    across, up = torch.atan2(x, y) * 14, z * 4
    column, row = across.floor(), up.floor()
    chance = _grain(64, 3).to(scenery)
    cell = chance[row.long() % 64, column.long() % 64]  # which star, if any, and where in its cell it stands
    off = torch.hypot(
        across - column - 0.5 - 0.35 * torch.sin(90 * cell), up - row - 0.5 - 0.35 * torch.cos(70 * cell)
    )
    star = (1 - off / 0.24).clamp(0, 1) * (cell > 0.45) * (buffers.depth[:, 0] >= FAR)
    return scenery + star[:, None] * (0.95 - scenery)


def _wood(buffers: GeometryBuffers) -> torch.Tensor:
    x, y = buffers.positions[:, :1], buffers.positions[:, 1:2]
    plank = x / 0.55
    tone = _grain(64, 4).to(x)[plank.floor().long() % 64, 0]
    vein = torch.sin(plank * 19 + 2.0 * torch.sin(y * 1.7 + tone * 9))
    seam = 1 - _smooth((plank - plank.round()).abs(), 0.02, 0.06)
    clear = 1 - _smooth(buffers.depth, 5.0, 8.5)
    tint = 1 + clear * (0.14 * tone + 0.04 * vein - 0.45 * seam)
    floor = tint * buffers.depth.new_tensor((0.64, 0.43, 0.26)).view(1, 3, 1, 1)
    return _scenery(buffers, floor, (0.93, 0.88, 0.76), (0.86, 0.80, 0.68), fade=8.0)


_BACKDROPS: dict[str, Callable[[GeometryBuffers], torch.Tensor]] = {
    "studio": _studio,
    "sky": _sky,
    "checkerboard": _checkerboard,
    "sunset": _sunset,
    "night": _night,
    "wood": _wood,
}
assert tuple(_BACKDROPS) == BACKGROUNDS


# Styles


def _photo(canvas: _Canvas) -> torch.Tensor:
    return canvas.soften(canvas.photo())


def _cartoon(canvas: _Canvas) -> torch.Tensor:
    """Three flat tones, a dark outline, a shadow with a hard rim."""
    tone = 0.66 + 0.30 * (canvas.lit > 0.22) + 0.16 * (canvas.lit > 0.72)
    thing = _mix(canvas.albedo * tone, torch.ones_like(tone), 0.4 * (canvas.gloss > 0.55))
    bright = canvas.backdrop.mean(1, keepdim=True)
    flat = canvas.backdrop * ((bright * 6).round() / 6 / bright)
    ground = flat * (1 - 0.38 * (canvas.buffers.shadow > 0.5))
    image = torch.where(canvas.object, thing, ground)
    return canvas.soften(image * (1 - 0.94 * canvas.outline(2.2)))


def _sketch(canvas: _Canvas) -> torch.Tensor:
    """Pencil hatching on paper, two directions where it is dark, over a thin wash of the object's colour."""
    rows, columns = canvas.grid()
    paper = canvas.albedo.new_tensor(PAPER).view(1, 3, 1, 1)
    wash = _mix(paper, canvas.albedo, 0.62)
    ground = _mix(paper, canvas.backdrop, 0.30)
    image = torch.where(canvas.object, wash, ground)
    backdrop = canvas.backdrop.mean(1, keepdim=True)
    dark = torch.where(canvas.object, 1 - canvas.lit, 0.75 * canvas.buffers.shadow + 0.42 * (1 - backdrop))
    side = max(canvas.height, canvas.width) * canvas.oversample
    wobble = F.interpolate(_grain(7, 1)[None, None].to(paper), size=(side, side), mode="bicubic")
    wobble = wobble[..., : canvas.height * canvas.oversample, : canvas.width * canvas.oversample]
    for slope, threshold, offset in ((1.0, 0.30, 0.0), (-0.75, 0.72, 1.7)):
        across = (rows + slope * columns) / 4.6 + 0.35 * wobble + offset
        line = 1 - _smooth((across - across.round()).abs(), 0.10, 0.28)
        strength = _smooth(dark, threshold, threshold + 0.35) * (0.62 + 0.25 * wobble)
        image = _mix(image, paper.new_tensor(PENCIL).view(1, 3, 1, 1), (line * strength).clamp(0, 1))
    image = _mix(image, paper.new_tensor(PENCIL).view(1, 3, 1, 1), 0.9 * canvas.outline(1.2))
    return canvas.soften(image) + 0.02 * canvas.grain(2).to(paper)


def _neon(canvas: _Canvas) -> torch.Tensor:
    """Tubes of the object's colour along its edges, glowing on dark."""
    # A dark colour would glow grey: every tube is as bright as its strongest channel allows.
    glow = canvas.albedo / canvas.albedo.amax(1, keepdim=True).clamp(min=1e-3)
    # An edge is as thick outside the object as inside, where there is no colour yet.
    spread = _spread(glow * canvas.object, canvas.oversample)
    tube = canvas.outline(1.6)
    body = torch.where(canvas.object, glow * (0.10 + 0.30 * (1 - canvas.facing) ** 2 + 0.10 * canvas.lit), 0.0)
    ground = torch.where(canvas.object, 0.0, 0.32 * canvas.backdrop**1.5 * (1 - 0.4 * canvas.buffers.shadow) + 0.02)
    line = canvas.soften(tube * spread)
    halo = 1.0 * _blur(line, 1.6 * canvas.size / 128) + 1.5 * _blur(line, 5.0 * canvas.size / 128)
    core = canvas.soften(tube)
    image = canvas.soften(body + ground) + halo
    return _mix(image, _mix(line, torch.ones_like(line), 0.35), core)


def _mosaic(canvas: _Canvas) -> torch.Tensor:
    """Square tiles of one colour each, a 32nd of the image wide, with joints between."""
    image = canvas.soften(canvas.photo())
    tile = max(2, canvas.size // 32)
    flat = F.avg_pool2d(image, tile, ceil_mode=True)
    across, along = flat.shape[-2:]
    mean = flat.mean(1, keepdim=True)
    flat = 1.08 * (mean + 1.15 * (flat - mean)) * (1 + 0.10 * _grain(64, 5).to(flat)[:across, :along])
    tiles = flat.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[:, :, : canvas.height, : canvas.width]
    rows, columns = (torch.arange(n, device=flat.device) % tile == 0 for n in (canvas.height, canvas.width))
    joint = (rows[:, None] | columns[None, :]).to(flat)
    return _mix(tiles, 0.68 * tiles + 0.06, joint)


def _sepia(canvas: _Canvas) -> torch.Tensor:
    """A brown print whose object was coloured by hand, or else nobody could tell its colour."""
    image = canvas.soften(canvas.photo())
    weights = image.new_tensor((0.30, 0.59, 0.11)).view(1, 3, 1, 1)
    grey = (image * weights).sum(1, keepdim=True)
    dark, middle, light = image.new_tensor(SEPIA).view(3, 1, 3, 1, 1)
    tone = torch.where(grey < 0.5, _mix(dark, middle, 2 * grey), _mix(middle, light, 2 * grey - 1))
    tint = canvas.soften(canvas.object.float())
    toned = _mix(tone, image, 0.66 * tint)
    rows, columns = ((torch.arange(n, device=image.device) + 0.5) / n * 2 - 1 for n in (canvas.height, canvas.width))
    corner = (rows[:, None] ** 2 + columns[None, :] ** 2) / 2
    return toned * (1 - 0.45 * corner**2) + 0.025 * canvas.grain(6).to(image)


_DRAW: dict[str, Callable[[_Canvas], torch.Tensor]] = {
    "photo": _photo,
    "cartoon": _cartoon,
    "sketch": _sketch,
    "neon": _neon,
    "mosaic": _mosaic,
    "sepia": _sepia,
}
assert tuple(_DRAW) == STYLES
