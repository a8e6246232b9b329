"""The folder of a model's text frames: what reads and writes text beside a transformer that was trained without it.

adapter.safetensors   LoRA on the rows of the text
head.safetensors      text head and embeddings of its tokens
tokenizer/            with a mask token
questions.json        forms of the questions that it was trained to answer, and answers that confirm what they claim;
                      without it any question is taken
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from imgdit import compat
from imgdit.io.safe_json import read_object
from imgdit.lora.dialects import LoraPair
from imgdit.lora.files import (
    AdapterInfo,
    adapter_pairs,
    attach_adapter,
    legal_name,
    loaded_adapters,
    read_adapter,
    write_adapter,
)
from imgdit.lora.rows import refuse_disabled
from imgdit.models.mmdit import MMDiT
from imgdit.models.text_head import load_text_head, save_text_head
from imgdit.naming import check_name
from imgdit.pipelines.texts import unknown_words

FOLDER = "text_frames"
"""Where it lies in a pipeline's folder."""
ADAPTER, HEAD, TOKENIZER, QUESTIONS = "adapter.safetensors", "head.safetensors", "tokenizer", "questions.json"
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class QuestionForms:
    """The questions that a model was trained to answer."""

    forms: tuple[str, ...]
    """Questions with names for their words: "what colour is the {kind}?"."""
    words: Mapping[str, Sequence[str]]
    """The words that each name stands for."""
    confirmations: Mapping[str, str] = field(default_factory=dict)
    """Of forms that make a claim, the answer that confirms it and says what is shown: "is the {kind} {colour}?" ->
    "yes, {colour}"."""

    def __post_init__(self) -> None:
        words = [word for known in self.words.values() for word in known]
        for text in (*self.forms, *words, *self.confirmations.values()):
            if not isinstance(text, str):
                raise ValueError(f"forms, words and confirmations are texts, got {text!r}")
        for form in self.forms:
            for name in _PLACE.findall(form):
                check_name(f"name in {form!r}", name, self.words)
        for form, answer in self.confirmations.items():
            check_name("form with a confirmation", form, self.forms)
            for name in _PLACE.findall(answer):
                check_name(f"name in {answer!r}", name, _PLACE.findall(form))

    def check(self, question: str) -> None:
        """Refuse a question of another form; case and spaces do not matter.

        Raises:
            ValueError: names all forms.
        """
        if any(self._match(form, question) for form in self.forms):
            return
        used = [name for name in self.words if any(name in _PLACE.findall(form) for form in self.forms)]
        words = "; ".join(f"{name}: {', '.join(self.words[name])}" for name in used)
        raise ValueError(
            f"the model was not trained to answer {question!r}. It answers {' '.join(self.forms)}"
            + (f" ({words})" if words else "")
        )

    def confirmation(self, question: str) -> str | None:
        """The whole answer that confirms what a question claims; `None`: it claims nothing, or its answer says no
        more than yes or no."""
        for form, answer in self.confirmations.items():
            if (match := self._match(form, question)) is not None:
                said = dict(zip(_PLACE.findall(form), match.groups()))
                return _PLACE.sub(lambda place: said[place[1]], answer)  # noqa: B023, called in this pass
        return None

    def _match(self, form: str, question: str) -> re.Match[str] | None:
        """A group for each name of a form, if a question is of that form; case and spaces do not matter."""
        parts = _PLACE.split(form)
        parts[::2] = [re.escape(part) for part in parts[::2]]
        parts[1::2] = [f"({'|'.join(map(re.escape, self.words[name]))})" for name in parts[1::2]]
        return re.fullmatch("".join(parts), " ".join(question.lower().split()))


class TextFrames(NamedTuple):
    """What `load_text_frames` loaded."""

    adapter: str
    """Name of the LoRA that reads texts."""
    tokenizer: PreTrainedTokenizerBase
    questions: QuestionForms | None
    """`None`: any."""


class TextFramesMixin:
    """What pipelines with text frames share."""

    text_adapter: str | None = None
    """Name of the LoRA that reads texts that are generated."""
    text_questions: QuestionForms | None = None
    """Questions that are answered; `None`: any."""

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """diffusers' `save_pretrained`.

        Raises:
            ValueError: text frames are loaded, whose LoRA is not part of a pipeline's folder.
        """
        if self.text_adapter is not None:
            raise ValueError(
                f"the LoRA {self.text_adapter!r} of the text frames is not part of a pipeline's folder: save the "
                "pipeline before load_text_frames, and copy the folder of the text frames beside it"
            )
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]

    def check_known_words(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        """Refuse words that text frames were never trained on, which their tokenizer spells in bytes.

        Raises:
            ValueError: names them.
        """
        if self.text_adapter is None:
            return
        for text in texts:
            unknown = unknown_words(tokenizer, text)
            if unknown:
                raise ValueError(f"the model was never trained on {', '.join(map(repr, unknown))} in {text!r}")


def loaded_text_frames(pipe: Any) -> TextFrames | None:
    """What was loaded for a pipeline's transformer, by this pipeline or another one.

    Raises:
        ValueError: its LoRA is not there any more or switched off.
    """
    model = compat.unwrapped(pipe.transformer)
    found: TextFrames | None = getattr(model, "text_frames", None)
    if found is None:
        return None
    if found.adapter not in loaded_adapters(model):
        raise ValueError(
            f"the LoRA {found.adapter!r} that reads texts was removed from this transformer, which writes nothing "
            "without it; load the model again"
        )
    refuse_disabled(model, [found.adapter])
    return found


def find_text_frames(pipe: Any) -> Path | None:
    """The folder beside a pipeline's parts, of which the transformer knows where it is from; `None`: there is none."""
    source = pipe.transformer.config.get("_name_or_path")
    folder = None if not source else Path(source).parent / FOLDER
    return folder if folder is not None and (folder / HEAD).is_file() else None


def load_text_frames(pipe: Any, folder: str | Path) -> TextFrames:
    """Give a pipeline's transformer a text head and the adapter that reads its texts. The adapter acts on texts that
    are generated and on nothing else: images stay bitwise what they are.

    Args:
        pipe: with an `MMDiT` without a text head.
        folder: see above.

    Raises:
        ValueError: another transformer, or files of another model.
    """
    folder, model = Path(folder), compat.unwrapped(pipe.transformer)
    if not isinstance(model, MMDiT):
        raise ValueError(f"text frames are for MMDiT, got {type(model).__name__}")
    adapter = read_adapter(folder / ADAPTER)
    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
    questions = _read_questions(folder / QUESTIONS) if (folder / QUESTIONS).is_file() else None
    load_text_head(model, folder / HEAD)
    name = legal_name(FOLDER, loaded_adapters(model))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    attach_adapter(model, adapter, name, pipeline=pipe)
    for parameter in model.parameters():
        # PEFT freezes the model, and torch has another kernel for norms whose weights are frozen.
        parameter.requires_grad_(id(parameter) in trained)
    model.text_frames = TextFrames(name, tokenizer, questions)
    return model.text_frames


def _read_questions(path: Path) -> QuestionForms:
    values = read_object(path)
    try:
        words = {name: tuple(words) for name, words in values["words"].items()}
        return QuestionForms(tuple(values["forms"]), words, dict(values.get("confirmations", {})))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold forms of questions: {error}") from error


def save_text_frames(
    model: MMDiT,
    adapter: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    info: AdapterInfo | None = None,
    questions: QuestionForms | None = None,
) -> None:
    """Write a folder of text frames, in half precision.

    Args:
        model: with a text head, and a LoRA of the name `adapter` that reads its texts.
        tokenizer: whose `model_max_length` says how many tokens a text may have.
        info: how the adapter was trained.
        questions: that it was trained to answer; `None`: any.
    """
    folder = Path(folder)
    pairs = {name: LoraPair(pair.down.half(), pair.up.half()) for name, pair in adapter_pairs(model, adapter).items()}
    write_adapter(folder / ADAPTER, pairs, info or AdapterInfo(task="text"))
    save_text_head(model, folder / HEAD)
    tokenizer.save_pretrained(folder / TOKENIZER)
    if questions is not None:
        (folder / QUESTIONS).write_text(json.dumps(asdict(questions), indent=1) + "\n", encoding="utf-8")
