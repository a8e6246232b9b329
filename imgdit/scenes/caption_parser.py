"""What a text says about a scene, where the grammar of `captions` can say it: the inverse of `captions.caption`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from imgdit.scenes.captions import LOOKS, PAIRS, PATTERNS, PLACES, SHORT, meaning
from imgdit.scenes.world import COLOURS, OBJECTS, STYLES, Scene


class ParsedCaption(NamedTuple):
    """What a caption says; `None` for what it leaves unsaid."""

    objects: tuple[tuple[str, str], ...]
    """(kind, colour) of each, the left one first where `relation` is "left", else as they are told."""
    relation: str | None
    """"left" where one of two objects is said to be left of the other."""
    style: str | None
    background: str | None

    def names_objects(self, scene: Scene) -> bool:
        """Whether it names all objects of a scene with their colours and no other, each at its side."""
        truth_values = meaning(scene)
        truth = tuple((thing["object"], thing["colour"]) for thing in truth_values["objects"])
        if self.relation != truth_values["relation"]:
            return False
        return self.objects == truth if self.relation else sorted(self.objects) == sorted(truth)


def parse_caption(text: str) -> ParsedCaption | None:
    """What a caption says; `None` where the grammar cannot say it. Case, spaces and a full stop are ignored."""
    text = " ".join(text.lower().split()).removesuffix(".").replace(" ,", ",")
    for pattern, style in _patterns():
        found = pattern.fullmatch(text)
        if found is None:
            continue
        parts = found.groupdict()
        subject = _parse_subject(parts["subject"]) if "subject" in parts else ((), None)
        if subject is None:
            continue
        background = _places()[parts["place"]] if "place" in parts else None
        return ParsedCaption(*subject, style or parts.get("style"), background)
    return None


def _one_of(phrases: Iterable[str]) -> str:
    return "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))


@cache
def _places() -> dict[str, str]:
    """Background of each phrase that tells one."""
    return {phrase: background for background, phrases in PLACES.items() for phrase in phrases}


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str | None], ...]:
    """Every pattern of a caption, and the style that its words tell where they do so by a look."""
    groups = {
        "subject": "(?P<subject>.+?)",
        "style": f"(?P<style>{_one_of(STYLES)})",
        "place": f"(?P<place>{_one_of(_places())})",
    }
    found: list[tuple[re.Pattern[str], str | None]] = []
    for pattern in (*PATTERNS, *(short for shorts in SHORT.values() for short in shorts), "{subject}"):
        if "{look}" not in pattern:
            found.append((re.compile(pattern.format(**groups)), None))
            continue
        for style, looks in LOOKS.items():
            for look in looks:
                text = pattern.format(look=look.format(**groups), **groups)
                found.append((re.compile(text), style))
    return tuple(found)


@cache
def _pairs() -> tuple[tuple[re.Pattern[str], str | None], ...]:
    kinds, colours = "|".join(OBJECTS), "|".join(COLOURS)

    def noun(name: str) -> str:
        return f"(?P<{name}_article>an?) (?P<{name}_colour>{colours}) (?P<{name}_kind>{kinds})"

    nouns = {name: noun(name) for name in ("first", "second")}
    patterns = [(pattern, relation) for relation, phrases in PAIRS.items() for pattern in phrases]
    return tuple((re.compile(text.format(**nouns)), relation) for text, relation in [("{first}", None), *patterns])


def _parse_subject(text: str) -> tuple[tuple[tuple[str, str], ...], str | None] | None:
    """Objects and their relation; `None` where the words are none of the grammar, an article is wrong, or two objects
    share their kind or colour, which those of no scene do."""
    for pattern, relation in _pairs():
        found = pattern.fullmatch(text)
        if found is None:
            continue
        names = [name for name in ("first", "second") if f"{name}_kind" in pattern.groupindex]
        things = tuple((found[f"{name}_kind"], found[f"{name}_colour"]) for name in names)
        articles = [
            found[f"{name}_article"] == ("an" if found[f"{name}_colour"][0] in "aeiou" else "a") for name in names
        ]
        distinct = all(len(set(values)) == len(things) for values in zip(*things))
        return (things, relation) if all(articles) and distinct else None
    return None
