"""Rows of text and image codes for MMaDA: what people bring, and batches that mix its tasks.

B rows, L tokens of a row, N codes of an image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imgdit.data.rows import Blob, FileBlob, content_hash
from imgdit.data.sources import open_rows
from imgdit.images.opening import open_image
from imgdit.io.fingerprints import folder_hash
from imgdit.io.order import DataOrder, mixed_seed, row_hash
from imgdit.io.safe_json import inside, parse_object
from imgdit.io.tensor_cache import TensorCache, tensor_key
from imgdit.io.text import read_lines
from imgdit.naming import check_choice, check_name
from imgdit.pipelines.masked_text_inputs import encode_prompts
from imgdit.pipelines.mmada import DESCRIBE, Tokenizers, load_tokenizers, pixels_of, rgb_images
from imgdit.pipelines.mmada_rows import (
    MMaDARows,
    language_rows,
    reasoning_rows,
    text_to_image_rows,
    understanding_rows,
)
from imgdit.training.batches import Movable
from imgdit.training.text_rows import HELD_OUT

TASKS = {
    "text_to_image": ("prompt", "image"),
    "understanding": ("image", "question", "answer"),
    "language": ("prompt", "answer"),
    "reasoning": ("prompt", "reasoning", "image"),
}
"""Tasks, and the keys of a line that is for one."""


@dataclass(frozen=True, eq=False)
class MMaDABatch(Movable):
    """Rows of several tasks, of one length."""

    tokens: torch.Tensor
    """(B, L)."""
    attention_mask: torch.Tensor
    """(B, L), 0 on padding that is not seen."""
    learnt: torch.Tensor
    """Boolean (B, L), what may be masked and is learnt."""
    empty: torch.Tensor
    """(B, L): the rows with an empty prompt, where the task is text to image; else the rows."""
    empty_mask: torch.Tensor
    """(B, L), of these."""
    tasks: tuple[str, ...]
    """Of each row, by names of `TASKS`."""


@dataclass(frozen=True)
class MMaDASettings:
    """Arguments of the data "mmada".

    Raises:
        ValueError: an unknown task, or no task at all.
    """

    path: str = "training_images"
    """Images with captions, see `imgdit.data.open_rows`: each caption is a prompt, and the answer to `question`. Or a
    file `.jsonl` of objects with the keys of a task: prompt, image; image, question, answer; prompt, answer; prompt,
    reasoning, image. Images are named from the folder that the file lies in."""
    model: str = ""
    """Folder or Hub id of the model, for its tokenizer; a saved `MMaDAPipeline` brings its image tokenizer too."""
    image_tokenizer: str = ""
    """Folder or Hub id of the image tokenizer of a published model; by default that of the published ones."""
    image_sizes: dict[str, Any] = field(default_factory=dict)
    """Its sizes, see `load_magvitv2`."""
    batch: dict[str, int] = field(default_factory=lambda: {"text_to_image": 2, "understanding": 1})
    """Rows of each task in a batch."""
    length: int = 128
    """Tokens of a row's text; longer ones are cut."""
    question: str = DESCRIBE
    """That captions answer."""
    cache: str | None = "outputs/cache"
    """Folder that keeps codes of images, for any number of runs; `None`: compute them in each run."""
    seed: int = 0
    """Of the order."""
    split: str = "train"
    """"train", or "heldout": every twentieth entry of a task."""

    def __post_init__(self) -> None:
        check_choice("split", self.split, ("train", "heldout"))
        for task, rows in self.batch.items():
            check_name("task", task, TASKS)
            if not isinstance(rows, int) or rows < 0:
                raise ValueError(f"batch says how many rows of each task, got {task}: {rows!r}")
        if not any(self.batch.values()):
            raise ValueError("batch names no row; give at least one, such as {text_to_image: 2}")
        if not self.model:
            raise ValueError("name the model in data.arguments.model, for its tokenizer")
        if self.length < 3:
            raise ValueError(f"length must be at least 3, got {self.length}")

    def tokenizers(self) -> Tokenizers:
        """What `model` and `image_tokenizer` name."""
        return load_tokenizers(self.model, self.image_tokenizer or None, sizes=self.image_sizes)


class Entry(NamedTuple):
    """What one row is made of."""

    name: str
    """For messages."""
    text: str
    """Prompt or question."""
    answer: str = ""
    image: Blob | None = None


class MMaDAData:
    """Endless: sample i is a whole batch, the same for the same i.

    Args:
        settings: of the data.

    Raises:
        ValueError: no data there, or none of a task that the batch asks for.
    """

    def __init__(self, settings: MMaDASettings):
        self.settings = settings
        parts = settings.tokenizers()
        self.tokenizer, self.image_tokenizer, self.tokens = parts.tokenizer, parts.image_tokenizer, parts.tokens
        self.side, self.image_codes = parts.side, parts.image_codes
        self.entries: dict[str, list[Entry]] = {task: [] for task in TASKS}
        for task, entry in _entries(settings):
            self.entries[task].append(entry)
        heldout = settings.split == "heldout"
        self.orders: dict[str, DataOrder] = {}
        for number, (task, rows) in enumerate(settings.batch.items()):
            found = self.entries[task]
            kept = [one for n, one in enumerate(found) if (n % HELD_OUT == HELD_OUT - 1) == heldout]
            if rows and not kept:
                raise ValueError(
                    f"{settings.path} has {len(found)} entries for the task {task!r}, none for the split "
                    f"{settings.split!r}; its keys are {', '.join(TASKS[task])}"
                )
            self.entries[task] = kept
            if rows:
                self.orders[task] = DataOrder(len(kept), mixed_seed(settings.seed, number))
        self._codes: dict[str, torch.Tensor] = {}
        self.cache = None
        if settings.cache is not None:
            origin = {"image_tokenizer": folder_hash([parts.image_folder])}
            self.cache = TensorCache(Path(settings.cache) / "codes", origin)
            with self.cache.filling():
                for task in self.orders:
                    for entry in self.entries[task]:
                        self._image_ids(entry)

    def __getitem__(self, index: int) -> MMaDABatch:
        found, empty, tasks = [], [], []
        for task, order in self.orders.items():
            rows = self.settings.batch[task]
            entries = [self.entries[task][order[index * rows + n]] for n in range(rows)]
            built = self._rows(task, entries)
            found.append(built)
            without = [entry._replace(text="") for entry in entries]
            empty.append(self._rows(task, without) if task == "text_to_image" else built)
            tasks += [task] * rows
        return MMaDABatch(
            torch.cat([one.ids for one in found]),
            torch.cat([one.attention_mask for one in found]),
            torch.cat([~one.prompt for one in found]),
            torch.cat([one.ids for one in empty]),
            torch.cat([one.attention_mask for one in empty]),
            tuple(tasks),
        )

    def fingerprint(self) -> torch.Tensor:
        """(N, 2) int64: hashes of each entry's texts and image, by which a run that goes on knows them again."""
        rows = [
            (row_hash(task, n, entry.text, entry.answer), row_hash(_content(entry)))
            for task in self.orders
            for n, entry in enumerate(self.entries[task])
        ]
        return torch.tensor(rows, dtype=torch.int64)

    def _rows(self, task: str, entries: list[Entry]) -> MMaDARows:
        tokens, length = self.tokens, self.settings.length
        if task == "text_to_image":
            images = torch.cat([self._image_ids(entry) for entry in entries])
            return text_to_image_rows(tokens, [self._ids(entry.text) for entry in entries], images, length + 1)
        chats = [self._chat(entry) for entry in entries]
        images = torch.cat([self._image_ids(entry) for entry in entries])
        if task == "language":  # as long as rows with an image
            return language_rows(tokens, chats, length + 3 + self.image_codes)
        make = understanding_rows if task == "understanding" else reasoning_rows
        return make(tokens, chats, images, length)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _chat(self, entry: Entry) -> list[int]:
        """A question in the chat template, with its answer."""
        asked = encode_prompts(self.tokenizer, [entry.text], None, True, True, self.tokens.eos)[0][0].tolist()
        if len(asked) >= self.settings.length:
            raise ValueError(
                f"{entry.name} has a question of {len(asked)} tokens, length={self.settings.length} leaves no answer"
            )
        return [*asked, *self._ids(entry.answer)]

    @torch.no_grad()
    def _image_ids(self, entry: Entry) -> torch.Tensor:
        """(1, N) tokens of an entry's image; (1, 0) where there is none."""
        if entry.image is None:
            return torch.zeros(1, 0, dtype=torch.long)
        data = entry.image.read()
        key = tensor_key(content_hash(data), self.side)
        if key not in self._codes:
            if self.cache is not None and key in self.cache:
                self._codes[key] = self.cache.read(key)
            else:
                (image,) = rgb_images(open_image(io.BytesIO(data), repr(entry.name)), repr(entry.name))
                pixels = pixels_of(image, (self.side, self.side))[None].to(self.image_tokenizer.dtype)
                self._codes[key] = self.image_tokenizer.encode(pixels).codes.flatten(1)
                if self.cache is not None:
                    self.cache.add(key, self._codes[key])
        return self.tokens.image_ids(self._codes[key])


def _content(entry: Entry) -> str:
    return "" if entry.image is None else content_hash(entry.image.read())


def _entries(settings: MMaDASettings) -> Iterator[tuple[str, Entry]]:
    """Each entry with its task."""
    file = Path(settings.path).expanduser()
    if file.suffix == ".jsonl":
        yield from _lines(file)
        return
    for row in open_rows(settings.path).rows:
        for caption in row.captions:
            yield "text_to_image", Entry(row.name, caption, "", row.image)
            yield "understanding", Entry(row.name, settings.question, caption, row.image)


def _lines(file: Path) -> Iterator[tuple[str, Entry]]:
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r} of texts and images")
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        values = parse_object(line, place)
        task = next((task for task, keys in TASKS.items() if set(keys) == values.keys()), None)
        if task is None or not all(isinstance(value, str) for value in values.values()):
            known = "; ".join(", ".join(keys) for keys in TASKS.values())
            raise ValueError(f"{place}: expected texts by the keys of one task ({known}), got {sorted(values)}")
        yield task, _entry(task, values, place, file.parent)


def _entry(task: str, values: Mapping[str, str], place: str, folder: Path) -> Entry:
    image = None
    if "image" in values:
        found = inside(folder, values["image"])
        if not found.is_file():
            raise ValueError(f"{place} names the image {str(found)!r}, which is not there")
        image = FileBlob(found)
    text = values["question" if task == "understanding" else "prompt"]
    answer = values.get("reasoning" if task == "reasoning" else "answer", "")
    return Entry(values.get("image", place), text, answer, image)
