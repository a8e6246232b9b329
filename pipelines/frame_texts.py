"""Text frames of `OneDiffusionPipeline`: prompts among the frames, and texts that are generated beside images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from imgdit.frames import TextFrame
from imgdit.pipelines.image_text import ImageTextPipeline
from imgdit.pipelines.image_text_inputs import filling_rows, question_rows, texts_of
from imgdit.pipelines.text_frames import find_text_frames, loaded_text_frames
from imgdit.tasks import ImageFrame

LENGTH = 64
"""Tokens of a text that is generated, where neither the call nor the tokenizer says less."""


class SplitFrames(NamedTuple):
    """The frames of a call by kind."""

    images: list[ImageFrame] | None
    """`None`: the call named no frames."""
    prompt: str | list[str] | None
    """Of the call, or of a clean text frame."""
    texts: list[TextFrame]
    """Texts that are generated."""


def split_frames(frames: Sequence[ImageFrame | TextFrame] | None, prompt: str | list[str] | None) -> SplitFrames:
    """Tell image frames from texts.

    Raises:
        ValueError: two prompts, a text frame without its text, or texts that are generated with anything but one
            image.
    """
    if frames is None or not any(isinstance(frame, TextFrame) for frame in frames):
        return SplitFrames(None if frames is None else list(frames), prompt, [])  # type: ignore[arg-type]
    images = [frame for frame in frames if isinstance(frame, ImageFrame)]
    texts = [frame for frame in frames if isinstance(frame, TextFrame)]
    clean = [text for text in texts if text.is_clean]
    for text in clean:
        if text.sigma != 0.0 or text.text is None:
            raise ValueError(f'a clean text says something: TextFrame.clean("a red cube"); got {text}')
    if len(clean) + (prompt is not None) > 1:
        raise ValueError("there are several prompts; give one, as prompt= or as a clean text frame")
    if clean:
        texts_ = texts_of("a clean text frame", clean[0].text)
        prompt = texts_[0] if len(texts_) == 1 else texts_
    generated = [text for text in texts if not text.is_clean]
    if generated:
        _check_generated(images, generated, prompt)
    return SplitFrames(images, prompt, generated)


def _check_generated(images: list[ImageFrame], texts: list[TextFrame], prompt: Any) -> None:
    if prompt is not None:
        raise ValueError(
            "a text that is generated is about an image, and a prompt is for one; generate the image first, and then "
            "the text about it"
        )
    if len(images) > 1 or any(frame.kind != "image" or frame.adapter for frame in images):
        texts_ = ", ".join(frame.kind for frame in images)
        raise ValueError(f"a text is generated about one frame of kind 'image', got {texts_}; call once for each")
    for text in texts:
        if text.text is not None and text.question is not None:
            raise ValueError("a text frame has a text to fill or a question to answer, not both")
        for name in ("adapter", "keep", "block", "guidance"):
            if getattr(text, name) is not None:
                raise ValueError(f"pipelines decide {name} of a text frame; leave it out")
        if text.text is not None:
            texts_of("the text to fill", text.text)
        elif not images:
            asked = "a question needs the image that it is about" if text.question is not None else "there is no image"
            raise ValueError(
                f"{asked}: add ImageFrame.clean(photo), or ImageFrame.generate() to generate an image with its text"
            )
        if text.question is not None:
            texts_of("the question", text.question)
    if images and not images[0].is_clean and (len(texts) > 1 or texts[0].text or texts[0].question):
        raise ValueError("an image is generated together with one whole text, TextFrame.generate(); give the image")


@dataclass(frozen=True, eq=False)
class TextWriter:
    """Generates texts for another pipeline, over its components."""

    pipe: Any
    """Of the call."""
    writer: ImageTextPipeline

    @classmethod
    def over(cls, pipe: Any) -> TextWriter:
        """The writer of a pipeline, whose text frames are loaded if they lie beside it.

        Raises:
            ValueError: the model has no text head.
        """
        loaded = loaded_text_frames(pipe)
        if loaded is not None:
            pipe.text_adapter, pipe.text_tokenizer, pipe.text_questions = loaded
        if pipe.transformer.config.get("text_vocab_size") is None:
            folder = find_text_frames(pipe)
            if folder is None:
                raise ValueError(
                    f"this {type(pipe.transformer).__name__} has no text head (text_vocab_size is None) and generates "
                    "no text. The model that comes along ('embedded') has one, Dual Diffusion's folders too"
                )
            pipe.load_text_frames(folder)
        parts = {
            name: pipe.components[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
        }
        tokenizer = pipe.text_tokenizer
        length = min((tokenizer or pipe.tokenizer).model_max_length, LENGTH)
        writer = ImageTextPipeline(**parts, text_tokenizer=tokenizer, text_length=length)
        writer.text_adapter, writer.text_questions = pipe.text_adapter, pipe.text_questions
        writer.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        writer.names_unknown_words = False
        return cls(pipe, writer)

    def options(self, callback: Callable[..., Any] | None, **others: Any) -> dict[str, Any]:
        """Options of the writer, whose callback is called with the pipeline of the call."""

        def after(writer: Any, step: int, timestep: int, tensors: dict[str, Any]) -> Any:
            changed = callback(self.pipe, step, timestep, tensors)  # type: ignore[misc]
            writer._interrupt = self.pipe._interrupt
            return changed

        return {**others, "callback_on_step_end": None if callback is None else after}

    def check(self, frame: TextFrame) -> None:
        """Refuse a text or question that does not fit, before anything is computed."""
        tokenizer, mask = self.writer._text_tokenizer, self.writer.mask_token_id
        longest, length = int(self.writer.config.text_length), self._length(frame)
        if length > longest:
            raise ValueError(f"a text of {length} tokens is longer than the {longest} that the model was trained on")
        if frame.question is not None:
            asked = self.writer.check_questions(frame.question)
            question_rows(tokenizer, asked, self.writer._template, length, mask)
        if frame.text is not None:
            texts = self.writer.check_fillings(frame.text)
            filling_rows(tokenizer, texts, length, mask, self.writer._eos)

    def _length(self, frame: TextFrame) -> int:
        return frame.length or int(self.writer.config.text_length)

    def write(self, frame: TextFrame, latents: Any, options: dict[str, Any]) -> list[str]:
        """The texts of a frame about images (B, C, h, w), one for each, as the frame says."""
        call: dict[str, Any] = {**options, "max_length": self._length(frame)}
        if latents is not None:
            call["latents"] = latents
        if frame.question is not None:
            return self.writer.answer(None, self._each(frame.question, latents), **call).texts or []
        if frame.text is not None:
            return self.writer.fill(self._each(frame.text, latents), **call).texts or []
        return self.writer.caption(**call).texts or []

    @staticmethod
    def _each(texts: str | Sequence[str], latents: Any) -> list[str]:
        """A text for each image; texts of several prompts stand prompt by prompt."""
        prompts = [texts] if isinstance(texts, str) else list(texts)
        if latents is None or len(prompts) in (1, len(latents)) or len(latents) % len(prompts):
            return prompts
        return [text for text in prompts for _ in range(len(latents) // len(prompts))]
