"""Captions about scenes: a small grammar with paraphrases.

A caption is a pattern ("{look}, {place}") filled with what is seen and how ("a cartoon of a red cube left of a blue
sphere") and where ("on a checkered floor"). Objects and colours are always called by their one name, and a colour is
said of nothing else (the sky is clear, not blue); everything else varies.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from random import Random
from typing import Any

from imgdit.naming import check_name
from imgdit.scenes.world import COLOURS, OBJECTS, Scene, pick

PAIRS = {
    "left": (
        "{first} left of {second}",
        "{first} to the left of {second}",
        "{first} on the left and {second} on the right",
        "{second} right of {first}",
        "{second} to the right of {first}",
        "{first} with {second} on its right",
    ),
    None: ("{first} and {second}", "{second} and {first}", "{first} next to {second}", "{second} next to {first}"),
}
"""How two objects are told, `first` being the left one; `None` where neither is clearly left."""

PLACES = {
    "studio": ("in a grey studio", "before a plain grey wall", "on a grey background"),
    "sky": ("under a clear sky", "on sand under a clear sky", "outdoors by day"),
    "checkerboard": ("on a checkered floor", "on a checkerboard floor", "on a floor of black and white tiles"),
    "sunset": ("at sunset", "before the setting sun", "under an evening sky"),
    "night": ("at night", "under a starry sky", "in the dark of night"),
    "wood": ("on a wooden floor", "on wooden planks", "in a room with a wooden floor"),
}
"""How the backgrounds are told."""

LOOKS = {
    "photo": ("a photo of {subject}", "a photograph of {subject}", "a realistic photo of {subject}"),
    "cartoon": ("a cartoon of {subject}", "{subject} drawn as a cartoon", "a cartoon drawing of {subject}"),
    "sketch": ("a sketch of {subject}", "a pencil sketch of {subject}", "a hatched pencil drawing of {subject}"),
    "neon": ("{subject} in neon lights", "a neon sign of {subject}", "glowing neon tubes that show {subject}"),
    "mosaic": ("a mosaic of {subject}", "{subject} laid as a mosaic", "a mosaic of small tiles showing {subject}"),
    "sepia": ("a sepia print of {subject}", "an old sepia photograph of {subject}", "{subject} in sepia tones"),
}
"""What only one style says; `{subject}` may hold the place as well."""

PATTERNS = (
    "{subject}, {style} style, {place}",
    "{subject} {place}, {style} style",
    "{subject} {place} in {style} style",
    "{style} style, {subject} {place}",
    "{look} {place}",
    "{look}, {place}",
    "{place}, {look}",
)
"""Captions. Those with `{look}` draw one of `LOOKS`."""

SHORT = {
    "place": ("{subject}, {style} style", "{subject} in {style} style", "{look}"),
    "style": ("{subject} {place}",),
    "subject": ("{style} style, {place}", "{place}, {style} style", "{place} in {style} style"),
}
"""Captions that leave the place, the style or the objects unsaid; the last for images of a given subject."""


def _noun(kind: str, colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"


def _subject(scene: Scene, rng: Random) -> str:
    nouns = [_noun(scene.objects[i].kind, scene.objects[i].colour) for i in scene.order]
    if len(nouns) == 1:
        return nouns[0]
    return pick(rng, PAIRS["left" if scene.relation else None]).format(first=nouns[0], second=nouns[1])


def leave_out(rng: Random, chance: float) -> tuple[str, ...]:
    """Parts of a caption ("place", "style") that are left unsaid, each by `chance`, as people who type do."""
    if not 0.0 <= chance <= 1.0:
        raise ValueError(f"a chance is in [0, 1], got {chance}")
    return tuple(part for part in ("place", "style") if rng.random() < chance)


def caption(scene: Scene, rng: Random, left_out: Collection[str] = ()) -> str:
    """A caption about a scene, in lower case without a full stop.

    Args:
        scene: what to tell.
        rng: chooses among the paraphrases.
        unsaid: "place", "style", or both; or "subject" alone.
    """
    for part in left_out:
        check_name("part of a caption", part, SHORT)
    if "subject" in left_out and len(set(left_out)) > 1:
        raise ValueError(f"a caption without its subject needs place and style, got left_out={tuple(left_out)}")
    patterns = ("{subject}",) if len(set(left_out)) == 2 else SHORT[next(iter(left_out))] if left_out else PATTERNS
    subject = _subject(scene, rng)
    look = pick(rng, LOOKS[scene.style]).format(subject=subject)
    place = pick(rng, PLACES[scene.background])
    return pick(rng, patterns).format(subject=subject, look=look, place=place, style=scene.style)


def plain_caption(scene: Scene) -> str:
    """The same caption for the same meaning, by the first paraphrase of everything:
    "a sketch of a red cube left of a blue cone, at night"."""
    nouns = [_noun(scene.objects[i].kind, scene.objects[i].colour) for i in scene.order]
    pattern = PAIRS["left" if scene.relation else None][0]
    subject = nouns[0] if len(nouns) == 1 else pattern.format(first=nouns[0], second=nouns[1])
    look = LOOKS[scene.style][0].format(subject=subject)
    return f"{look}, {PLACES[scene.background][0]}"


def meaning(scene: Scene) -> dict[str, Any]:
    """What a caption about the scene says, structured.

    Returns:
        `objects`: from left to right in the image, each with `object` and `colour`; `relation`: "left" where the
        first is clearly left of the second, else `None`; `style`; `background`.
    """
    things = [scene.objects[i] for i in scene.order]
    return {
        "objects": [{"object": thing.kind, "colour": thing.colour} for thing in things],
        "relation": "left" if scene.relation else None,
        "style": scene.style,
        "background": scene.background,
    }


def words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    return re.findall(r"[a-z]+", caption.lower())


def vocabulary() -> list[str]:
    """Every word the grammar can say, sorted. The only punctuation is the comma."""
    texts = [*COLOURS, *OBJECTS, *LOOKS, *PATTERNS, *SHORT["place"], *SHORT["style"], "a an"]
    for phrases in (*PAIRS.values(), *PLACES.values(), *LOOKS.values()):
        texts += phrases
    return sorted({word for text in texts for word in words(re.sub(r"\{\w+\}", " ", text))})
