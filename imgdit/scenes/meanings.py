"""What the captions of the scenes can mean, and which other words mean the same: the facts that a tokenizer of the
scenes carries for `imgdit.prompts`.
"""

from __future__ import annotations

import colorsys
import dataclasses
from functools import cache
from typing import Any

from PIL import ImageColor

from imgdit.prompts.facts import PromptWords
from imgdit.scenes.captions import LOOKS, PAIRS, PATTERNS, PLACES, SHORT
from imgdit.scenes.shading import COLOUR_VALUES
from imgdit.scenes.world import COLOURS, OBJECTS, STYLES

KINDS = {"object": OBJECTS, "colour": COLOURS, "style": STYLES, "background": tuple(p[0] for p in PLACES.values())}
"""What a caption can name, by kind."""
SAME = {
    "object": {
        "sphere": "ball, globe, orb, marble, bubble, beach ball, spherical",
        "cube": "box, block, brick, die, dice, crate, square, cuboid, cubic",
        "cylinder": "tube, pipe, can, tin, barrel, drum, pillar, column, disc, disk, coin, rod, cylindrical",
        "cone": "funnel, traffic cone, ice cream cone, conical",
        "torus": "ring, doughnut, donut, tyre, tire, wheel, bagel, hoop, tori",
        "capsule": "pill, capsular",
        "octahedron": "diamond, gem, gemstone, crystal, jewel, octahedra, octahedral",
        "pyramid": "pyramidal",
    },
    "colour": {
        "red": "scarlet, ruby, cherry, wine, burgundy, carmine, vermilion, reddish",
        "orange": "amber, peach, apricot, tangerine, orangey",
        "yellow": "golden, lemon, mustard, yellowish",
        "green": "olive, emerald, jade, mint, greenish",
        "cyan": "turquoise, cyanish",
        "blue": "sapphire, cobalt, azure, ultramarine, blueish, bluish",
        "purple": "violet, lilac, lavender, mauve, purplish",
        "pink": "magenta, fuchsia, rose, pinkish",
    },
    "style": {
        "photo": "photograph, photography, photographic, photorealistic, realistic, snapshot",
        "cartoon": "comic, anime, manga, toon, cartoonish",
        "sketch": "pencil, charcoal, drawing, doodle, sketched, sketchy, hatched, hand drawn, pen and ink, crayon",
        "neon": "glowing, glow, neon lights, neon sign, neon tubes, fluorescent",
        "mosaic": "made of tiles, small tiles, tesserae",
        "sepia": "old photo, old photograph, old picture, vintage, antique, retro, daguerreotype",
    },
    "background": {
        "sunset": "sunset, setting sun, dusk, twilight, evening, evening sky, sundown, golden hour",
        "night": "night, nights, nighttime, night time, night sky, midnight, moonlight, stars, starry, starry sky, "
        "dark, darkness",
        "wood": "wooden floor, wooden floors, wooden table, wooden planks, wood floor, wood, planks, parquet",
        "checkerboard": "checkered, chequered, checkerboard, chessboard, chess board, on tiles, tiled floor",
        "studio": "studio, studio lighting, grey wall, gray wall, grey background, gray background, gray studio",
        "sky": "sky, blue sky, clear sky, outdoors, outside, daylight, daytime, by day, sand, beach, desert, dunes, "
        "dune",
    },
}
"""Words and phrases that mean the same as one that captions know, commas between them."""
NEAR = {
    "object": {
        "sphere": "bead, planet, pearl, egg, balloon, football, basketball, circle",
        "cube": "house, building, parcel, package, chest",
        "cylinder": "cup, mug, glass, bucket, bottle, candle, jar, vase, log, pole, tower",
        "cone": "spike, party hat, cornet",
        "torus": "lifebuoy, bracelet",
        "capsule": "sausage, lozenge, tablet, hot dog",
        "pyramid": "tent, tetrahedron, triangle, prism, roof",
    },
    "colour": {
        "orange": "brown, bronze, copper, rusty",
        "yellow": "white, ivory, cream, beige",
        "blue": "black, grey, gray, silver",
    },
    "style": {
        "photo": "render, rendering, 3d render, cgi, 3d, cinematic",
        "cartoon": "painting, oil painting, watercolour, watercolor, gouache, acrylic, illustration, clipart, poster",
        "sketch": "etching, engraving, ink",
        "neon": "cyberpunk, led",
        "mosaic": "pixel, pixel art, pixelated, stained glass",
        "sepia": "monochrome, black and white",
    },
    "background": {
        "sunset": "sunrise, dawn",
        "night": "moon, space, galaxy",
        "wood": "table, desk, shelf, bench, kitchen",
        "studio": "indoors, indoor, room, plain background, plain wall, white background, black background",
        "sky": "garden, meadow, field, grass, park, street, city, forest, mountain, sea, ocean, lake, snow, sun, "
        "sunny",
    },
}
"""Words and phrases of which a known one comes nearest."""
TONES = ("light", "dark", "pale", "bright", "deep", "vivid", "hot", "navy", "sky", "royal", "baby", "lime", "forest")
"""Words before a colour that make a tone of it."""
SCENERY = ["background", "backdrop", "floor", "ground", "wall", "surface", "tiles", "planks", "carpet"]
"""Nouns that a colour makes a background of."""
FAINT = ["photo", "photograph", "photography", "drawing", "realistic"]
"""Words of a style that also say what kind of image another style is in ("a cartoon drawing")."""
PLAIN_COLOURS = 0.45
"""Chroma below which a colour is no tone of one of `COLOURS`, but white, grey or black."""
PRIORITY = ("sunset", "night", "wood", "checkerboard", "studio", "sky")
"""The backgrounds by how much of the image they decide: time of day before floor, floor before surroundings."""


@cache
def scene_words() -> PromptWords:
    """The facts about captions of scenes."""
    same = {kind: {name: text.split(", ") for name, text in part.items()} for kind, part in SAME.items()}
    near = {kind: {name: text.split(", ") for name, text in part.items()} for kind, part in NEAR.items()}
    named = {word for part in (same, near) for kinds in part.values() for words in kinds.values() for word in words}
    for colour, (red, green, blue) in _colours().items():
        if colour in COLOURS or colour in named:
            continue
        nearest = min(COLOURS, key=lambda name: _unlike((red, green, blue), COLOUR_VALUES[name]))
        chroma = max(red, green, blue) - min(red, green, blue)
        (same if chroma >= PLAIN_COLOURS else near)["colour"].setdefault(nearest, []).append(colour)
    for colour in COLOURS:
        same["colour"][colour] += [f"{tone} {colour}" for tone in TONES]
    plain = {
        "": "{subject}",
        "style": SHORT["place"][0],
        "place": SHORT["style"][0],
        "style place": PATTERNS[0],
    }
    return PromptWords(
        names={"object": [*OBJECTS], "colour": [*COLOURS], "style": [*STYLES], "background": [*PRIORITY]},
        same=same,
        near=near,
        places={name: [*PLACES[name]] for name in PRIORITY},
        looks={name: [*looks] for name, looks in LOOKS.items()},
        pairs={"left": [*PAIRS["left"]], "beside": [*PAIRS[None]]},
        patterns=[*PATTERNS, *(pattern for part in SHORT.values() for pattern in part), "{subject}"],
        plain=plain,
        scenery=SCENERY,
        faint=FAINT,
    )


def scene_facts() -> dict[str, Any]:
    """`scene_words` as JSON's types."""
    return dataclasses.asdict(scene_words())


@cache
def _colours() -> dict[str, tuple[float, float, float]]:
    """sRGB in [0, 1] of the colours that have a name on the web, by it."""
    values = {name: ImageColor.getrgb(name) for name in ImageColor.colormap}
    return {name: (rgb[0] / 255, rgb[1] / 255, rgb[2] / 255) for name, rgb in values.items()}


def _unlike(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """How unlike two colours look: mostly by hue where the first has one, otherwise by lightness."""
    (hue, light, _), (other_hue, other_light, _) = colorsys.rgb_to_hls(*one), colorsys.rgb_to_hls(*other)
    turn = abs(hue - other_hue)
    chroma = max(one) - min(one)
    return 24 * chroma * min(turn, 1 - turn) + abs(light - other_light)
