"""The layout of a sequence: where each text and frame lies, what sees what, and which rows are one attention call."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch

from imgdit.frames import Frame, Segment, TextFrame
from imgdit.naming import old_names

_T = TypeVar("_T")
_KEPT = 32
"""Most things that a layout keeps: a run needs about ten for each device."""


class RowGroup(NamedTuple):
    """Rows of the joint sequence that see the same set: one attention call."""

    queries: tuple[slice, ...]
    """Rows that ask."""
    keys: tuple[slice, ...]
    """Rows of the same sequence that they see."""
    cached: tuple[slice, ...] = ()
    """Rows of the key/value cache that they see besides."""
    bias: torch.Tensor | None = None
    """What is added to the logits of each slice of `keys`, then of `cached`. `None`: nothing. A tensor,
    because compiled blocks take a number for a constant: each strength would compile them anew."""
    ranks: tuple[int, ...] = ()
    """Place of each slice of `queries` among those of all groups; empty: by the row they begin at. Compiled blocks
    take rows that change for symbols, which cannot be sorted."""


@dataclass(frozen=True, eq=False)
class FrameLayout:
    """Texts and frames in a row. Built once per run; all of it is derived from the fields.

    `FrameLayout.build` makes the layout of one scene (any batch size), `FrameLayout.pack` puts unequal scenes behind
    each other in one sequence of batch 1.
    """

    frames: tuple[Frame, ...]
    """Frames in the order of their tokens."""
    texts: tuple[TextFrame, ...]
    """Texts in the order of their tokens."""
    scenes: tuple[int, ...]
    """Scene of each frame."""
    text_scenes: tuple[int, ...]
    """Scene of each text."""
    visible: torch.Tensor = field(repr=False)
    """Boolean (X + F, X + F): row segment sees column segment."""
    cached: frozenset[int] = frozenset()
    """Segments whose tokens are not in the sequence: their keys and values come from a cache."""
    main_adapters: tuple[str, ...] | None = None
    """Adapters of segments without one of their own. `None`: every active adapter no segment claims."""
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        frames: Sequence[Frame | TextFrame],
        text_length: int | None = None,
        *,
        visible: torch.Tensor | None = None,
        main_adapters: Iterable[str] | None = None,
    ) -> FrameLayout:
        """Layout of one scene.

        Args:
            frames: frames in the order of their tokens, and texts in theirs.
            text_length: tokens of a prompt before the other texts, `TextFrame(text_length)`; `None`: there is none
                but those in `frames`.
            visible: boolean (X + F, X + F), texts first, where the `sees` rules are not what is wanted.
            main_adapters: adapters of segments without one of their own.
        """
        prompt = [] if text_length is None else [TextFrame(text_length)]
        texts = (*prompt, *(frame for frame in frames if isinstance(frame, TextFrame)))
        grids = tuple(frame for frame in frames if isinstance(frame, Frame))
        if not grids and all(text.is_clean for text in texts):
            raise ValueError("a layout needs at least one frame, or a text that is generated")
        if not texts:
            raise ValueError("a layout needs a text: give text_length, 0 for none, or a TextFrame")
        size = len(texts) + len(grids)
        if visible is None:
            visible = _rules((*texts, *grids))
        elif visible.dtype != torch.bool or tuple(visible.shape) != (size, size):
            raise ValueError(
                f"visible must be boolean of shape ({size}, {size}), {len(texts)} text(s) first and then "
                f"{len(grids)} frame(s); got {visible.dtype} of shape {tuple(visible.shape)}"
            )
        elif not visible.any(dim=1).all():
            raise ValueError("visible has a row without any True: a segment must see at least itself")
        return cls(
            frames=grids,
            texts=texts,
            scenes=(0,) * len(grids),
            text_scenes=(0,) * len(texts),
            visible=visible.clone(),
            main_adapters=None if main_adapters is None else tuple(main_adapters),
        )

    @classmethod
    def pack(cls, layouts: Sequence[FrameLayout]) -> FrameLayout:
        """Scenes of any sizes behind each other: sequence [texts of 0, texts of 1, …, frames of 0, frames of 1, …],
        batch 1.

        No scene sees another. The caller concatenates texts and tokens in the same order.
        """
        if not layouts:
            raise ValueError("nothing to pack: got no layout")
        if any(layout.cached for layout in layouts):
            raise ValueError("a layout that reads from a cache cannot be packed; pack the full layouts")
        if len({layout.main_adapters for layout in layouts}) > 1:
            raise ValueError("scenes with different main_adapters cannot share one packed sequence")
        texts = sum(layout.num_texts for layout in layouts)
        size = texts + sum(len(layout.frames) for layout in layouts)
        visible = torch.zeros(size, size, dtype=torch.bool)
        scenes: list[int] = []
        text_scenes: list[int] = []
        text, frame, scene = 0, texts, 0
        for layout in layouts:
            n, f = layout.num_texts, len(layout.frames)
            rows = torch.tensor([*range(text, text + n), *range(frame, frame + f)])
            visible[rows[:, None], rows[None, :]] = layout.visible
            scenes += [scene + i for i in layout.scenes]
            text_scenes += [scene + i for i in layout.text_scenes]
            text, frame, scene = text + n, frame + f, scene + layout.num_scenes
        return cls(
            frames=tuple(frame for layout in layouts for frame in layout.frames),
            texts=tuple(text for layout in layouts for text in layout.texts),
            scenes=tuple(scenes),
            text_scenes=tuple(text_scenes),
            visible=visible,
            main_adapters=layouts[0].main_adapters,
        )

    def kept(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """What follows from the layout alone: `build()` at the first call with a key, afterwards the same object.

        Models keep here what their steps share, such as plans and tables of positions. Nothing is kept while a graph
        is traced or tensors are fake.

        Args:
            key: what else it follows from: the device, the dtype and the settings of the model.
            build: makes it. Nobody may write to its tensors.
        """
        if torch.compiler.is_compiling():
            return build()
        key = (key, torch.is_inference_mode_enabled())  # tensors of inference mode cannot serve a training step
        found = self._kept.get(key)
        if found is None:
            found = build()
            if type(torch.empty(0)) is torch.Tensor:  # not under FakeTensorMode
                if len(self._kept) >= _KEPT:
                    self._kept.clear()
                self._kept[key] = found
        return found

    # What is in the sequence

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Texts, then frames."""
        return (*self.texts, *self.frames)

    @property
    def num_texts(self) -> int:
        return len(self.texts)

    @property
    def num_scenes(self) -> int:
        return 1 + max((*self.text_scenes, *self.scenes))

    @property
    def is_packed(self) -> bool:
        return self.num_scenes > 1

    @cached_property
    def live(self) -> tuple[int, ...]:
        """Numbers of the frames whose tokens are in the sequence."""
        return tuple(i for i in range(len(self.frames)) if self.num_texts + i not in self.cached)

    @cached_property
    def live_texts(self) -> tuple[int, ...]:
        """Numbers of the texts whose tokens are in the sequence."""
        return tuple(i for i in range(self.num_texts) if i not in self.cached)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each live frame."""
        return tuple(self.frames[i].length for i in self.live)

    @cached_property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens of each live text."""
        return tuple(self.texts[i].length for i in self.live_texts)

    @property
    def text_length(self) -> int:
        return sum(self.text_lengths)

    @property
    def image_length(self) -> int:
        return sum(self.lengths)

    @cached_property
    def predicted(self) -> tuple[slice, ...]:
        """Rows of the image stream the model predicts a velocity for: the live frames that are being generated."""
        return _merge(rows for i, rows in zip(self.live, self.rows, strict=True) if self.frames[i].predicted)

    @cached_property
    def predicted_texts(self) -> tuple[slice, ...]:
        """Rows of the text stream the model predicts tokens for: the live texts that are being generated."""
        rows = _consecutive(self.text_lengths)
        return _merge(part for i, part in zip(self.live_texts, rows, strict=True) if not self.texts[i].is_clean)

    @cached_property
    def live_frames(self) -> tuple[slice, ...]:
        """The live frames among all frames."""
        return _merge(slice(i, i + 1) for i in self.live)

    @cached_property
    def predicted_frames(self) -> tuple[slice, ...]:
        """The frames being generated among the live frames."""
        return _merge(slice(n, n + 1) for n, i in enumerate(self.live) if self.frames[i].predicted)

    @cached_property
    def predicted_lengths(self) -> tuple[int, ...]:
        return tuple(n for i, n in zip(self.live, self.lengths, strict=True) if self.frames[i].predicted)

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """Rows of each live frame in the image stream."""
        return _consecutive(self.lengths)

    def ids(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Position ids (N, 3) float32 of the live frames' tokens. Float32: half precision rounds from 128 on."""
        return torch.cat([torch.zeros(0, 3), *(self.frames[i].ids() for i in self.live)]).to(device)

    def text_positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Positions (T,) float32 of the live texts' tokens along their text; 0 for prompts."""
        return torch.cat([torch.zeros(0), *(self.texts[i].positions() for i in self.live_texts)]).to(device)

    # Noise levels

    @old_names(held="own_values")
    def expand(self, values: torch.Tensor, own_values: Sequence[float | None] | None = None) -> torch.Tensor:
        """Values per sample, as values per live frame.

        Args:
            values: (B,), or (S,) for a packed layout of S scenes; or (B, F) already per live frame, returned as it is.
            own_values: one value per frame of the layout that overrides `values`, or `None` to follow them.

        Returns:
            (B, F), (1, F) for a packed layout.
        """
        if values.ndim == 2:
            if values.shape[1] != len(self.live):
                raise ValueError(f"got {values.shape[1]} values per sample, expected one per frame: {len(self.live)}")
            return values
        if self.is_packed:
            per_frame = values[self.scenes_of_live(values.device)][None]  # (1, F)
        else:
            per_frame = values[:, None].expand(-1, len(self.live))
        if own_values is not None and any(own_values[i] is not None for i in self.live):

            def build() -> tuple[torch.Tensor, torch.Tensor]:
                fixed = values.new_tensor([0.0 if own_values[i] is None else own_values[i] for i in self.live])
                return torch.tensor([own_values[i] is None for i in self.live], device=values.device), fixed

            follows, fixed = self.kept(("own values", tuple(own_values), values.device, values.dtype), build)
            per_frame = torch.where(follows, per_frame, fixed)
        return per_frame

    @old_names(held="own_values")
    def segment_levels(
        self, values: torch.Tensor, own_values: Sequence[float | None], text_values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels, or what else the conditioning vectors embed, of the live frames and of the live texts.

        A text that is generated has its own level. Any other has the level of the run if it sees anything that is
        generated, otherwise the highest that it or anything it sees keeps; where each frame has its own level,
        that of the noisiest frame it sees.

        Args:
            values: (B,), or (S,) for a packed layout of S scenes; or (B, F), one per live frame, overriding
                `own_values`.
            own_values: one value per segment of the layout, texts first, `None` for those that follow `values`.
            text_values: (B,) or (S,) of the texts that are generated; `None`: they are as any other.

        Returns:
            (B, F) and (B, X), float32: half precision would round 945 to 944. One tensor twice where a text and its
            only frame have the same level.
        """
        values = values.float()
        frames = self.expand(values, own_values[self.num_texts :])
        own = [text_values is not None and not self.texts[x].is_clean for x in self.live_texts]
        seen = [[n for n, i in enumerate(self.live) if self.num_texts + i in self.sees[x]] for x in self.live_texts]
        levels = [self._level_of_text(x, own_values) for x in self.live_texts]
        follows = values.ndim == 2 or (
            all(own_values[self.num_texts + i] is None for i in self.live) and levels == [None]
        )
        if own == [False] and len(self.live) == 1 and seen[0] and follows:
            return frames, frames
        columns = []
        for x, of, level, is_own in zip(self.live_texts, seen, levels, own, strict=True):
            if is_own or (values.ndim == 1 and level is None):
                run = text_values.float() if is_own and text_values is not None else values
                columns.append(run[self.text_scenes[x]][None] if self.is_packed else run)
            elif values.ndim == 2 and of:
                columns.append(torch.stack([frames[:, n] for n in of]).amax(0))
            else:
                columns.append(values.new_full((len(frames),), level or 0.0))
        return frames, torch.stack(columns, dim=1) if columns else frames.new_zeros(len(frames), 0)

    def _level_of_text(self, text: int, own_values: Sequence[float | None]) -> float | None:
        """The highest value that a text or anything it sees keeps; `None` if any of them follows the run."""
        levels = [own_values[i] for i in self.sees[text] | {text}]
        return None if None in levels else max(level for level in levels if level is not None)

    def scenes_of_live(self, device: torch.device) -> torch.Tensor:
        """Scene of each live frame, (F,)."""
        return self.kept(("scenes", device), lambda: torch.tensor([self.scenes[i] for i in self.live], device=device))

    def scenes_of_texts(self, device: torch.device) -> torch.Tensor:
        """Scene of each live text, (X,)."""
        scenes = [self.text_scenes[i] for i in self.live_texts]
        return self.kept(("scenes of texts", device), lambda: torch.tensor(scenes, device=device))

    # Who sees whom

    @cached_property
    def sees(self) -> tuple[frozenset[int], ...]:
        """Segments that each segment sees: the rows of `visible`."""
        return tuple(frozenset(j for j, seen in enumerate(row) if seen) for row in self.visible.tolist())

    @cached_property
    def frozen(self) -> frozenset[int]:
        """Segments whose keys and values are the same in every step: clean ones that see only such ones."""
        frozen = {i for i, segment in enumerate(self.segments) if segment.is_clean}
        while True:
            kept = {i for i in frozen if self.sees[i] <= frozen}
            if kept == frozen:
                return frozenset(kept)
            frozen = kept

    def without_frozen(self) -> FrameLayout:
        """The layout of the steps that read the frozen segments from a cache instead of computing them."""
        return replace(self, cached=self.frozen | self.cached)

    def only_frozen(self) -> FrameLayout:
        """The layout of a pass over the frozen segments alone, which writes the cache of `without_frozen`."""
        return replace(self, cached=frozenset(range(len(self.segments))) - self.frozen)

    @cached_property
    def reads_cache(self) -> bool:
        """Whether a segment of the sequence sees one that is not."""
        return any(self.sees[i] & self.cached for i in range(len(self.segments)) if i not in self.cached)

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """The joint sequence [texts, frames], as groups of rows that see the same."""
        return self._group(range(len(self.segments)))

    @cached_property
    def image_groups(self) -> tuple[RowGroup, ...]:
        """The image stream alone, as groups (SD3.5's second attention sees no text)."""
        return self._group(range(self.num_texts, len(self.segments)))

    def _group(self, segments: range) -> tuple[RowGroup, ...]:
        present = [i for i in segments if i not in self.cached]
        position = dict(zip(present, _consecutive([self.segment_length(i) for i in present]), strict=True))
        stored = sorted(self.cached)
        place = dict(zip(stored, _consecutive([self.segment_length(i) for i in stored]), strict=True))
        members: dict[tuple[tuple[int, float], ...], list[int]] = {}
        for i in present:
            seen = tuple((j, self._bias(i, j)) for j in segments if j in self.sees[i])
            members.setdefault(seen, []).append(i)
        groups = []
        for seen, asking in members.items():
            keys, key_bias = _merge_biased((position[j], bias) for j, bias in seen if j in position)
            cached, cached_bias = _merge_biased((place[j], bias) for j, bias in seen if j in place)
            values = key_bias + cached_bias
            bias = torch.tensor(values, device="cpu") if any(values) else None
            groups.append(RowGroup(_merge(position[i] for i in asking), keys, cached, bias))
        return ranked(groups)

    def _bias(self, row: int, column: int) -> float:
        """What the logits between two segments get: each segment's log strength, nothing within a segment."""
        if row == column:
            return 0.0
        return sum(math.log(self.segments[i].strength) for i in (row, column))

    def frozen_rows(self, *, image_only: bool = False) -> tuple[slice, ...]:
        """Rows of the frozen segments in the joint sequence (or in the image stream), in the order a cache keeps."""
        first = self.num_texts if image_only else 0
        present = [i for i in range(first, len(self.segments)) if i not in self.cached]
        position = dict(zip(present, _consecutive([self.segment_length(i) for i in present]), strict=True))
        return _merge(position[i] for i in sorted(self.frozen) if i in position)

    def dense_mask(self) -> torch.Tensor:
        """Boolean (T + N, T + N) mask of the whole joint sequence. For tests: no path of the library builds it."""
        if self.cached:
            raise ValueError("a layout that reads from a cache has no square mask")
        lengths = torch.tensor([self.segment_length(i) for i in range(len(self.segments))])
        return self.visible.repeat_interleave(lengths, 0).repeat_interleave(lengths, 1)

    def dense_bias(self) -> torch.Tensor:
        """What is added to the logits of the whole joint sequence, (T + N, T + N), -inf where a row does not see. For
        tests, as `dense_mask`."""
        segments = range(len(self.segments))
        bias = torch.tensor([[self._bias(i, j) for j in segments] for i in segments])
        lengths = torch.tensor([self.segment_length(i) for i in segments])
        bias = bias.repeat_interleave(lengths, 0).repeat_interleave(lengths, 1)
        return bias.masked_fill(~self.dense_mask(), -math.inf)

    # Which adapter reads which rows

    @property
    def claimed(self) -> frozenset[str]:
        """Adapters that belong to a segment and act on no other tokens."""
        return frozenset(one.adapter for one in self.segments if one.adapter is not None and not one.everywhere)

    @property
    def everywhere(self) -> tuple[str, ...]:
        """Adapters of segments that act on all tokens."""
        adapters = (one.adapter for one in self.segments if one.everywhere)
        return tuple(dict.fromkeys(name for name in adapters if name is not None))

    @property
    def has_adapters(self) -> bool:
        return bool(self.claimed or self.everywhere) or self.main_adapters is not None

    def segment_length(self, segment: int) -> int:
        """Tokens of a segment, in the sequence or not."""
        if segment < self.num_texts:
            return self.texts[segment].length
        return self.frames[segment - self.num_texts].length


def _rules(segments: Sequence[Frame | TextFrame]) -> torch.Tensor:
    """Boolean (X + F, X + F): who sees whom by the segments' own rules."""
    visible = torch.ones(len(segments), len(segments), dtype=torch.bool)
    for i, segment in enumerate(segments):
        if segment.sees == "self":
            visible[i] = False
        elif segment.sees == "joint":
            visible[i] = torch.tensor([other.adapter is None for other in segments])
        block = segment.block if isinstance(segment, TextFrame) else None
        if block is not None:
            for j, other in enumerate(segments):
                if isinstance(other, TextFrame) and other.block is not None and other.block > block:
                    visible[i, j] = False
        visible[i, i] = True
    return visible


def ranked(groups: Iterable[RowGroup]) -> tuple[RowGroup, ...]:
    """Groups whose slices of queries know their places among one another's; those without any query go."""
    groups = [group for group in groups if group.queries]
    starts = sorted(rows.start for group in groups for rows in group.queries)
    place = {start: rank for rank, start in enumerate(starts)}
    return tuple(group._replace(ranks=tuple(place[rows.start] for rows in group.queries)) for group in groups)


def on_device(groups: Iterable[RowGroup], device: torch.device) -> tuple[RowGroup, ...]:
    """Groups whose biases, which a layout has on the CPU, lie where the tokens do: copying them waits."""
    return tuple(group if group.bias is None else group._replace(bias=group.bias.to(device)) for group in groups)


def take_rows(x: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
    """Rows of (B, N, …), copied only where they are not one piece. Unlike a list of numbers, which has to be copied to
    the device first, slices need no wait."""
    return x[:, rows[0]] if len(rows) == 1 else torch.cat([x[:, r] for r in rows], dim=1)


def put_rows(x: torch.Tensor, rows: Sequence[slice], values: torch.Tensor) -> torch.Tensor:
    """A copy of (B, N, …) with other values in some rows, in the dtype of the values."""
    changed = x.to(values.dtype, copy=True)
    for part, new in zip(rows, values.split([r.stop - r.start for r in rows], dim=1), strict=True):
        changed[:, part] = new
    return changed


def _consecutive(lengths: Sequence[int]) -> tuple[slice, ...]:
    """Slices of the given lengths, one behind the other."""
    slices, start = [], 0
    for length in lengths:
        slices.append(slice(start, start + length))
        start += length
    return tuple(slices)


def _merge(slices: Iterable[slice]) -> tuple[slice, ...]:
    """The same rows in the same order with adjoining slices joined; empty ones vanish."""
    return _merge_biased((rows, 0.0) for rows in slices)[0]


def _merge_biased(pairs: Iterable[tuple[slice, float]]) -> tuple[tuple[slice, ...], tuple[float, ...]]:
    """`_merge`, where slices adjoin only if they have the same bias; the slices, and the bias of each."""
    merged: list[slice] = []
    biases: list[float] = []
    for rows, bias in pairs:
        if rows.start == rows.stop:
            continue
        if merged and merged[-1].stop == rows.start and biases[-1] == bias:
            merged[-1] = slice(merged[-1].start, rows.stop)
        else:
            merged.append(rows)
            biases.append(bias)
    return tuple(merged), tuple(biases)
