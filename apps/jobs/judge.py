"""Questions about images, answered by the likelihood of each choice, as a report.

Any pipeline with `choose(images, questions, choices)` is a judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imgdit.images import open_image, to_rgb
from imgdit.io.safe_json import parse_object
from imgdit.io.text import read_lines

YES_NO = ("yes", "no")
KEYS = ("question", "choices", "expected")


class Question(NamedTuple):
    """What is asked about every image."""

    text: str
    choices: tuple[str, ...] = YES_NO
    expected: str | None = None
    """The right choice, where it is known."""


class Verdict(NamedTuple):
    """The answer to one question about one image."""

    image: str
    question: str
    best: str
    probabilities: dict[str, float]
    """Of each choice, among the choices: the likelihoods of all tokens of an answer, so that longer ones have less."""
    right: bool | None
    """Whether the best one was expected; `None` where none was."""


def read_questions(file: Path) -> list[Question]:
    """Questions of a file: an object per line with `question`, and if wanted `choices` and `expected`.

    Raises:
        ValueError: no such file, or a line that is none.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r} of questions")
    found = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        values, place = parse_object(line, f"{file}, line {number}"), f"{file}, line {number}"
        choices = values.get("choices", list(YES_NO))
        strings = isinstance(choices, list) and all(isinstance(one, str) and one.strip() for one in choices)
        if not isinstance(values.get("question"), str) or set(values) - set(KEYS) or not strings or len(choices) < 2:
            raise ValueError(f"{place}: expected question, and if wanted choices (two texts or more) and expected")
        expected = values.get("expected")
        if expected is not None and expected not in choices:
            raise ValueError(f"{place}: expected is {expected!r}, none of the choices {', '.join(choices)}")
        found.append(Question(values["question"], tuple(choices), expected))
    if not found:
        raise ValueError(f"{file} holds no question")
    return found


def judge(pipe: Any, images: Sequence[Path], questions: Sequence[Question], batch_size: int = 8) -> Iterator[Verdict]:
    """Answers to all questions about all images, image by image in batches.

    Args:
        pipe: see `load_image_text_pipeline`.
        images: files.
        batch_size: images that are read at once.

    Raises:
        ValueError: an image that cannot be read.
    """
    for first in range(0, len(images), batch_size):
        some = images[first : first + batch_size]
        shown = [to_rgb(open_image(path)) for path in some]
        for question in questions:
            found = pipe.choose(shown, question.text, question.choices)
            probabilities = found.log_likelihoods.softmax(1).tolist()
            for path, best, row in zip(some, found.best, probabilities):
                said, expected = question.choices[best], question.expected
                yield Verdict(
                    str(path), question.text, said, dict(zip(question.choices, row)),
                    None if expected is None else said == expected,
                )  # fmt: skip


def report(model: str, questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The whole of a run as plain values: how often each choice was the best one, how often it was right, all rows."""
    summary = []
    for question in questions:
        rows = [one for one in verdicts if one.question == question.text]
        values: dict[str, Any] = {
            "question": question.text,
            "images": len(rows),
            "answers": {choice: sum(one.best == choice for one in rows) for choice in question.choices},
        }
        if question.expected is not None:
            values |= {"expected": question.expected, "right": sum(bool(one.right) for one in rows)}
        summary.append(values)
    return {"model": model, "questions": summary, "rows": [one._asdict() for one in verdicts]}
