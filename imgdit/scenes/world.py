"""What a scene is, and how one is drawn at random.

One or two coloured solids stand on a ground plane, seen by a pinhole camera, in one of six styles before one of six
backgrounds. A scene is plain data without torch or pixels; `imgdit.scenes.render` draws it,
`imgdit.scenes.captions` tells it.

World coordinates are right-handed, z up, the ground is z = 0. Lengths are in units of about one object's radius,
angles in degrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from random import Random
from typing import Any, NamedTuple

from imgdit.naming import check_name

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
STYLES = ("photo", "cartoon", "sketch", "neon", "mosaic", "sepia")
BACKGROUNDS = ("studio", "sky", "checkerboard", "sunset", "night", "wood")
SPLITS = ("train", "heldout", "heldout_triples")
HELDOUT_FRACTION = 0.1
"""Fraction of the object × colour × style triples that the split "train" never shows."""
ELEVATIONS = (20.0, 36.0)
"""Degrees that cameras are drawn from: high enough to see a cylinder's top, low enough to see a horizon."""
FIELD_OF_VIEW = 40.0
"""Degrees between the left and right edge of the image."""


class Solid(NamedTuple):
    """How much room an object of size 1 takes around its centre."""

    half_height: float
    """Height of the centre above the ground."""
    footprint: float
    """Radius of the upright cylinder that holds it."""
    reach: float
    """Radius of the sphere that holds it."""
    aim: float
    """Height above the centre that a camera looks at, so that the image is as empty above as below."""


SOLIDS = {
    "sphere": Solid(1.0, 1.0, 1.0, 0.0),
    "cube": Solid(0.78, 1.11, 1.36, -0.17),
    "cylinder": Solid(0.88, 0.78, 1.18, -0.12),
    "cone": Solid(1.04, 1.04, 1.48, -0.26),
    "torus": Solid(1.14, 1.14, 1.14, 0.03),
    "capsule": Solid(1.18, 0.68, 1.18, 0.04),
    "octahedron": Solid(1.28, 1.28, 1.28, 0.08),
    "pyramid": Solid(0.85, 1.35, 1.6, -0.3),
}
"""The objects. Their surfaces are in `imgdit.scenes.geometry`."""
OBJECTS = tuple(SOLIDS)


@dataclass(frozen=True)
class SceneObject:
    """A solid that stands on the ground."""

    kind: str
    """One of `OBJECTS`."""
    colour: str
    """One of `COLOURS`."""
    x: float = 0.0
    """Place on the ground."""
    y: float = 0.0
    """Place on the ground."""
    size: float = 1.0
    """Factor on the solid of `SOLIDS`."""
    yaw: float = 0.0
    """Turn about the upright axis in degrees, anticlockwise seen from above."""

    def __post_init__(self) -> None:
        check_name("object", self.kind, OBJECTS)
        check_name("colour", self.colour, COLOURS)
        if not 0.05 <= self.size <= 5.0:
            raise ValueError(f"an object's size must be in [0.05, 5], got {self.size}")

    @property
    def centre(self) -> tuple[float, float, float]:
        """World coordinates of the middle."""
        return self.x, self.y, SOLIDS[self.kind].half_height * self.size


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks at the point (0, 0, `height`) from a sphere around it."""

    azimuth: float = 0.0
    """Degrees about the upright axis; at 0 the camera stands at negative y, right is x; at 90 it stands at x."""
    elevation: float = 24.0
    """Degrees above the horizon."""
    distance: float = 4.2
    """From the point looked at."""
    height: float = 0.8
    """Of the point looked at."""

    def __post_init__(self) -> None:
        if not 0.0 < self.elevation < 90.0:
            raise ValueError(f"a camera's elevation must be between 0 and 90 degrees, got {self.elevation}")
        if not (self.distance > 0 and self.height >= 0):
            raise ValueError(
                "a camera's distance must be positive and its height not negative, "
                f"got distance={self.distance} and height={self.height}"
            )

    def orbit(self, azimuth: float = 0.0, elevation: float = 0.0, distance: float = 1.0) -> Camera:
        """This camera moved by degrees on its sphere, and to `distance` times its distance."""
        return replace(
            self,
            azimuth=self.azimuth + azimuth,
            elevation=self.elevation + elevation,
            distance=self.distance * distance,
        )

    @property
    def axes(self) -> tuple[tuple[float, float, float], ...]:
        """World directions of the camera's right, down and forward (OpenCV's x, y, z)."""
        a, e = math.radians(self.azimuth), math.radians(self.elevation)
        right = (math.cos(a), math.sin(a), 0.0)
        forward = (-math.sin(a) * math.cos(e), math.cos(a) * math.cos(e), -math.sin(e))
        down = (math.sin(a) * math.sin(e), -math.cos(a) * math.sin(e), -math.cos(e))
        return right, down, forward

    @property
    def position(self) -> tuple[float, float, float]:
        """World coordinates of the pinhole."""
        x, y, z = self.axes[2]
        return -x * self.distance, -y * self.distance, self.height - z * self.distance

    def project(self, point: Sequence[float]) -> tuple[float, float, float]:
        """World coordinates to (column, row, depth): slopes right and down of the middle, and z-depth."""
        offset = [p - c for p, c in zip(point, self.position, strict=True)]
        x, y, z = (sum(a * o for a, o in zip(axis, offset, strict=True)) for axis in self.axes)
        return x / z, y / z, z


@dataclass(frozen=True)
class Scene:
    """Objects, the camera that sees them, and how the image is drawn."""

    objects: tuple[SceneObject, ...]
    """One or two."""
    camera: Camera = field(default_factory=Camera)
    style: str = "photo"
    """One of `STYLES`."""
    background: str = "studio"
    """One of `BACKGROUNDS`."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= 2:
            raise ValueError(f"a scene has one or two objects, got {len(self.objects)}")
        check_name("style", self.style, STYLES)
        check_name("background", self.background, BACKGROUNDS)

    @classmethod
    def sample(cls, seed: int, split: str = "train", objects: int | None = None) -> Scene:
        """The scene of a seed: the same on every machine, and another one in every split.

        Args:
            seed: not negative.
            split: "train"; "heldout", other draws of the same combinations; "heldout_triples", only combinations of
                object, colour and style that "train" never shows.
            objects: 1 or 2; `None`: one in three of five scenes.
        """
        check_name("split", split, SPLITS)
        if seed < 0:
            raise ValueError(f"a scene's seed must not be negative, got {seed}")
        wanted = split == "heldout_triples"
        rng = Random(seed * len(SPLITS) + SPLITS.index(split))
        return draw(rng, allowed=lambda *triple: is_heldout(*triple) == wanted, objects=objects)

    def with_camera(self, camera: Camera) -> Scene:
        """The same scene seen from elsewhere."""
        return replace(self, camera=camera)

    @property
    def order(self) -> tuple[int, ...]:
        """Numbers of the objects from left to right, as the camera sees their centres."""
        columns = [self.camera.project(thing.centre)[0] for thing in self.objects]
        return tuple(sorted(range(len(columns)), key=columns.__getitem__))

    @property
    def relation(self) -> str | None:
        """What the first object is to the second in the image: "left", "right", or `None` where neither is clear."""
        if len(self.objects) < 2:
            return None
        first, second = (self.camera.project(thing.centre) for thing in self.objects)
        # An object is a neighbour once the centres are a mean half-width apart; nearer they stand behind each other.
        width = sum(SOLIDS[o.kind].footprint * o.size / p[2] for o, p in zip(self.objects, (first, second))) / 2
        if abs(first[0] - second[0]) < width:
            return None
        return "left" if first[0] < second[0] else "right"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        plain = asdict(self)
        return {**plain, "objects": list(plain["objects"])}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Scene:
        """The inverse of `to_dict`."""
        values = dict(_known(cls, plain))
        values["objects"] = tuple(SceneObject(**_known(SceneObject, thing)) for thing in values["objects"])
        if "camera" in values:
            values["camera"] = Camera(**_known(Camera, values["camera"]))
        return cls(**values)


def _known(cls: type, plain: dict[str, Any]) -> dict[str, Any]:
    """The same, once every key is a field and every field without a default is there."""
    names = [f.name for f in fields(cls)]
    for key in plain:
        check_name(f"key of a {cls.__name__}", key, names)
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in plain:
            raise ValueError(f"a {cls.__name__} needs the key {f.name!r}, got {sorted(plain)}")
    return plain


# Drawing at random. Only Random.random() is used: it is the one method whose numbers Python promises to keep between
# versions. Lengths are rounded, so that the last bits of a platform's sine do not reach the scene.


def pick(rng: Random, options: Sequence[Any]) -> Any:
    """One of the options."""
    return options[int(rng.random() * len(options))]


def between(rng: Random, low: float, high: float) -> float:
    """A number between the two, to four decimals."""
    return round(low + rng.random() * (high - low), 4)


def _heldout_triples() -> frozenset[tuple[str, str, str]]:
    """A random order of all triples, of which each is taken unless one of its names has had its share: so no object,
    colour or style is held out more than others, and every coloured object is trained in at least five styles."""
    rng = Random(2)
    triples = [(kind, colour, style) for kind in OBJECTS for colour in COLOURS for style in STYLES]
    keys = {triple: rng.random() for triple in triples}
    total = round(HELDOUT_FRACTION * len(triples))
    taken: list[tuple[str, str, str]] = []
    for triple in sorted(triples, key=keys.__getitem__):
        pair = triple[:2]
        full = any(
            sum(other[i] == name for other in taken) >= math.ceil(total / len(names))
            for i, (name, names) in enumerate(zip(triple, (OBJECTS, COLOURS, STYLES)))
        )
        if not full and len(taken) < total and not any(other[:2] == pair for other in taken):
            taken.append(triple)
    return frozenset(taken)


HELDOUT_TRIPLES = _heldout_triples()
"""The (object, colour, style) triples that "train" never shows."""


def is_heldout(kind: str, colour: str, style: str) -> bool:
    """Whether no scene of the split "train" shows an object of this kind and colour in this style."""
    check_name("object", kind, OBJECTS)
    check_name("colour", colour, COLOURS)
    check_name("style", style, STYLES)
    return (kind, colour, style) in HELDOUT_TRIPLES


def is_trained(kind: str, colour: str, style: str) -> bool:
    """The contrary of `is_heldout`."""
    return not is_heldout(kind, colour, style)


def draw(
    rng: Random,
    allowed: Callable[[str, str, str], bool] = is_trained,
    objects: int | None = None,
    style: str | None = None,
) -> Scene:
    """A scene at random.

    Args:
        rng: where every number comes from.
        allowed: which (object, colour, style) triples may occur; some of every style must.
        objects: 1 or 2; `None`: one in three of five scenes.
        style: at random if `None`.
    """
    if objects not in (None, 1, 2):
        raise ValueError(f"a scene has one or two objects, got objects={objects}")
    style = style or pick(rng, STYLES)
    background = pick(rng, BACKGROUNDS)
    count = objects or (1 if rng.random() < 0.6 else 2)
    pairs = [(kind, colour) for kind in OBJECTS for colour in COLOURS if allowed(kind, colour, style)]
    kinds = [pick(rng, pairs)]
    if count == 2:
        # Different in kind and in colour, so that a caption and a classifier can tell the two apart.
        kinds.append(pick(rng, [pair for pair in pairs if pair[0] != kinds[0][0] and pair[1] != kinds[0][1]]))
    azimuth, elevation = between(rng, -45.0, 45.0), between(rng, *ELEVATIONS)
    place = _place_one if count == 1 else _place_two
    setting = place(rng, kinds, azimuth, elevation)
    camera = Camera(azimuth, elevation, setting.distance, setting.height)
    return Scene(setting.things, camera, style, background)


def another_look(scene: Scene, rng: Random, recolour: bool = False) -> Scene:
    """The same geometry in a style that its objects are trained in, before any background.

    Args:
        scene: what is shown.
        rng: where every number comes from.
        recolour: draw colours for the objects as well.
    """
    things = scene.objects
    styles = [s for s in STYLES if recolour or all(is_trained(thing.kind, thing.colour, s) for thing in things)]
    style, background = pick(rng, styles), pick(rng, BACKGROUNDS)
    taken: list[str] = []
    for thing in things if recolour else ():
        taken.append(pick(rng, [c for c in COLOURS if c not in taken and is_trained(thing.kind, c, style)]))
    if recolour:
        things = tuple(replace(thing, colour=colour) for thing, colour in zip(things, taken))
    return replace(scene, objects=things, style=style, background=background)


def another_camera(scene: Scene, rng: Random) -> Scene:
    """The same scene from another place on the camera's sphere, 10 to 40 degrees around."""
    camera = scene.camera
    turn = pick(rng, (-1.0, 1.0)) * between(rng, 10.0, 40.0)
    return scene.with_camera(camera.orbit(azimuth=turn, elevation=between(rng, *ELEVATIONS) - camera.elevation))


def _yaw(rng: Random, kind: str, azimuth: float) -> float:
    """A turn that shows what the object is: a cube two sides, a torus its hole."""
    if kind in ("cube", "pyramid", "octahedron"):
        return round(azimuth + between(rng, 18.0, 72.0), 4)
    return round(azimuth + between(rng, -40.0, 40.0), 4)


def _aim(thing: SceneObject) -> float:
    return thing.centre[2] + SOLIDS[thing.kind].aim * thing.size


class _Setting(NamedTuple):
    """Objects in place, and where the camera stands that was turned to them."""

    things: tuple[SceneObject, ...]
    distance: float
    height: float


def _place_one(rng: Random, kinds: list[tuple[str, str]], azimuth: float, elevation: float) -> _Setting:
    """One object, near the middle."""
    (kind, colour), size = kinds[0], between(rng, 0.9, 1.05)
    thing = SceneObject(kind, colour, between(rng, -0.1, 0.1), between(rng, -0.1, 0.1), size, _yaw(rng, kind, azimuth))
    # A wide base needs the camera farther off, or its near corner leaves the image.
    distance = max(between(rng, 3.85, 4.4), round(2.8 * SOLIDS[kind].reach * size, 4))
    return _Setting((thing,), distance, round(_aim(thing) + between(rng, -0.06, 0.06), 4))


def _place_two(rng: Random, kinds: list[tuple[str, str]], azimuth: float, elevation: float) -> _Setting:
    """Two objects side by side, in either order."""
    side, gap = pick(rng, (-1.0, 1.0)), between(rng, 0.06, 0.2)
    sizes = [between(rng, 0.64, 0.76) for _ in kinds]
    radii = [SOLIDS[kind].footprint * size for (kind, _), size in zip(kinds, sizes)]
    half = radii[0] + radii[1] + gap / 2  # of the width of both
    columns = (side * (radii[0] - half), side * (half - radii[1]))
    a, e, v = (math.radians(degrees) for degrees in (azimuth, elevation, FIELD_OF_VIEW / 2))
    things, distances = [], []
    for (kind, colour), size, radius, column in zip(kinds, sizes, radii, columns):
        depth = between(rng, -0.25, 0.25)
        x, y = column * math.cos(a) - depth * math.sin(a), column * math.sin(a) + depth * math.cos(a)
        things.append(SceneObject(kind, colour, round(x, 4), round(y, 4), size, _yaw(rng, kind, azimuth)))
        # The border of the image touches the object's cylinder at its top, which is nearer to a camera that looks
        # down.
        top = SOLIDS[kind].half_height * size * math.sin(e)
        distances.append((abs(column) * math.cos(v) + radius) / math.sin(v) - depth * math.cos(e) + top)
    distance = max(distances) + between(rng, 0.1, 0.3)
    height = (_aim(things[0]) + _aim(things[1])) / 2 + between(rng, -0.1, 0.05)
    return _Setting(tuple(things), round(distance, 4), round(height, 4))
