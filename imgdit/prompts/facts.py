"""What a model's captions can say, and which other words mean the same: facts in the folder of its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from imgdit.io.safe_json import read_object
from imgdit.naming import check_name

KEY = "prompt_words"
"""Where a tokenizer's configuration keeps the facts."""
FILE = "tokenizer_config.json"
KINDS = ("object", "colour", "style", "background")
"""What a caption names."""
ARTICLES = ("a", "an", "the")


class Meaning(NamedTuple):
    """What a word or phrase means."""

    kind: str
    """One of `KINDS`."""
    name: str
    """As the captions say it."""
    same: bool
    """Whether it means the same; otherwise it only comes nearest."""
    plural: bool = False


@dataclass(frozen=True)
class PromptWords:
    """The words and patterns of a model's captions.

    Raises:
        ValueError: a kind that captions do not name, or a part that is missing.
    """

    names: Mapping[str, list[str]]
    """Kind of `KINDS` -> the names that captions know. Of two backgrounds in a prompt, the first in this order
    counts."""
    same: Mapping[str, Mapping[str, list[str]]]
    """Kind -> name -> words and phrases that mean the same."""
    near: Mapping[str, Mapping[str, list[str]]]
    """Kind -> name -> words and phrases to which it only comes nearest."""
    places: Mapping[str, list[str]]
    """Background -> the phrases that captions say for it, the usual one first."""
    looks: Mapping[str, list[str]]
    """Style -> patterns of a `{subject}` that say it."""
    pairs: Mapping[str, list[str]]
    """"left" where the first of two objects is left of the second, else "beside" -> patterns of `{first}` and
    `{second}`."""
    patterns: list[str]
    """Captions: patterns of `{subject}`, `{style}`, `{place}` and `{look}`."""
    plain: Mapping[str, str]
    """The usual caption by what is said beside the objects: "", "style", "place", "style place"."""
    scenery: list[str] = field(default_factory=list)
    """Parts of a background ("floor"), whose colours are none of an object."""
    faint: list[str] = field(default_factory=list)
    """Words for a style that yield to any other style in a prompt ("photo" in "an old sepia photo")."""

    def __post_init__(self) -> None:
        for part in (self.names, self.same, self.near):
            for kind in part:
                check_name("kind of word", kind, KINDS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptWords:
        """The facts as JSON keeps them.

        Raises:
            ValueError: unknown or missing keys.
        """
        known = [one.name for one in fields(cls)]
        for name in values:
            check_name(f"key of {KEY}", name, known)
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{KEY}: {error}") from error

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> PromptWords | None:
        """The facts of a loaded tokenizer; `None`: it has none."""
        values = getattr(tokenizer, "init_kwargs", {}).get(KEY)
        return None if values is None else cls.from_dict(values)

    @classmethod
    def of_folder(cls, folder: str | Path) -> PromptWords | None:
        """The facts of a pipeline's folder, read without loading the tokenizer; `None`: it has none."""
        path = Path(folder) / "tokenizer" / FILE
        values = read_object(path).get(KEY) if path.is_file() else None
        return None if values is None else cls.from_dict(values)

    @cached_property
    def phrases(self) -> dict[tuple[str, ...], Meaning]:
        """Every known phrase without its articles, with what it means; objects in the plural too."""
        found: dict[tuple[str, ...], Meaning] = {}
        for phrase, meaning in self._meanings():
            words = tuple(word for word in re.findall(r"[^\W_]+", phrase.lower()) if word not in ARTICLES)
            found.setdefault(words, meaning)
            if meaning.kind == "object":
                for plural in _plurals(words[-1]):
                    found.setdefault((*words[:-1], plural), meaning._replace(plural=True))
        return found

    def _meanings(self) -> Iterator[tuple[str, Meaning]]:
        for kind, names in self.names.items():
            yield from ((name, Meaning(kind, name, True)) for name in names if kind != "background")
        for background, said in self.places.items():
            for phrase in said:
                yield phrase, Meaning("background", background, True)
                bare = phrase.partition(" ")[2]  # "on a wooden floor" is said as "the wooden floor" too
                if len([word for word in bare.split() if word not in ARTICLES]) > 1:
                    yield bare, Meaning("background", background, True)
        for same, part in ((True, self.same), (False, self.near)):
            for kind, names_of in part.items():
                for name, words in names_of.items():
                    yield from ((word, Meaning(kind, name, same)) for word in words)

    @cached_property
    def longest(self) -> int:
        """Words of the longest phrase."""
        return max(map(len, self.phrases))

    @cached_property
    def spellings(self) -> list[str]:
        """Single words whose misspellings are recognised."""
        return [phrase[0] for phrase, meaning in self.phrases.items() if len(phrase) == 1 and meaning.same]

    @cached_property
    def _subjects(self) -> re.Pattern[str]:
        """What may stand for `{subject}`."""
        noun = rf"(?:an? )(?:{_one_of(self.names['colour'])}) (?:{_one_of(self.names['object'])})"
        told = [pattern for patterns in self.pairs.values() for pattern in patterns]
        return re.compile("|".join([noun, *(pattern.format(first=noun, second=noun) for pattern in told)]))

    @cached_property
    def _captions(self) -> tuple[re.Pattern[str], ...]:
        """An expression for every caption, with the group `subject` where there is one."""
        groups = {
            "subject": "(?P<subject>.+?)",
            "style": f"(?:{_one_of(self.names['style'])})",
            "place": f"(?:{_one_of(phrase for said in self.places.values() for phrase in said)})",
        }
        looks = [look.format(**groups) for said in self.looks.values() for look in said]
        return tuple(
            re.compile(pattern.format(**groups, look=look))
            for pattern in self.patterns
            for look in (looks if "{look}" in pattern else [""])
        )

    def is_caption(self, prompt: str) -> bool:
        """Whether a prompt is a caption as the model was trained on; case and spaces are ignored."""
        text = " ".join(prompt.lower().split())
        for pattern in self._captions:
            found = pattern.fullmatch(text)
            if found and all(self._subjects.fullmatch(subject) for subject in found.groupdict().values()):
                return True
        return False


def _one_of(phrases: Iterable[str]) -> str:
    return "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))


def _plurals(word: str) -> tuple[str, ...]:
    if word.endswith("s"):
        return (f"{word}es",)
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return (f"{word[:-1]}ies",)
    return f"{word}s", f"{word}es"
