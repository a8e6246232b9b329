"""The layout of a packed sequence: where each frame and text lies, what sees what, and which rows are one attention
call."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch

from imgdit.frames import Frame

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
    """Frames in a row behind their text. Built once per run; all of it is derived from the fields.

    `FrameLayout.build` makes the layout of one scene (any batch size), `FrameLayout.pack` puts unequal scenes behind
    each other in one sequence of batch 1.
    """

    frames: tuple[Frame, ...]
    """Frames in the order of their tokens."""
    text_lengths: tuple[int, ...]
    """Text tokens of each scene."""
    scenes: tuple[int, ...]
    """Scene of each frame."""
    visible: torch.Tensor = field(repr=False)
    """Boolean (S + F, S + F): row segment sees column segment."""
    cached: frozenset[int] = frozenset()
    """Segments whose tokens are not in the sequence: their keys and values come from a cache."""
    main_adapters: tuple[str, ...] | None = None
    """Adapters of the text and of frames without one of their own. `None`: every active adapter no frame claims."""
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        frames: Sequence[Frame],
        text_length: int,
        *,
        visible: torch.Tensor | None = None,
        main_adapters: Iterable[str] | None = None,
    ) -> FrameLayout:
        """Layout of one scene.

        Args:
            frames: in the order of their tokens.
            text_length: text tokens, T.
            visible: boolean (1 + F, 1 + F), text first, where the frames' own `sees` rules are not what is wanted.
            main_adapters: adapters of the text and of frames without one of their own.
        """
        frames = tuple(frames)
        if not frames:
            raise ValueError("a layout needs at least one frame")
        if text_length < 0:
            raise ValueError(f"text_length counts tokens, got {text_length}")
        size = 1 + len(frames)
        if visible is None:
            visible = torch.ones(size, size, dtype=torch.bool)
            for i, frame in enumerate(frames, start=1):
                if frame.sees == "self":
                    visible[i] = False
                elif frame.sees == "joint":
                    visible[i, 1:] = torch.tensor([other.adapter is None for other in frames])
                visible[i, i] = True
        elif visible.dtype != torch.bool or tuple(visible.shape) != (size, size):
            raise ValueError(
                f"visible must be boolean of shape ({size}, {size}), the text first and then {len(frames)} frame(s); "
                f"got {visible.dtype} of shape {tuple(visible.shape)}"
            )
        elif not visible.any(dim=1).all():
            raise ValueError("visible has a row without any True: a segment must see at least itself")
        return cls(
            frames=frames,
            text_lengths=(text_length,),
            scenes=(0,) * len(frames),
            visible=visible.clone(),
            main_adapters=None if main_adapters is None else tuple(main_adapters),
        )

    @classmethod
    def pack(cls, layouts: Sequence[FrameLayout]) -> FrameLayout:
        """Scenes of any sizes behind each other: sequence [text 0, text 1, …, frames of 0, frames of 1, …], batch 1.

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
        text, frame = 0, texts
        for layout in layouts:
            n, f = layout.num_texts, len(layout.frames)
            rows = torch.tensor([*range(text, text + n), *range(frame, frame + f)])
            visible[rows[:, None], rows[None, :]] = layout.visible
            scenes += [text + scene for scene in layout.scenes]
            text, frame = text + n, frame + f
        return cls(
            frames=tuple(frame for layout in layouts for frame in layout.frames),
            text_lengths=tuple(length for layout in layouts for length in layout.text_lengths),
            scenes=tuple(scenes),
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
    def num_texts(self) -> int:
        return len(self.text_lengths)

    @property
    def is_packed(self) -> bool:
        return self.num_texts > 1

    @cached_property
    def live(self) -> tuple[int, ...]:
        """Numbers of the frames whose tokens are in the sequence."""
        return tuple(i for i in range(len(self.frames)) if self.num_texts + i not in self.cached)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each live frame."""
        return tuple(self.frames[i].length for i in self.live)

    @property
    def text_length(self) -> int:
        return sum(self.text_lengths)

    @property
    def image_length(self) -> int:
        return sum(self.lengths)

    @cached_property
    def predicted(self) -> tuple[slice, ...]:
        """Rows of the image stream the model predicts a velocity for: the live frames that are being made."""
        return _merge(rows for i, rows in zip(self.live, self.rows, strict=True) if not self.frames[i].held)

    @cached_property
    def live_frames(self) -> tuple[slice, ...]:
        """The live frames among all frames."""
        return _merge(slice(i, i + 1) for i in self.live)

    @cached_property
    def predicted_frames(self) -> tuple[slice, ...]:
        """The frames being made among the live frames."""
        return _merge(slice(n, n + 1) for n, i in enumerate(self.live) if not self.frames[i].held)

    @cached_property
    def predicted_lengths(self) -> tuple[int, ...]:
        return tuple(n for i, n in zip(self.live, self.lengths, strict=True) if not self.frames[i].held)

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """Rows of each live frame in the image stream."""
        return _consecutive(self.lengths)

    def ids(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Position ids (N, 3) float32 of the live frames' tokens. Float32: half precision rounds from 128 on."""
        return torch.cat([self.frames[i].ids() for i in self.live]).to(device)

    # Noise levels

    def expand(self, values: torch.Tensor, held: Sequence[float | None] | None = None) -> torch.Tensor:
        """Values per sample, as values per live frame.

        Args:
            values: (B,), or (S,) for a packed layout; or (B, F) already per live frame, returned as it is.
            held: one value per frame of the layout that overrides `values`, or `None` to follow them.

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
        if held is not None and any(held[i] is not None for i in self.live):

            def build() -> tuple[torch.Tensor, torch.Tensor]:
                fixed = values.new_tensor([0.0 if held[i] is None else held[i] for i in self.live])
                return torch.tensor([held[i] is None for i in self.live], device=values.device), fixed

            follows, fixed = self.kept(("held", tuple(held), values.device, values.dtype), build)
            per_frame = torch.where(follows, per_frame, fixed)
        return per_frame

    def segment_levels(self, values: torch.Tensor, held: Sequence[float | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels, or what else the conditioning vectors embed, of the live frames and of the texts.

        A text has the level of the run, or of the noisiest frame of its scene where each frame has its own.

        Args:
            values: (B,), or (S,) for a packed layout; or (B, F), one per live frame, which override `held`.
            held: one value per frame of the layout, `None` for those that follow `values`.

        Returns:
            (B, F) and (B, S), float32: half precision would round 945 to 944. One tensor twice where a text and its
            only frame have the same level.
        """
        frames = self.expand(values.float(), held)
        if len(self.live) == 1 and (values.ndim == 2 or held[self.live[0]] is None):
            return frames, frames
        if values.ndim == 1:
            return frames, (values[None] if self.is_packed else values[:, None]).float()
        members = [[n for n, i in enumerate(self.live) if self.scenes[i] == scene] for scene in range(self.num_texts)]
        return frames, torch.stack([torch.stack([frames[:, n] for n in of]).amax(0) for of in members], dim=1)

    def scenes_of_live(self, device: torch.device) -> torch.Tensor:
        """Scene of each live frame, (F,)."""
        return self.kept(("scenes", device), lambda: torch.tensor([self.scenes[i] for i in self.live], device=device))

    # Who sees whom

    @cached_property
    def sees(self) -> tuple[frozenset[int], ...]:
        """Segments that each segment sees: the rows of `visible`."""
        return tuple(frozenset(j for j, seen in enumerate(row) if seen) for row in self.visible.tolist())

    @cached_property
    def frozen(self) -> frozenset[int]:
        """Segments whose keys and values are the same in every step: held frames that see only such frames."""
        frozen = {self.num_texts + i for i, frame in enumerate(self.frames) if frame.held}
        while True:
            kept = {i for i in frozen if self.sees[i] <= frozen}
            if kept == frozen:
                return frozenset(kept)
            frozen = kept

    def without_frozen(self) -> FrameLayout:
        """The layout of the steps that read the frozen frames from a cache instead of computing them."""
        return FrameLayout(
            self.frames, self.text_lengths, self.scenes, self.visible, self.frozen | self.cached, self.main_adapters
        )

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """The joint sequence [texts, frames], as groups of rows that see the same."""
        return self._group(range(self.num_texts + len(self.frames)))

    @cached_property
    def image_groups(self) -> tuple[RowGroup, ...]:
        """The image stream alone, as groups (SD3.5's second attention sees no text)."""
        return self._group(range(self.num_texts, self.num_texts + len(self.frames)))

    def _group(self, segments: range) -> tuple[RowGroup, ...]:
        present = [i for i in segments if i not in self.cached]
        position = dict(zip(present, _consecutive([self._length(i) for i in present]), strict=True))
        stored = sorted(self.cached)
        place = dict(zip(stored, _consecutive([self._length(i) for i in stored]), strict=True))
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
        """What the logits between two segments get: each frame's log strength, nothing within a segment."""
        if row == column:
            return 0.0
        return sum(math.log(self.frames[i - self.num_texts].strength) for i in (row, column) if i >= self.num_texts)

    def frozen_rows(self, *, image_only: bool = False) -> tuple[slice, ...]:
        """Rows of the frozen frames in the joint sequence (or in the image stream), in the order a cache keeps."""
        first = self.num_texts if image_only else 0
        present = [i for i in range(first, self.num_texts + len(self.frames)) if i not in self.cached]
        position = dict(zip(present, _consecutive([self._length(i) for i in present]), strict=True))
        return _merge(position[i] for i in sorted(self.frozen) if i in position)

    def dense_mask(self) -> torch.Tensor:
        """Boolean (T + N, T + N) mask of the whole joint sequence. For tests: no path of the library builds it."""
        if self.cached:
            raise ValueError("a layout that reads from a cache has no square mask")
        lengths = torch.tensor([self._length(i) for i in range(self.num_texts + len(self.frames))])
        return self.visible.repeat_interleave(lengths, 0).repeat_interleave(lengths, 1)

    def dense_bias(self) -> torch.Tensor:
        """What is added to the logits of the whole joint sequence, (T + N, T + N), -inf where a row does not see. For
        tests, as `dense_mask`."""
        segments = range(self.num_texts + len(self.frames))
        bias = torch.tensor([[self._bias(i, j) for j in segments] for i in segments])
        lengths = torch.tensor([self._length(i) for i in segments])
        bias = bias.repeat_interleave(lengths, 0).repeat_interleave(lengths, 1)
        return bias.masked_fill(~self.dense_mask(), -math.inf)

    # Which adapter reads which rows

    @property
    def claimed(self) -> frozenset[str]:
        """Adapters that belong to a frame."""
        return frozenset(frame.adapter for frame in self.frames if frame.adapter is not None)

    @property
    def has_adapters(self) -> bool:
        return bool(self.claimed) or self.main_adapters is not None

    def _length(self, segment: int) -> int:
        if segment < self.num_texts:
            return self.text_lengths[segment]
        return self.frames[segment - self.num_texts].length


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
