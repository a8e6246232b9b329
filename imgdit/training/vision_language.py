"""Dialogues about images for training: what people bring, its batches, and which parts of a model a stage trains.

Stages of LLaDA-V (arXiv 2505.16933, section 3.2) and LaViDa (arXiv 2505.16839): first the projector on captions, then
projector and language model, in LLaDA-V the tower too, on dialogues; or a LoRA on the language model.

B rows, T tokens.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from imgdit.data.rows import Blob, FileBlob
from imgdit.data.sources import open_rows
from imgdit.images.fitting import Size
from imgdit.images.tiles import cut_tiles, read_image
from imgdit.io.safe_json import as_object, inside, parse_object, read_json
from imgdit.io.text import read_lines
from imgdit.models.vision_language import UNUSED, VisionLanguageModel, load_vision_language, read_tiling
from imgdit.naming import check_choice
from imgdit.pipelines.dialogues import (
    NO_TARGET,
    Message,
    SpecialTokens,
    Targets,
    caption_ids,
    check_messages,
    dialogue_ids,
    label,
    with_images,
)
from imgdit.pipelines.text_loading import load_tokenizer
from imgdit.training.batches import Movable
from imgdit.training.text_rows import HELD_OUT

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""Speakers in LLaVA's files -> roles."""


def projector_stage(
    source: str, *, subfolder: str | None = None, dtype: Any = torch.float32, **options: Any
) -> VisionLanguageModel:
    """A model of which only the projector and the newline vector are trained."""
    model = load_vision_language(source, subfolder=subfolder, dtype=dtype, **options)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    return model


def instruction_stage(
    source: str, *, subfolder: str | None = None, dtype: Any = torch.float32, **options: Any
) -> VisionLanguageModel:
    """A model of which all but the vision tower is trained."""
    model = load_vision_language(source, subfolder=subfolder, dtype=dtype, **options)
    model.vision_tower.requires_grad_(False)
    return model


def whole_stage(
    source: str, *, subfolder: str | None = None, dtype: Any = torch.float32, **options: Any
) -> VisionLanguageModel:
    """A model that is trained as a whole, as LLaDA-V's is in its second stage: the tower by a rate of its own, see
    `optimizer.rates`."""
    model = load_vision_language(source, subfolder=subfolder, dtype=dtype, **options).requires_grad_(True)
    for name, parameter in model.vision_tower.named_parameters():
        parameter.requires_grad_(not re.match(UNUSED, name))
    return model


@dataclass(frozen=True, eq=False)
class VisionRows(Movable):
    """Rows of tokens with images."""

    ids: torch.Tensor
    """(B, T), `IMAGE_PLACE` where an image stands, padded with the end token."""
    targets: torch.Tensor
    """Boolean (B, T), tokens that are masked and learnt."""
    turns: torch.Tensor
    """(B, T) number of each token's turn."""
    tiles: torch.Tensor
    """(tiles, 3, S, S) of all images."""
    counts: tuple[int, ...]
    """Tiles of each image."""
    shown: tuple[Size, ...]
    """Width and height of each image in pixels."""
    images: tuple[int, ...]
    """Images of each row."""


def collate_vision_rows(samples: Sequence[VisionRows]) -> VisionRows:
    """Rows of one length to one batch."""
    return VisionRows(
        ids=torch.cat([one.ids for one in samples]),
        targets=torch.cat([one.targets for one in samples]),
        turns=torch.cat([one.turns for one in samples]),
        tiles=torch.cat([one.tiles for one in samples]),
        counts=tuple(count for one in samples for count in one.counts),
        shown=tuple(size for one in samples for size in one.shown),
        images=tuple(count for one in samples for count in one.images),
    )


class Dialogue(NamedTuple):
    """A sample as it was brought."""

    messages: Sequence[Message]
    images: Sequence[Blob]


class UserDialogues:
    """Dialogues about images: a file as LLaVA's, or images with captions.

    Args:
        path: `.json` (a list) or `.jsonl` of {"image": file or files, "conversations": [{"from": "human", "value":
            "<image>\\nWhat is it?"}, {"from": "gpt", "value": "a cube"}]}; files are named from the folder that it
            lies in, and rows without image are text. Or anything that `imgdit.data.open_rows` reads: each caption is
            then the answer to `question`.
        model: folder or Hub repository of the model, for its tokenizer and tiling.
        style: "dialogue"; "caption": the image and its caption without a dialogue, for the projector.
        targets: what is learnt of dialogues: "turns" as LLaDA-V, "answer" (the last one) as LaViDa.
        question: of captions.
        length: tokens of a row, an image counted as one; what is behind the last answer are end tokens, which are
            learnt too.
        split: "train", or "heldout": every twentieth sample.

    Raises:
        ValueError: no such file, a sample that is none, or fewer samples than the splits need.
    """

    def __init__(
        self,
        path: str = "dialogues.json",
        model: str = "",
        style: Literal["dialogue", "caption"] = "dialogue",
        targets: Targets = "answer",
        question: str = "Describe the image in detail.",
        length: int = 128,
        split: str = "train",
    ):
        check_choice("style", style, ("dialogue", "caption"))
        check_choice("split", split, ("train", "heldout"))
        if not model:
            raise ValueError("name the model in data.arguments.model, for its tokenizer and tiling")
        place = Path(model).expanduser()
        folder = place / "tokenizer" if (place / "tokenizer").is_dir() else place
        self.tokenizer = load_tokenizer(folder if folder.is_dir() else model)
        self.special, self.tiling = SpecialTokens.of(self.tokenizer), read_tiling(model)
        self.style, self.targets, self.length = style, targets, length
        file = Path(path).expanduser()
        found = list(_dialogues(file) if file.suffix in (".json", ".jsonl") else _captions(path, question))
        self.dialogues = [one for n, one in enumerate(found) if (n % HELD_OUT == HELD_OUT - 1) == (split == "heldout")]
        if not self.dialogues:
            raise ValueError(f"{path} has {len(found)} samples, none for the split {split!r}; it needs {HELD_OUT}")

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, index: int) -> VisionRows:
        dialogue = self.dialogues[index]
        images = [read_image(io.BytesIO(blob.read())) for blob in dialogue.images]
        if self.style == "caption":
            ids, labels = caption_ids(self.tokenizer, dialogue.messages[-1]["content"])
        else:
            messages = with_images(check_messages(dialogue.messages), len(images))
            ids = dialogue_ids(self.tokenizer, messages, answers=True)
            labels = label(self.tokenizer, ids, self.special, self.targets)
        if len(ids) >= self.length:
            raise ValueError(
                f"sample {index} has {len(ids)} tokens, length={self.length} leaves no room for an end token"
            )
        tiles = [cut_tiles(image, self.tiling) for image in images]
        ends = self.length - len(ids)
        tokens = torch.tensor([*ids, *[self.special.eos] * ends])
        learnt = torch.tensor([*labels.targets, *[self.special.eos] * ends]) != NO_TARGET
        size = self.tiling.size
        return VisionRows(
            tokens[None],
            (learnt & (tokens != self.special.gap))[None],  # the end of a gap stays where it is
            torch.tensor([*labels.turns, *[labels.turns[-1]] * ends])[None],
            torch.cat([torch.zeros(0, 3, size, size), *tiles]),
            tuple(map(len, tiles)),
            tuple(image.size for image in images),
            (len(images),),
        )


def _captions(path: str, question: str) -> Iterator[Dialogue]:
    """Images with captions as dialogues of one question."""
    for row in open_rows(path).rows:
        for caption in row.captions:
            turns_ = [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
            yield Dialogue(turns_, [row.image])


def _dialogues(file: Path) -> Iterator[Dialogue]:
    """Samples of a file like LLaVA's."""
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r} of dialogues")
    if file.suffix == ".json":
        found = read_json(file)
        if not isinstance(found, list):
            raise ValueError(f"{file} must hold a list of dialogues, got {type(found).__name__}")
        samples = [(as_object(one, f"{file}, entry {n}"), f"{file}, entry {n}") for n, one in enumerate(found)]
    else:
        lines = ((line, f"{file}, line {n}") for n, line in enumerate(read_lines(file), 1) if line.strip())
        samples = [(parse_object(line, place), place) for line, place in lines]
    for values, place in samples:
        yield _dialogue(values, place, file.parent)


def _dialogue(values: dict[str, Any], place: str, folder: Path) -> Dialogue:
    named = values.get("image", [])
    turns = values.get("conversations")
    turns_ = turns if isinstance(turns, list) else []
    if not turns_ or not all(isinstance(one, dict) and one.get("from") in ROLES for one in turns_):
        raise ValueError(f"{place}: expected conversations, a list of from ({', '.join(ROLES)}) and value")
    messages = [{"role": ROLES[one["from"]], "content": str(one.get("value", ""))} for one in turns_]
    while messages and messages[0]["role"] == "assistant":  # as published: a dialogue begins with its question
        messages = messages[1:]
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"{place}: the last of its conversations must be an answer (from: gpt)")
    files = named if isinstance(named, list) else [named]
    blobs: list[Blob] = []
    for name in files:
        found = inside(folder, str(name))
        if not found.is_file():
            raise ValueError(f"{place} names the image {str(found)!r}, which is not there")
        blobs.append(FileBlob(found))
    return Dialogue(messages, blobs)
