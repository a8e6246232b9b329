"""What `imgdit bench text` measures: a pipeline that writes about images, as a `Writer` and an `Illustrator`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from imgdit.benchmarks.scenes.maker import PipelineMaker
from imgdit.images import to_image
from imgdit.pipelines.image_text import ImageTextPipeline
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler


class PipelineWriter:
    """Captions, answers and fillings of one pipeline, and where it generates images, these too.

    Every row has its own generator, so the batch size changes nothing.

    Args:
        pipe: `ImageTextPipeline`, or what has its `caption`, `answer`, `fill` and `joint`.
        text_steps: of the text scheduler; `None`: the pipeline's own default.
        steps, guidance: of images, see `PipelineMaker`.
        batch: rows at a time.
    """

    def __init__(
        self, pipe: Any, text_steps: int | None = None, steps: int = 28, guidance: float = 3.0, batch: int = 16
    ):
        self.pipe, self.text_steps, self.steps, self.batch = pipe, text_steps, steps, batch
        pipe.set_progress_bar_config(disable=True)
        self.maker = None
        if isinstance(pipe, ImgDiTPipeline):
            names = inspect.signature(ImgDiTPipeline.__init__).parameters
            parts = {name: part for name, part in pipe.components.items() if name in names}
            self.maker = PipelineMaker(ImgDiTPipeline(**parts), steps, guidance, batch=batch)

    @property
    def can(self) -> tuple[str, ...]:
        """Which of the parts of `imgdit bench text` can be measured."""
        has = {
            "captions": True,
            "answers": True,
            "fillings": hasattr(self.pipe, "fill"),
            "round trips": self.maker is not None,
            "judge": hasattr(self.pipe, "choose"),
            "schedules": hasattr(self.pipe, "text_scheduler"),
            "cache": isinstance(self.pipe, ImageTextPipeline) and not self.pipe.follows_reference,
        }
        return tuple(name for name, there in has.items() if there)

    @property
    def joint_task(self) -> str:
        """How `joint` of the model works: text frames that read clean images only are written before their images."""
        one_by_one = self.pipe.follows_reference or self.pipe.text_adapter is not None
        return "text without an image → image" if one_by_one else "image and text at once"

    def caption(
        self,
        images: torch.Tensor,
        seed: int,
        steps: int | None = None,
        shift: float | None = None,
        cache: bool | None = None,
    ) -> list[str]:
        kept = {} if cache is None else {"cache": cache}
        own = self.pipe.text_scheduler
        if shift is not None:
            self.pipe.text_scheduler = MaskedTextScheduler.from_config(own.config, reveal="shift", shift=shift)
        try:
            return self._texts(
                "captions", len(images), seed, steps,
                lambda rows, options: self.pipe.caption(_images(images, rows), **options, **kept),
            )  # fmt: skip
        finally:
            self.pipe.text_scheduler = own

    def answer(self, images: torch.Tensor, questions: Sequence[str], seed: int) -> list[str]:
        return self._texts(
            "answers", len(images), seed, None,
            lambda rows, options: self.pipe.answer(_images(images, rows), [questions[i] for i in rows], **options),
        )  # fmt: skip

    def fill(self, texts: Sequence[str], images: torch.Tensor, seed: int) -> list[str]:
        return self._texts(
            "fillings", len(images), seed, None,
            lambda rows, options: self.pipe.fill([texts[i] for i in rows], _images(images, rows), **options),
        )  # fmt: skip

    def choose(self, images: torch.Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]]) -> list[int]:
        """See `imgdit.benchmarks.scenes.judge.Judge`."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for i, among in enumerate(choices):
            alike.setdefault(tuple(among), []).append(i)
        best = [0] * len(questions)
        for among, rows in alike.items():
            for start in range(0, len(rows), self.batch):
                some = rows[start : start + self.batch]
                found = self.pipe.choose(_images(images, some), [questions[i] for i in some], among)
                for i, number in zip(some, found.best):
                    best[i] = number
        return best

    def images(self, prompts: Sequence[str], seed: int) -> torch.Tensor:
        assert self.maker is not None
        return self.maker.images(prompts, seed)

    def joint(self, count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
        images: list[torch.Tensor] = []

        def both(rows: range, options: dict[str, Any]) -> Any:
            options["num_inference_steps"] = self.steps
            output = self.pipe.joint(len(rows), "pt", **options)
            images.append(output.images.float().cpu())
            return output

        texts = self._texts("images with captions", count, seed, None, both)
        return torch.cat(images), texts

    def _texts(
        self, name: str, count: int, seed: int, steps: int | None, write: Callable[[range, dict[str, Any]], Any]
    ) -> list[str]:
        texts: list[str] = []
        chosen = self.text_steps if steps is None else steps
        for start in tqdm(range(0, count, self.batch), desc=name, disable=None):
            rows = range(start, min(start + self.batch, count))
            options: dict[str, Any] = {
                "generator": [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in rows]
            }
            if chosen is not None:
                options["num_inference_steps"] = chosen
            texts += write(rows, options).texts
        return texts


def _images(images: torch.Tensor, rows: Sequence[int]) -> list[Any]:
    return [to_image(images[i]) for i in rows]
