"""A backbone's or an adapter's data: people's own pictures, through caches.

Every sample is a whole batch of one bucket, so its pictures have one size. An epoch holds every usable row once, or as
often as its `repeats` say: the rows of a bucket are shuffled and cut into batches, of which the last may be smaller,
and the batches of all buckets are shuffled. What stands where depends on the seed and the epoch alone, so a run goes
on at the exact batch on any number of processes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from imgdit.cameras import FOCAL_LENGTH, RAY_CHANNELS, ray_frames, relative_rays, scale_positions
from imgdit.checkpoints import EMBEDDED
from imgdit.data.buckets import bucket_sizes, nearest_bucket
from imgdit.data.inspections import inspected
from imgdit.data.linter import Inspection
from imgdit.data.listing import some
from imgdit.data.opening import open_picture
from imgdit.data.rows import CONDITIONS, Blob, Columns, Note, Problem, Row
from imgdit.data.sources import open_rows
from imgdit.frames import Frame
from imgdit.images import fit, to_image, to_pixels
from imgdit.images.fitting import SHARP, Size
from imgdit.images.preprocess import PREPROCESSORS, check_preprocessor, find_preprocessor, preprocess
from imgdit.io.order import mixed_seed, row_hash
from imgdit.io.tensor_cache import TensorCache, tensor_key
from imgdit.layout import FrameLayout
from imgdit.models.functional import PATCH, pack
from imgdit.naming import check_choice, check_name
from imgdit.recipes import check_arguments
from imgdit.tasks import TASK_TOKENS, task_caption
from imgdit.training.batches import Batch, Text
from imgdit.training.own_encoding import Encoded, Encoder
from imgdit.training.own_needs import least_side, unfit
from imgdit.training.recipe import ADAPTER

logger = logging.getLogger(__name__)

SHOWN = 5
"""Problems that a message names; `imgdit data check` lists all."""


class _Picture(NamedTuple):
    """A row that can be trained on."""

    row: Row
    found: Inspection
    bucket: Size


class OwnPictures:
    """Endless: sample i is a `Batch`, the same for the same i. What is missing of the caches is made first.

    Args:
        path: the data, see `imgdit.data.open_rows`. Rows count as often in an epoch as their `repeats` say.
        model: pipeline folder or Hub id of the autoencoder and text encoders; "embedded" for the one that comes along.
        cache: folder that keeps what was computed, for any number of runs; `None`: compute again every time.
        base: side of the square bucket in pixels; the others have its area.
        ratio: of a bucket's longer to its shorter side, at most; 1: squares only.
        samples: pictures of a batch.
        min_side: pixels that a picture's shorter side must have; 0: half of `base`.
        max_broken: share of the rows that may be unusable. They are counted and left out.
        condition: name of the condition that each picture comes with; `None`: none.
        preprocessor: computes the condition of rows that lack it: a key of `imgdit.images.preprocess.PREPROCESSORS`,
            or "package.module:function" (`find_preprocessor`).
        preprocessor_options: its options, such as {"low": 50}.
        mode: what reads the condition. "frame": the model itself, as a second frame (OneDiffusion); "independent" or
            "joint": an adapter (OminiControl), and the condition sees only itself, or everything.
        position: "aligned": on the picture; "subject": to its left; of conditions that an adapter reads.
        task_token: whether sentences begin with the token of their frames' task, as the embedded model's do: the
            condition's, that of views where there are cameras, or that of text to image.
        views: pictures of a sample: the row's own and its further frames.
        cameras: whether each view is followed by a frame of its camera's rays; needs `ratio: 1`.
        columns: our name -> the source's: {"text": "caption"}.
        ignore: columns that mean nothing.
        held_out: share of the rows that is kept for the held-out loss; which ones, their content decides.
        seed: of the order and the captions.
        source_split: of a `datasets` data set.
        ahead: whether the caches are filled before the first batch; otherwise as rows are used.
        split: "train" or "heldout".

    Raises:
        ValueError: no data there, too many broken rows, no condition for a row, fewer rows than a batch takes, or a
            cache of another model.
    """

    def __init__(
        self,
        path: str = "",
        model: str = EMBEDDED,
        cache: str | None = "outputs/cache",
        base: int = 512,
        ratio: float = 2.0,
        samples: int = 4,
        min_side: int = 0,
        max_broken: float = 0.05,
        condition: str | None = None,
        preprocessor: str | None = None,
        preprocessor_options: dict[str, Any] = {},  # noqa: B006 - never changed
        mode: Literal["frame", "independent", "joint"] = "frame",
        position: Literal["aligned", "subject"] = "aligned",
        task_token: bool = False,
        views: int = 1,
        cameras: bool = False,
        columns: dict[str, str] = {},  # noqa: B006 - never changed
        ignore: tuple[str, ...] = (),
        held_out: float = 0.0,
        seed: int = 0,
        source_split: str = "train",
        ahead: bool = True,
        split: str = "train",
    ):
        if not path:
            raise ValueError("path names the data: a folder with metadata.jsonl, shards, or what `datasets` loads")
        if samples < 1 or views < 1:
            raise ValueError(f"a batch needs at least one sample and one view, got samples={samples}, views={views}")
        if cameras and (ratio != 1 or views < 2):
            raise ValueError(f"rays belong to at least two square views, got ratio={ratio}, views={views}")
        check_choice("mode", mode, ("frame", "independent", "joint"))
        check_choice("position", position, ("aligned", "subject"))
        check_choice("split", split, ("train", "heldout"))
        _check_condition(condition, preprocessor, preprocessor_options)
        self.samples, self.seed, self.split = samples, seed, split
        self.condition, self.preprocessor, self.preprocessor_options = condition, preprocessor, preprocessor_options
        self.mode, self.position, self.views, self.cameras = mode, position, views, cameras
        self.task = self._task() if task_token else None
        self.encoder = Encoder(model)
        buckets = bucket_sizes(base, self.encoder.cell * PATCH, ratio)
        source = open_rows(path, Columns(columns, tuple(ignore)), source_split)
        for problem in source.problems:
            if problem.kind == "shard":
                raise ValueError(problem.message)
        if ahead and preprocessor is not None and any(condition not in row.conditions for row in source.rows):
            check_preprocessor(preprocessor, preprocessor_options)  # before all images are read
        found = inspected(source.rows, least_side(min_side, base), cache)
        checked = [(row, f, f.problem or unfit(row, views, cameras)) for row, f in zip(source.rows, found)]
        problems = [*source.problems, *(problem for _, _, problem in checked if problem is not None)]
        pictures = [_Picture(r, f, nearest_bucket(f.size, buckets)) for r, f, problem in checked if problem is None]
        self.left_out = Counter(problem.kind for problem in problems)
        """Rows that are not trained on, by what is wrong with them."""
        _report(path, problems, len(problems) + len(pictures), max_broken)
        _tell(path, source.notes, [picture.row for picture in pictures])
        chosen = [p for p in pictures if (_share(p.found.hashes["picture"]) < held_out) == (split == "heldout")]
        usable = sum(picture.row.repeats for picture in chosen)
        if usable < (samples if split == "train" else 1):
            raise ValueError(
                f"{path} has {usable} usable rows in the split {split!r}, a batch takes {samples}; "
                "lower data.arguments.samples, or raise held_out if it is the held-out split that lacks rows"
            )
        self.pictures = chosen
        if condition is not None and preprocessor is None:
            self._check_conditions(path)
        self.buckets: dict[Size, list[int]] = {}
        for number, picture in enumerate(chosen):
            self.buckets.setdefault(picture.bucket, []).extend([number] * picture.row.repeats)
        self.batches_per_epoch = sum(-(-len(rows) // samples) for rows in self.buckets.values())
        self._plan: tuple[int, list[list[int]]] | None = None
        self._open_caches(cache)
        if cache is not None and ahead:
            self.fill_all()

    def _task(self) -> str:
        """The task whose token begins a caption."""
        if self.condition is not None:
            check_name("condition with a token", self.condition, TASK_TOKENS)
            return self.condition
        task = "views" if self.cameras else "text_to_image" if self.views == 1 else "none"
        check_name("task of views without cameras", task, TASK_TOKENS)
        return task

    def _open_caches(self, cache: str | None) -> None:
        self.latent_cache = self.text_cache = None
        if cache is not None:
            self.latent_cache = TensorCache(Path(cache) / "latents", self.encoder.made_by("vae"))
            self.text_cache = TensorCache(Path(cache) / "text", self.encoder.made_by("text_encoder", "tokenizer"))

    # Which rows stand where

    def rows_of(self, index: int) -> list[int]:
        """Numbers in `pictures` of the rows of a batch."""
        epoch, place = divmod(index, self.batches_per_epoch)
        if self._plan is None or self._plan[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            batches = []
            for _, rows in sorted(self.buckets.items()):
                shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
                batches += [shuffled[i : i + self.samples] for i in range(0, len(rows), self.samples)]
            order = torch.randperm(len(batches), generator=generator)
            self._plan = (epoch, [batches[i] for i in order])
        return self._plan[1][place]

    def __getitem__(self, index: int) -> Batch:
        rows = self.rows_of(index)
        width, height = self.pictures[rows[0]].bucket
        epoch = index // self.batches_per_epoch
        sentences = [self._sentence(row, Random(mixed_seed(self.seed, epoch, row))) for row in rows]
        frames = [torch.stack(grids) for grids in zip(*(self._frames(self.pictures[row]) for row in rows))]
        text, empty = self._texts(sentences)
        side = self.encoder.cell * PATCH
        layout = FrameLayout.build(self._layout((height // side, width // side)), text.embeddings.shape[1])
        batch = Batch(torch.cat([pack(grid, PATCH) for grid in frames], dim=1), layout, text, empty)
        if self.condition is None or self.mode == "frame":
            return batch
        black = pack(self._black((width, height))[None], PATCH)[0]
        return replace(batch, empty_tokens=torch.cat([torch.zeros_like(black)] * (len(layout.frames) - 1) + [black]))

    def fingerprint(self) -> torch.Tensor:
        """(N, 2) int64: hashes of name and content of each row, by which a run that goes on knows them again."""
        rows = [
            (
                row_hash(row.name),
                row_hash(
                    sorted(found.hashes.items()), row.captions, row.repeats, row.focal_length,
                    None if row.cameras is None else row.cameras.tolist(),
                ),
            )
            for row, found, _ in self.pictures
        ]  # fmt: skip
        return torch.tensor(rows, dtype=torch.int64)

    # Caches

    def fill_all(self) -> None:
        """Compute what the caches lack. Several processes on a machine take turns: the first does the work."""
        assert self.latent_cache is not None and self.text_cache is not None
        numbers = range(len(self.pictures))
        if self._lacking(numbers):
            with self.latent_cache.filling(), self.text_cache.filling():
                self.fill(tqdm(self._lacking(numbers), desc="caching", unit="row", disable=None))
        self.encoder.unload()

    def fill(self, numbers: Iterable[int]) -> None:
        """Compute what the caches lack of some rows. Several processes may do so at once."""
        assert self.latent_cache is not None and self.text_cache is not None
        for number in numbers:
            picture = self.pictures[number]
            self._frames(picture)
            if self.condition is not None and self.mode != "frame":
                self._black(picture.bucket)
            for sentence in self._sentences(picture.row):
                self._encoded(sentence)
        self._encoded("")
        self.latent_cache.flush()
        self.text_cache.flush()

    def _lacking(self, numbers: Iterable[int]) -> list[int]:
        """Rows of which something is not cached."""
        assert self.latent_cache is not None and self.text_cache is not None
        return [
            number
            for number in numbers
            if self._missing(self.pictures[number])
            or any(tensor_key(s, "pooled") not in self.text_cache for s in self._sentences(self.pictures[number].row))
        ]

    def _missing(self, picture: _Picture) -> bool:
        assert self.latent_cache is not None
        return any(key not in self.latent_cache for key, _ in self._wanted(picture))

    def _wanted(self, picture: _Picture) -> list[tuple[str, Callable[[], torch.Tensor]]]:
        """Key, and what makes the picture (3, H, W), of each frame that has to be encoded."""
        row, found, size = picture

        def shown(blob: Blob, sharp: bool = False) -> Callable[[], torch.Tensor]:
            resample = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
            return lambda: to_pixels(fit(open_picture(blob.read()).picture, size, resample))[0]

        blobs = {"picture": row.picture, **{str(n): row.frames[n] for n in range(self.views - 1)}}
        wanted = [(tensor_key("picture", found.hashes[name], size), shown(blob)) for name, blob in blobs.items()]
        if self.condition is not None and self.condition in row.conditions:
            sharp = self.condition in SHARP
            key = tensor_key("condition", found.hashes[self.condition], size, sharp)
            wanted.append((key, shown(row.conditions[self.condition], sharp)))
        elif self.condition is not None:
            task, options = self.preprocessor, self.preprocessor_options
            assert task is not None
            key = tensor_key("computed", found.hashes["picture"], size, task, sorted(options.items()))
            wanted.append((key, lambda: self._computed(task, shown(row.picture)())))
        return wanted

    def _computed(self, task: str, picture: torch.Tensor) -> torch.Tensor:
        """A condition by its preprocessor, at the picture's size."""
        made = preprocess(task, to_image(picture), **self.preprocessor_options)[0]
        if made.shape == picture.shape:
            return made
        return to_pixels(to_image(made).resize((picture.shape[2], picture.shape[1]), Image.Resampling.BICUBIC))[0]

    def _latents(self, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.latent_cache is None:
            return self.encoder.latents(make()).float()
        if key not in self.latent_cache:
            self.latent_cache.add(key, self.encoder.latents(make()))
        return self.latent_cache.read(key).float()

    def _black(self, size: Size) -> torch.Tensor:
        """Latents of a black picture: what a dropped condition becomes."""
        return self._latents(tensor_key("black", size), lambda: torch.zeros(3, size[1], size[0]))

    def _encoded(self, sentence: str) -> Encoded:
        if self.text_cache is None:
            return self.encoder.text(sentence)
        keys = [tensor_key(sentence, part) for part in Encoded._fields]
        if keys[-1] not in self.text_cache:
            for key, tensor in zip(keys, self.encoder.text(sentence)):
                self.text_cache.add(key, tensor)
        return Encoded(*(self.text_cache.read(key) for key in keys))

    # Batches

    def _frames(self, picture: _Picture) -> list[torch.Tensor]:
        """Latents (C, h, w) of a row's frames."""
        latents = [self._latents(key, make) for key, make in self._wanted(picture)]
        if not self.cameras:
            return latents
        assert picture.row.cameras is not None
        poses = scale_positions(picture.row.cameras[: self.views])
        focal = picture.row.focal_length or FOCAL_LENGTH
        rays = ray_frames(relative_rays(poses, latents[0].shape[-1], focal))
        if latents[0].shape[0] != RAY_CHANNELS:
            raise ValueError(f"rays fill {RAY_CHANNELS} latent channels, the autoencoder has {latents[0].shape[0]}")
        return [grid for pair in zip(latents, rays) for grid in pair] + latents[self.views :]

    def _layout(self, size: tuple[int, int]) -> list[Frame]:
        """The frames with `size` rows and columns of tokens; the first camera's rays say nothing new and are given."""
        count = self.views * (2 if self.cameras else 1)
        frames = [Frame(size, sigma=0.0 if self.cameras and n == 1 else None, index=float(n)) for n in range(count)]
        if self.condition is None:
            return frames
        if self.mode == "frame":
            return [*frames, Frame(size, index=float(count))]
        sees: Any = "self" if self.mode == "independent" else "joint"
        offset = (0.0, 0.0) if self.position == "aligned" else (0.0, -float(size[1]))
        return [*frames, Frame(size, sigma=0.0, adapter=ADAPTER, sees=sees, offset=offset)]

    def _sentences(self, row: Row) -> list[str]:
        """Everything that may be said about a row."""
        return [task_caption(caption, self.task) for caption in row.captions or ("",)]

    def _sentence(self, row: int, rng: Random) -> str:
        said = self._sentences(self.pictures[row].row)
        return said[rng.randrange(len(said))]

    def _texts(self, sentences: Sequence[str]) -> tuple[Text, Text]:
        """Text of the sentences, and the empty one of the same length."""
        encoded = [self._encoded(sentence) for sentence in [*sentences, ""]]
        lengths = [len(one.embeddings) for one in encoded]
        padded = torch.nn.utils.rnn.pad_sequence([one.embeddings.float() for one in encoded], batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
        whole = Text(padded, torch.stack([one.pooled.float() for one in encoded]), mask)
        if mask.all():  # models without a mask read their padding too
            whole = replace(whole, mask=None)
        return whole.rows(slice(None, -1)), whole.rows(slice(-1, None))

    # What is refused

    def _check_conditions(self, path: str) -> None:
        for number, picture in enumerate(self.pictures):
            if self.condition not in picture.row.conditions:
                able = ", ".join(PREPROCESSORS)
                raise ValueError(
                    f"{path}: row {number}, {picture.row.name}, has no condition {self.condition!r} and no "
                    f"preprocessor is named that would compute it; preprocessors are {able}"
                )


def _share(content: str) -> float:
    """A number in [0, 1) from a content's hash."""
    return int(content[:8], 16) / 2**32


def _tell(path: str, notes: Iterable[Note], rows: Sequence[Row]) -> None:
    """Say what was left alone, and which images will be trained on without a caption."""
    for note in notes:
        logger.warning("%s: %s: %s", note.name, note.kind, note.message)
    bare = [row.name for row in rows if not row.captions]
    if bare:
        message = "%s: %s of %s have no caption and are trained with the empty text"
        logger.warning(message, path, some(bare, "image"), f"{len(rows):,}")


def _report(path: str, problems: list[Problem], rows: int, allowed: float) -> None:
    """Say what is left out; refuse if it is too much."""
    if not problems:
        return
    counts = ", ".join(f"{n:,} {kind}" for kind, n in Counter(p.kind for p in problems).most_common())
    first = "; ".join(f"{p.name}: {p.message}" for p in problems[:SHOWN])
    message = f"{path}: {len(problems):,} of {rows:,} rows cannot be used ({counts})"
    if len(problems) > allowed * rows:
        raise ValueError(
            f"{message}, {len(problems) / rows:.1%} where max_broken allows {allowed:.1%}. The first: {first}. "
            f"`imgdit data check {path}` lists all"
        )
    logger.warning("%s and are left out. The first: %s", message, first)


def _check_condition(condition: str | None, preprocessor: str | None, options: dict[str, Any]) -> None:
    """Refuse a condition or a preprocessor that nobody knows, and options that it does not have."""
    if condition is not None:
        check_name("condition", condition, CONDITIONS)
    if preprocessor is None:
        return
    if condition is None:
        raise ValueError(f"preprocessor={preprocessor!r} computes conditions; name the condition too")
    check_arguments(find_preprocessor(preprocessor), options, "preprocessor_options")
