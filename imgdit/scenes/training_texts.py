"""Data of models that read images and write about them: a scene's image with captions and answered questions."""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from imgdit.checkpoints import EMBEDDED
from imgdit.io.order import mixed_seed
from imgdit.models.functional import PATCH, pack
from imgdit.models.mmdit import MMDiT
from imgdit.models.text_head import add_text_head
from imgdit.naming import check_name
from imgdit.recipes import check_arguments
from imgdit.scenes.captions import caption, plain_caption
from imgdit.scenes.latents import SIZE, scene_views
from imgdit.scenes.questions import ANSWERS, ONE_OBJECT, possible_kinds, question
from imgdit.scenes.tokenizer import question_tokenizer
from imgdit.scenes.training_frames import CachedScenes, SceneFrames, scene_components
from imgdit.scenes.world import Scene, pick
from imgdit.training.sources import InTurn
from imgdit.training.text_rows import ImageTexts, TextRow, text_rows

LONGER = 0.3
"""Probability that the rows of a batch of questions are longer than they need to be, as those of users are."""
TEXT_AXIS = 2
"""Rotary axis of texts that are generated: the columns'."""


def scene_text_transformer(
    folder: str, subfolder: str | None = "transformer", dtype: torch.dtype = torch.float32
) -> MMDiT:
    """The transformer of a pipeline's folder with a new text head for `question_tokenizer`, as recipes begin with it.

    A token that the folder's text encoder knows begins with the embedding that the encoder gives it alone.
    """
    transformer = MMDiT.from_pretrained(folder, subfolder=subfolder, dtype=dtype)
    _, text_encoder, known = scene_components(folder)
    tokens = len(scene_question_tokenizer())
    generator = torch.Generator().manual_seed(0)
    add_text_head(transformer, tokens, rope_axis=TEXT_AXIS, embeds=True, generator=generator)
    with torch.no_grad():
        alone = text_encoder(torch.arange(len(known))[:, None])[0][:, 0]  # (V, J)
        weight = transformer.text_embedder.weight
        weight.normal_(std=float(alone.std()), generator=generator)
        weight[: len(known)] = alone.to(weight)
    return transformer


@lru_cache(maxsize=1)
def scene_question_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of these rows, made once."""
    return question_tokenizer()


class SceneImageTexts(CachedScenes):
    """Endless: sample i is a batch of images with their texts, the same for the same i.

    A caption is an answer without a prompt. A question is a prompt, which is never masked. End tokens pad the rows and
    are counted, so that a model learns where texts end.

    Args:
        model: pipeline folder of the autoencoder; "embedded" for the one that comes along.
        latents: folder of the cache, see `data.latents`.
        scenes: training scenes in it.
        images: of a batch.
        captions, questions: rows of each image.
        plain: probability that a caption is `plain_caption`; the others are paraphrases.
        length: tokens of a row. With the end token, captions have up to 29, questions with their answers 12.
        question_length: tokens of a row with a question; batches are then of captions or of questions, some of the
            latter longer, up to `length`. `None`: every batch has both, of `length`.
        caption_every: every so-manieth batch is of captions, where `question_length` is given.
        kinds: weight of each kind of question among those that a scene answers, 0 for a kind that is left out; `None`:
            as `question` draws them.
        two_objects: least probability that the images of a batch of questions show two objects.
        count_padding: whether the end tokens behind the first one of an answer are counted.
        size: pixels per side.
        split: "train" or "heldout".
    """

    def __init__(
        self,
        model: str = EMBEDDED,
        latents: str = "outputs/scenes/latents",
        scenes: int = 6144,
        images: int = 4,
        captions: int = 2,
        questions: int = 6,
        plain: float = 0.0,
        length: int = 32,
        question_length: int | None = None,
        caption_every: int = 2,
        kinds: dict[str, float] | None = None,
        two_objects: float = 0.0,
        count_padding: bool = True,
        size: int = SIZE,
        split: str = "train",
    ):
        if images < 1 or captions < 0 or questions < 0 or captions + questions < 1:
            raise ValueError(f"a batch needs an image and each image a text, got {images=}, {captions=}, {questions=}")
        if question_length is not None and not (captions and questions):
            raise ValueError(f"captions and questions in turn need both, got {captions=} and {questions=}")
        for name, probability in {"plain": plain, "two_objects": two_objects}.items():
            if not 0.0 <= probability <= 1.0:
                raise ValueError(f"{name} is a probability, got {probability}")
        if caption_every < 1:
            raise ValueError(f"caption_every counts batches, so it is at least 1, got {caption_every}")
        for kind in kinds or {}:
            check_name("kind of question", kind, ANSWERS)
        vae, text_encoder, _ = scene_components(model)
        tokenizer = scene_question_tokenizer()
        super().__init__(vae, text_encoder, tokenizer, latents, scenes, split, size, vae.config.scaling_factor)
        self.images, self.captions, self.questions, self.plain, self.length = (
            images, captions, questions, plain, length,
        )  # fmt: skip
        self.question_length, self.caption_every = question_length, caption_every
        self.kinds, self.two_objects, self.count_padding = kinds, two_objects, count_padding
        self.pairs = [n for n in range(self.scenes) if two_objects and len(Scene.sample(n, split).objects) == 2]
        if two_objects and not self.pairs:
            raise ValueError(f"two_objects is {two_objects}, but none of the {self.scenes} scenes has two; take more")
        self.pooled = self.encode([])[1].pooled  # of the empty prompt

    def __getitem__(self, index: int) -> ImageTexts:
        rng = Random(mixed_seed(index, 0))
        latents, rows = [], []
        length, captions, questions = self._kind(index, rng)
        for _ in range(self.images):
            number, view, look = self._draw(rng, asked=not captions)
            latents.append(self.latent(number, "pictures", view, look))
            shown = scene_views(number, self.split).looks[view][look]
            rows += [self._caption(shown, rng) for _ in range(captions)]
            rows += [self._question(shown, rng) for _ in range(questions)]
        texts = text_rows(rows, length, self.tokenizer.eos_token_id, self.count_padding or captions > 0)
        return ImageTexts(pack(torch.stack(latents), PATCH), self.size, texts, self.pooled)

    def _kind(self, index: int, rng: Random) -> tuple[int, int, int]:
        """Tokens of a row, captions and questions of each image of a batch."""
        if self.question_length is None:
            return self.length, self.captions, self.questions
        if index % self.caption_every == 0:
            return self.length, self.captions, 0
        longest = self.length if rng.random() < LONGER else self.question_length
        return rng.randint(self.question_length, longest), 0, self.questions

    def _draw(self, rng: Random, asked: bool) -> tuple[int, int, int]:
        """A scene, a view and a look; of two objects as often as `two_objects` says, where it is asked about."""
        drawn = self.draw(rng)
        if asked and self.two_objects and rng.random() < self.two_objects:
            return pick(rng, self.pairs), *drawn[1:]
        return drawn

    def _caption(self, scene: Scene, rng: Random) -> TextRow:
        text = plain_caption(scene) if rng.random() < self.plain else caption(scene, rng)
        return TextRow([], self._ids(text))

    def _question(self, scene: Scene, rng: Random) -> TextRow:
        asked = question(scene, rng, self._question_kind(scene, rng))
        return TextRow(self._ids(asked.text), self._ids(asked.answer))

    def _question_kind(self, scene: Scene, rng: Random) -> str | None:
        """A kind by `kinds`, where "one" and "two" are equally frequent answers; `None`: as `question` draws it."""
        if self.kinds is None:
            return None
        two = self.two_objects + (1 - self.two_objects) * (1 - ONE_OBJECT)
        rarity = {"count": two / (1 - two) if len(scene.objects) == 1 and two < 1 else 1.0}
        weights = {kind: self.kinds.get(kind, 0.0) * rarity.get(kind, 1.0) for kind in possible_kinds(scene)}
        if not sum(weights.values()):
            return None
        return rng.choices(list(weights), list(weights.values()))[0]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class SceneFramesAndTexts(InTurn):
    """Endless: batches of `SceneFrames` and of `SceneImageTexts` in turn, for the objective `joint`.

    Args:
        frames, texts: arguments of both; `split` and `model` hold for both.
        model: pipeline folder of the autoencoder and text encoder.
        split: "train" or "heldout".
    """

    def __init__(
        self,
        frames: dict[str, Any] | None = None,
        texts: dict[str, Any] | None = None,
        model: str = EMBEDDED,
        split: str = "train",
    ):
        check_arguments(SceneFrames, frames or {}, "data.arguments.frames")
        check_arguments(SceneImageTexts, texts or {}, "data.arguments.texts")
        shared: dict[str, Any] = {"model": model, "split": split}
        super().__init__(SceneFrames(**{**shared, **(frames or {})}), SceneImageTexts(**{**shared, **(texts or {})}))
