"""From a prompt as people write it to a caption as a model was trained on.

A prompt that is such a caption already is returned as it is. Of any other, the objects with their colours and sides,
the style and the background are read in whatever order and words they are said; the usual caption says them again, and
what had to be left out is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from imgdit.naming import closest
from imgdit.prompts.facts import ARTICLES, KINDS, Meaning, PromptWords


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STOPS = frozenset(".,;:!?()")
NEGATIONS = _words("no not without never except minus nor neither dont doesnt isnt arent nothing none")
COUNTS = _words(
    "two three four five six seven eight nine ten several many lots pair couple dozen some few multiple both"
)
AND = frozenset({"and", "plus", "&"})
BESIDE = _words("next beside near by to alongside adjacent besides")
"""Words that say no more than that two objects are in one image."""
SPELLED = 0.74
"""Similarity of spelling from which a known word is named for an unknown one: one letter of four."""
RELATIONS = ("on top of", "in front of", "behind", "inside", "inside of", "under", "below", "above", "over", "between")
"""Places of one object against another that captions do not say; told where two objects are named."""
LINKS = _words(
    "of in on at to with its it that which as is are was were be this these those for from into onto but or so then "
    "will would could should can may where while when has have had who whose there here around standing sitting lying "
    "floating placed located stands sits lies seen looks look looking like made showing shows shown"
)
"""Words that join others. None is a mistake, and no adjective reaches over one."""
FILLERS = _words(
    "i we you me my us your please want need like image picture pic pictures images style styled stylised stylized "
    "draw drawn draws make makes made create creates generate render show give paint imagine let see got get would "
    "just only single one simple nice beautiful pretty lovely great best quality masterpiece detailed highly high "
    "resolution 4k 8k hd uhd subject background objects object thing things shape shaped form figure something item "
    "items piece colour color coloured colored colours colors tone toned tones light lights lighting lit sign hi "
    "hello thanks thank cozy soft plain very really quite time scene all alone other others another each own s id ill "
    "im theres its what how hey art artwork work medium upright"
)
"""Words that a prompt may have without meaning something that is to be seen."""


class Note(NamedTuple):
    """Something that a prompt says and the caption does not."""

    kind: str
    """"word", "negation", "number", or "relation"."""
    said: str
    """In the prompt's words."""
    meaning: Meaning | None = None
    """What it is read as, if anything."""


@dataclass
class Reading:
    """How a prompt was read."""

    prompt: str
    """The caption that the model is given."""
    notes: list[Note] = field(default_factory=list)


@dataclass
class _Item:
    """A word or phrase of a prompt."""

    kind: str
    """One of `KINDS`, or "stop", "and", "link", "filler", "negation", "number", "side", "relation", "scenery",
    "unknown"."""
    said: str
    meaning: Meaning | None = None
    side: str = ""
    """Of a side: "left" or "right"."""
    form: str = ""
    """Of a side: "of" (the object before it is there), "its" (the object after it is there), or "bare"."""


@dataclass
class _Thing:
    """An object that a prompt names."""

    item: int
    """Number of its item."""
    name: str
    plural: bool
    colour: str | None = None


def read_prompt(words: PromptWords, prompt: str) -> Reading:
    """The caption that says what a prompt says, as far as the model's captions can say it.

    Args:
        words: the facts about the captions.
        prompt: of a person.

    Returns:
        The prompt itself if it is a caption, or if it names no object that captions know.
    """
    if not prompt.strip() or words.is_caption(prompt):
        return Reading(prompt)
    items = _items(words, prompt)
    notes = _take_negations(items)
    notes += [
        Note("word", item.said, item.meaning)
        for item in items
        if item.kind == "unknown" or (item.meaning is not None and not item.meaning.same)
    ]
    things, spare = _things(items)
    if not things:
        return Reading(prompt, notes)
    notes += spare
    things, told = _at_most_two(items, things)
    notes += told
    return Reading(_caption(words, items, things), notes)


def remark(words: PromptWords, notes: Iterable[Note]) -> str | None:
    """One message on all that prompts say and the model does not know; `None`: it knows everything."""
    by_kind: dict[str, dict[str, Note]] = {}
    for note in notes:
        by_kind.setdefault(note.kind, {}).setdefault(note.said, note)
    said = []
    if unknown := by_kind.get("word"):
        kinds = {note.meaning.kind if note.meaning else None for note in unknown.values()}
        shown = [kind for kind in KINDS if kind in kinds or None in kinds]
        known = "; ".join(f"{kind}s {', '.join(_names(words, kind))}" for kind in shown)
        said.append(
            f"the model was never taught {', '.join(_told(words, note) for note in unknown.values())}. "
            f"It knows the {known}"
        )
    if negations := by_kind.get("negation"):
        said.append(
            f"a prompt cannot take anything away: {_quoted(negations)} is not read; put it into the negative prompt"
        )
    if numbers := by_kind.get("number"):
        said.append(
            f"an image has one object, or two of different kinds and colours; {_quoted(numbers)} is more than that"
        )
    if relations := by_kind.get("relation"):
        said.append(f"two objects are side by side, one may be left of the other; {_quoted(relations)} is not read")
    return ". ".join(one[0].upper() + one[1:] if i else one for i, one in enumerate(said)) or None


def _names(words: PromptWords, kind: str) -> list[str]:
    return [words.places[name][0] for name in words.names[kind]] if kind == "background" else list(words.names[kind])


def _told(words: PromptWords, note: Note) -> str:
    if note.meaning is None:
        return f'"{note.said}"'
    name = words.places[note.meaning.name][0] if note.meaning.kind == "background" else note.meaning.name
    return f'"{note.said}" (nearest: {name})'


def _quoted(notes: Iterable[str]) -> str:
    return ", ".join(f'"{said}"' for said in notes)


# From words to items


def _items(words: PromptWords, text: str) -> list[_Item]:
    """The words of a prompt with what they are; articles are left out."""
    plain = re.sub(r"['’]s\b|\bcan (?=you|i\b|we|it|be\b)", " ", text.lower())
    plain = re.sub(r"['’](?=\w)", "", plain)
    tokens = [token for token in re.findall(r"[^\W_]+|[.,;:!?()&]", plain) if token not in ARTICLES]
    items: list[_Item] = []
    i = 0
    while i < len(tokens):
        count, item = _next(words, tokens, i)
        items.append(item)
        i += count
    return items


def _next(words: PromptWords, tokens: list[str], i: int) -> tuple[int, _Item]:
    """How many tokens the next item has, and the item."""
    side = _side(tokens, i)
    if side is not None:
        return side
    for length in range(min(words.longest, len(tokens) - i), 0, -1):
        phrase = tuple(tokens[i : i + length])
        if (meaning := words.phrases.get(phrase)) is not None:
            return length, _Item(meaning.kind, " ".join(phrase), meaning)
    for relation in sorted(RELATIONS, key=len, reverse=True):
        if tokens[i : i + len(relation.split())] == relation.split():
            return len(relation.split()), _Item("relation", relation)
    return 1, _single(words, tokens[i])


def _single(words: PromptWords, word: str) -> _Item:
    kinds = (
        ("stop", STOPS), ("and", AND), ("negation", NEGATIONS), ("number", COUNTS), ("scenery", words.scenery),
        ("filler", FILLERS), ("link", LINKS | BESIDE),
    )  # fmt: skip
    for kind, known in kinds:
        if word in known:
            return _Item(kind, word)
    if word.isdecimal():
        return _Item("number" if int(word) > 1 else "filler", word)
    if (known_word := _misspelt(word, words.spellings)) is not None:
        meaning = words.phrases[(known_word,)]._replace(same=False)
        return _Item(meaning.kind, word, meaning)
    names = [name for kind in KINDS if kind != "background" for name in words.names[kind]]
    near = closest(word, names, SPELLED)
    return _Item("unknown", word, None if near is None else words.phrases[(near,)]._replace(same=False))


def _side(tokens: list[str], i: int) -> tuple[int, _Item] | None:
    """A side that begins here: "left of", "to the left of", "on its right", "on the left", "left"."""
    start = i
    if tokens[i] in ("to", "on", "at") and i + 1 < len(tokens):
        i += 1
    owned = tokens[i] in ("its", "whose", "their") and i + 1 < len(tokens)
    i += owned
    if tokens[i] not in ("left", "right", "lefthand", "righthand"):
        return None
    side = tokens[i].removesuffix("hand")
    if i + 1 < len(tokens) and tokens[i + 1] in ("side", "hand"):
        i += 1
    if i + 1 < len(tokens) and tokens[i + 1] in ("of", "from"):
        return i + 2 - start, _Item("side", side, side=side, form="of")
    return i + 1 - start, _Item("side", side, side=side, form="its" if owned else "bare")


def _misspelt(word: str, known: Iterable[str]) -> str | None:
    """The known word that a word is a slip of the keyboard for: one letter left out, added, changed or swapped with
    its neighbour; two in words of eight letters."""
    for other in known:
        longer = max(len(word), len(other))
        allowed = 0 if longer < 3 else 1 if longer < 8 else 2
        if abs(len(word) - len(other)) > allowed or (word[0] != other[0] and longer < 6):
            continue
        swapped = sorted(word) == sorted(other)
        if (longer >= 5 or swapped) and _distance(word, other) <= allowed:
            return other
    return None


def _distance(one: str, other: str) -> int:
    """Letters to leave out, add, change or swap with a neighbour (optimal string alignment)."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, target in enumerate(other, start=1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != target))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == target:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


# What the items say together


def _take_negations(items: list[_Item]) -> list[Note]:
    """Take what is said not to be there out of the items: up to the end of the clause, to "but", or to the joining
    word behind what is named."""
    notes, i = [], 0
    while i < len(items):
        if items[i].kind != "negation":
            i += 1
            continue
        end, named = i + 1, False
        while end < len(items) and items[end].kind not in ("stop", "relation") and items[end].said != "but":
            if named and items[end].kind in ("link", "and", "background", "style"):
                break
            named = named or items[end].kind in (*KINDS, "unknown", "scenery", "filler")
            end += 1
        notes.append(Note("negation", " ".join(item.said for item in items[i:end])))
        items[i:end] = [_Item("stop", ",")]
        i += 1
    return notes


def _things(items: list[_Item]) -> tuple[list[_Thing], list[Note]]:
    """The objects with their colours, and colours that belong to none."""
    things: list[_Thing] = []
    at: dict[int, _Thing] = {}
    for i, item in enumerate(items):
        if item.kind != "object":
            continue
        assert item.meaning is not None
        again = next((thing for thing in things if thing.name == item.meaning.name), None)
        between = items[again.item + 1 : i] if again else []
        if again and all(b.kind in ("unknown", "filler", "colour") for b in between):
            again.item, again.plural = i, item.meaning.plural  # "a square box" is one
        elif again is None or _coloured(items, i):
            again = _Thing(i, item.meaning.name, item.meaning.plural)
            things.append(again)
        at[i] = again  # "a cone and a tube; the cone is pink"
    free = []
    for i, item in enumerate(items):
        if item.kind == "colour" and not _of_scenery(items, i):
            thing = at.get(_described(items, i))
            if thing is not None and thing.colour is None:
                assert item.meaning is not None
                thing.colour = item.meaning.name
            else:
                free.append(i)
    notes = []
    for i in free:
        item = items[i]
        assert item.meaning is not None
        before = [thing for thing in things if thing.item < i and thing.colour is None]
        of_unknown = i + 1 < len(items) and items[i + 1].kind == "unknown"  # "a red cat and a ball"
        after = [thing for thing in things if thing.item > i and thing.colour is None and not of_unknown]
        if before or after:
            (before[-1] if before else after[0]).colour = item.meaning.name
        elif "and" in (items[i - 1].kind, items[i + 1].kind if i + 1 < len(items) else ""):
            notes.append(Note("number", item.said))
    return things, notes


def _coloured(items: list[_Item], i: int) -> bool:
    """Whether an object has a colour as its adjective."""
    return any(items[j].kind == "colour" and _described(items, j) == i for j in range(i))


def _of_scenery(items: list[_Item], i: int) -> bool:
    """Whether a colour stands before a part of the background, and not behind an object."""
    behind = i > 0 and items[i - 1].kind == "object"
    return not behind and i + 1 < len(items) and items[i + 1].kind in ("scenery", "background")


def _described(items: list[_Item], i: int) -> int:
    """Number of the object that a colour stands before as an adjective; -1: none."""
    for j in range(i + 1, len(items)):
        kind = items[j].kind
        if kind == "object":
            return j
        if kind == "and" and j + 1 < len(items) and items[j + 1].kind == "colour":
            continue  # "a red and blue cube"
        if kind in ("stop", "and", "link", "side", "relation", "number", "background", "scenery"):
            return -1
    return -1


def _at_most_two(items: list[_Item], things: list[_Thing]) -> tuple[list[_Thing], list[Note]]:
    """The objects that an image can have, and what of the others is to be told."""
    notes = []
    kept: list[_Thing] = []
    for thing in things:
        alike = any(thing.name == other.name for other in kept)
        if len(kept) == 2 or alike:
            notes.append(Note("number", " ".join(filter(None, (thing.colour, thing.name)))))
        else:
            kept.append(thing)
    for thing in kept:
        if thing.plural:
            counts = [i for i in range(thing.item) if items[i].kind == "number"]
            start = counts[-1] if counts else thing.item
            notes.append(Note("number", " ".join(item.said for item in items[start : thing.item + 1])))
    if len(kept) == 2:
        between = items[kept[0].item + 1 : kept[1].item]
        notes += [Note("relation", item.said) for item in between if item.kind == "relation"]
    return kept, notes


def _left_first(items: list[_Item], things: list[_Thing]) -> tuple[list[_Thing], bool]:
    """The objects, the left one first if a side is said, and whether one is."""
    if len(things) < 2:
        return things, False
    first, second = things
    for i, item in enumerate(items):
        if item.kind != "side":
            continue
        between = first.item < i < second.item
        if item.form == "its":  # what is named with it is on that side
            second_is_there = True
        elif item.form == "of":
            second_is_there = not between
        else:
            second_is_there = i > second.item or (between and items[i + 1].said == ":")
        left_is_second = (item.side == "left") == second_is_there
        return ([second, first] if left_is_second else [first, second]), True
    return things, False


def _caption(words: PromptWords, items: list[_Item], things: list[_Thing]) -> str:
    """The usual caption of what was read."""
    ordered, sided = _left_first(items, things)
    nouns = [_noun(words, thing, things) for thing in ordered]
    subject = nouns[0]
    if len(nouns) == 2:
        subject = words.pairs["left" if sided else "beside"][0].format(first=nouns[0], second=nouns[1])
    style = _style(words, items)
    place = _background(words, items)
    said = " ".join(name for name, value in (("style", style), ("place", place)) if value is not None)
    return words.plain[said].format(subject=subject, style=style, place=place and words.places[place][0])


def _noun(words: PromptWords, thing: _Thing, things: list[_Thing]) -> str:
    taken = {other.colour for other in things}
    colour = thing.colour or next(name for name in words.names["colour"] if name not in taken)
    if thing.colour is None:
        thing.colour = colour
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing.name}"


def _style(words: PromptWords, items: list[_Item]) -> str | None:
    said = [item for item in items if item.kind == "style" and item.meaning is not None]
    said.sort(key=lambda item: (item.said in words.faint, not item.meaning.same))  # type: ignore[union-attr]
    return said[0].meaning.name if said else None  # type: ignore[union-attr]


def _background(words: PromptWords, items: list[_Item]) -> str | None:
    order = words.names["background"]
    said = [item.meaning for item in items if item.kind == "background" and item.meaning is not None]
    said.sort(key=lambda meaning: (not meaning.same, order.index(meaning.name)))
    return said[0].name if said else None
