"""Questions about images, answered by the likelihood of each choice, as a report.

Any pipeline with `choose(images, questions, choices)` is a judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from imgdit.images import open_image, to_rgb
from imgdit.images.fitting import check_sides
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
        strings = strings and len(set(choices)) == len(choices)
        if not isinstance(values.get("question"), str) or set(values) - set(KEYS) or not strings or len(choices) < 2:
            raise ValueError(
                f"{place}: expected question, and if wanted choices (two texts or more, none twice) and expected"
            )
        expected = values.get("expected")
        if expected is not None and expected not in choices:
            raise ValueError(f"{place}: expected is {expected!r}, none of the choices {', '.join(choices)}")
        found.append(Question(values["question"], tuple(choices), expected))
    if not found:
        raise ValueError(f"{file} holds no question")
    return found


def check_questions(questions: Sequence[Question]) -> None:
    """Refuse a question that is asked twice with the same choices: its answers would be counted together.

    Raises:
        ValueError: names it.
    """
    seen: set[tuple] = set()
    for one in questions:
        if one[:2] in seen:
            raise ValueError(f"the question {one.text!r} is asked twice with the choices {', '.join(one.choices)}")
        seen.add(one[:2])


def judge(
    pipe: Any, images: Sequence[Path], questions: Sequence[Question], batch_size: int = 8,
    broken: list[str] | None = None,
) -> Iterator[Verdict]:  # fmt: skip
    """Answers to all questions about all images, image by image in batches.

    Args:
        pipe: see `load_image_text_pipeline`.
        images: files.
        batch_size: images that are read at once.
        broken: gets a line for each image that cannot be read, which is left out; `None`: it is an error.

    Raises:
        ValueError: an image that cannot be read, or a question that is asked twice.
    """
    check_questions(questions)
    for first in range(0, len(images), batch_size):
        some, shown = [], []
        for path in images[first : first + batch_size]:
            try:
                shown.append(read_image(path))
                some.append(path)
            except (ValueError, OSError) as error:
                if broken is None:
                    raise
                broken.append(f"{path}: {error}")
        for question in questions if some else ():
            found = pipe.choose(shown, question.text, question.choices)
            probabilities = found.log_likelihoods.softmax(1).tolist()
            for path, best, row in zip(some, found.best, probabilities):
                answer, expected = question.choices[best], question.expected
                yield Verdict(
                    str(path), question.text, answer, dict(zip(question.choices, row)),
                    None if expected is None else answer == expected,
                )  # fmt: skip


def read_image(path: Path) -> Image.Image:
    """An image file of sides that models read, upright and in RGB.

    Raises:
        ValueError: it cannot be read, or is too small or too narrow.
    """
    image = open_image(path)
    check_sides(image.size, f"{str(path)!r}")
    return to_rgb(image)


def report(
    model: str, questions: Sequence[Question], verdicts: Sequence[Verdict], broken: Sequence[str] = ()
) -> dict[str, Any]:
    """The whole of a run as plain values: how often each choice was the best one, how often it was right, all rows,
    and the images that could not be read."""
    summary = []
    for question in questions:
        rows = [
            one for one in verdicts if (one.question, tuple(one.probabilities)) == (question.text, question.choices)
        ]
        values: dict[str, Any] = {
            "question": question.text,
            "images": len(rows),
            "answers": {choice: sum(one.best == choice for one in rows) for choice in question.choices},
        }
        if question.expected is not None:
            values |= {"expected": question.expected, "right": sum(bool(one.right) for one in rows)}
        summary.append(values)
    found = {"model": model, "questions": summary, "rows": [one._asdict() for one in verdicts]}
    return found | ({"broken": list(broken)} if broken else {})
