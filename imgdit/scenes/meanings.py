"""What the captions of the scenes can mean, and which words of a prompt mean nothing there.

The tokenizer knows more words than have a meaning of their own: "white" is learned from "a floor of black and white
tiles" alone, so "a white cube" is no colour. Only for models that were taught the scenes, see `imgdit.data.taught`.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from PIL import ImageColor

from imgdit.naming import closest
from imgdit.scenes.captions import LOOKS, PAIRS, PLACES, vocabulary, words
from imgdit.scenes.shading import COLOUR_VALUES
from imgdit.scenes.world import COLOURS, OBJECTS, STYLES

KINDS = {"object": OBJECTS, "colour": COLOURS, "style": STYLES, "background": tuple(p[0] for p in PLACES.values())}
"""What a caption can name, by kind."""
ALIKE = {
    "object": {
        "sphere": "ball globe orb marble bead bubble planet pearl egg",
        "cube": "box block brick die dice crate square cuboid house building",
        "cylinder": "tube pipe can barrel drum pillar column candle cup mug bucket bottle coin disc disk",
        "cone": "funnel cornet spike",
        "torus": "ring doughnut donut tyre tire wheel bagel hoop circle",
        "capsule": "pill sausage lozenge",
        "octahedron": "diamond gem crystal jewel",
        "pyramid": "tent tetrahedron triangle prism",
    },
    "style": {
        "photo": "photorealistic photography render rendering cgi 3d cinematic",
        "cartoon": "comic anime manga painting watercolour watercolor gouache acrylic illustration clipart poster",
        "sketch": "charcoal ink etching engraving crayon pen doodle",
        "neon": "glow fluorescent cyberpunk led",
        "mosaic": "pixel pixelated",
        "sepia": "vintage retro antique monochrome daguerreotype",
    },
    "background": {
        "in a grey studio": "indoors indoor room",
        "under a clear sky": "garden meadow field grass park street city forest mountain sea ocean lake snow",
        "on sand under a clear sky": "beach desert dune dunes",
        "on a checkered floor": "chess chessboard chequered",
        "at sunset": "dawn dusk sunrise twilight",
        "at night": "midnight moon moonlight stars space galaxy",
        "on a wooden floor": "wood table desk shelf bench parquet kitchen bedroom sofa bed",
    },
}
"""Words that people say, by the known one that is nearest."""
LINKS = frozenset(words("a an the and or of in on at to by with its that as is are was it this from for some"))
"""Words that join others: none is a mistake, and no object's adjective reaches over one."""
SPELLED = 0.74
"""Likeness from which a word is taken for a known one that is misspelt: one letter of four."""
SCENERY = ("background", "floor", "ground", "wall", "sky", "room")
"""Nouns that a colour makes a background of."""


class Meaningless(NamedTuple):
    """A word of a prompt that the scenes' captions give no meaning."""

    word: str
    kind: str | None = None
    """One of `KINDS`, where the word tells it."""
    nearest: str | None = None
    """The known one that comes nearest."""

    def __str__(self) -> str:
        if self.nearest is None:
            return f'"{self.word}"'
        return f'"{self.word}" (nearest: {self.nearest})'


def meaningless(prompt: str) -> list[Meaningless]:
    """Words of a prompt without a meaning in the scenes, in their order, each once."""
    text = re.findall(r"[^\W_]+", prompt.lower())
    told = _told(text)
    found: dict[str, Meaningless] = {}
    for i, word in enumerate(text):
        if i in told or word in LINKS:
            continue
        if word in _colours() and i + 1 < len(text) and text[i + 1] in SCENERY:
            phrase = f"{word} {text[i + 1]}"
            found[phrase] = Meaningless(phrase, "background", closest(phrase, _places()))
        elif word not in vocabulary() or word in _colours() or _describes(text, i):
            found[word] = _named(word)
    return list(found.values())


def about_words(prompts: Iterable[str]) -> str | None:
    """One message on all words of some prompts that mean nothing; `None` if all have a meaning."""
    found = {one.word: one for prompt in prompts for one in meaningless(prompt)}
    if not found:
        return None
    kinds = {one.kind for one in found.values()}
    shown = [kind for kind in KINDS if kind in kinds or None in kinds]
    known = "; ".join(f"{kind}s {', '.join(KINDS[kind])}" for kind in shown)
    return f"the model was never taught {', '.join(map(str, found.values()))}. It knows the {known}"


def _told(text: list[str]) -> set[int]:
    """Numbers of the words that mean something: names, and all words of a known phrase."""
    names = {*OBJECTS, *COLOURS, *STYLES, "style"}
    told = {i for i, word in enumerate(text) if word in names}
    for phrase in _phrases():
        for i in range(len(text) - len(phrase) + 1):
            if tuple(text[i : i + len(phrase)]) == phrase:
                told |= set(range(i, i + len(phrase)))
    return told


def _describes(text: list[str], i: int) -> bool:
    """Whether a word stands before an object as what it is like ("a small red cube")."""
    for word in text[i:]:
        if word in OBJECTS:
            return True
        if word in LINKS or word in STYLES:
            return False
    return False


def _named(word: str) -> Meaningless:
    for kind, alike in ALIKE.items():
        for known, others in alike.items():
            if word in others.split() or word.removesuffix("s") in others.split():
                return Meaningless(word, kind, known)
    misspelt = next((kind for kind in ("object", "colour", "style") if closest(word, KINDS[kind], SPELLED)), None)
    if misspelt is not None and word not in _colours():
        return Meaningless(word, misspelt, closest(word, KINDS[misspelt]))
    if colour := closest(word, _colours(), 0.8):
        value = _colours()[colour]
        return Meaningless(word, "colour", min(COLOURS, key=lambda name: _unlike(value, COLOUR_VALUES[name])))
    return Meaningless(word)


@cache
def _places() -> tuple[str, ...]:
    return tuple(phrase for phrases in PLACES.values() for phrase in phrases)


@cache
def _phrases() -> frozenset[tuple[str, ...]]:
    """What the grammar says around names: runs of words of places, looks and relations, with their first words left
    out too ("the wooden floor" as "a wooden floor")."""
    runs: set[tuple[str, ...]] = set()
    relations = [pattern for patterns in PAIRS.values() for pattern in patterns]
    for text in (*_places(), *(look for looks in LOOKS.values() for look in looks), *relations):
        for part in re.split(r"\{\w+\}", text):
            run = part.split()
            runs |= {tuple(run[i:]) for i in range(len(run)) if run[i] not in LINKS}
    return frozenset(runs)


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
