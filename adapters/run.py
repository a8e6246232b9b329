"""One `use` of conditions: what rides behind the image tokens in each forward pass, and the caches between passes.

B batch, N image tokens, T text tokens, n condition tokens, C channels of a token, F frames, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from peft.tuners.lora import LoraLayer

from imgdit.adapters.encoding import EncodedCondition
from imgdit.adapters.pairing import ONE, Pairing, Samples
from imgdit.adapters.references import References
from imgdit.attention.cache import KVCache
from imgdit.families.step import Step
from imgdit.family import Call
from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.models.blocks import block_plans

_T = TypeVar("_T")


class Progress(NamedTuple):
    """Where a sampler is."""

    step: int
    steps: int


def at_the_start() -> Progress:
    """The only step of a run that nobody counts."""
    return Progress(0, 1)


class Arranged(NamedTuple):
    """What rides along in one forward pass."""

    key: tuple
    """Equal for passes of equal layout."""
    layout: FrameLayout
    tokens: torch.Tensor | None
    """(B, n, C) behind the image tokens."""
    cache: KVCache | None


class _Entry(NamedTuple):
    """A key/value cache and what it belongs to."""

    active: tuple
    """Numbers of the conditions, and which of their images each row of the batch meets."""
    empty: bool
    sizes: tuple[tuple[int, int], ...]
    """Of the model's own frames: added positions count from the middle of a table, so the conditions' move with it."""
    weights: tuple
    cached_by: _Seen
    """What they depend on besides, such as the pooled text of the guidance branches; its dtype is the run's."""
    cache: KVCache


class _Seen:
    """A tensor of an earlier pass, with its values at that time."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor, _version(tensor)
        self.values = tensor.clone()

    def equals(self, new: torch.Tensor) -> bool:
        """Whether another tensor has the same values, which are read from the device unless it is the one that was
        seen last: pipelines pass the same in every step."""
        if new is self.tensor and self.version is not None and self.version == _version(new):
            return True
        same = new.shape == self.values.shape and new.dtype == self.values.dtype
        same = same and (not new.numel() or torch.equal(self.values, new))
        if same:
            self.tensor, self.version = new, _version(new)
        return same


class _Streams(NamedTuple):
    """Results of blocks that do not depend on the timestep, and what they belong to."""

    key: tuple
    """Layout and weights."""
    given: tuple[_Seen | None, ...]
    """The arguments that they depend on."""
    results: dict[str, torch.Tensor]


@dataclass(eq=False)
class ReferenceKeys:
    """Keys and values of the pipeline's own references from the first step of a call in which they act."""

    key: tuple
    """Of the layout."""
    texts: tuple[_Seen, ...]
    """Texts of the call: each guidance branch has references of its own, which see its text."""
    written: int
    """Step in which they were computed."""
    used: int
    """Step in which they were used last."""
    cache: KVCache = field(default_factory=KVCache)
    measured: bool = False
    """Whether the error of reading them is known."""

    @property
    def reads(self) -> bool:
        """Whether they were written in an earlier step."""
        return self.cache.mode == "read"

    def arranged(self, arranged: Arranged, references: int) -> Arranged:
        """What rides along while they are written or read.

        Args:
            arranged: the pass without a cache.
            references: their number.
        """
        layout = arranged.layout
        if self.reads:
            first = layout.num_texts + 1
            cached = frozenset(range(first, first + references))
            layout = layout.kept("without references", lambda: replace(layout, cached=cached))
        return Arranged((*arranged.key, "references", self.cache.mode), layout, None, self.cache)


def _same(seen: _Seen | None, given: torch.Tensor | None) -> bool:
    return given is None if seen is None else given is not None and seen.equals(given)


class _Kept(threading.local):
    """What each thread keeps from one of its passes to the next."""

    def __init__(self) -> None:
        self.tables: dict[tuple, tuple[torch.Tensor, tuple]] = {}
        self.tensors: dict[tuple, torch.Tensor] = {}
        self.caches: list[_Entry] = []
        self.streams: list[_Streams] = []
        self.references: list[ReferenceKeys] = []


@dataclass(eq=False)
class ConditionRun:
    """The conditions of one `OmniControl.use`, for pipelines in as many threads as there are."""

    conditions: Sequence[EncodedCondition]
    main_adapters: tuple[str, ...] | None
    cached: bool
    """Whether keys and values of conditions that see only themselves are kept between passes."""
    lora_layers: Sequence[LoraLayer]
    """The layers that have adapters."""
    image_guidance_scale: float = 1.0
    region: torch.Tensor | None = None
    """Boolean (rows, columns): the tokens that are made; the others are the complements'. `None`: all."""
    progress: Callable[[], Progress] = at_the_start
    side: int = 1
    """Pixels per side of a token."""
    samples: Samples | None = None
    """That a call makes, if it is known."""
    references: References | None = None
    """Settings of the pipeline's own reference images."""
    refit: Callable[[tuple[int, int]], ConditionRun] | None = None
    """The same run for an image of other rows and columns of tokens."""
    _refitted: dict[tuple[int, int], ConditionRun] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _layouts: dict[tuple, FrameLayout] = field(default_factory=dict)
    _frames: dict[tuple, Frame] = field(default_factory=dict)
    _kept: _Kept = field(default_factory=_Kept)

    @property
    def adapters(self) -> list[str]:
        return list(dict.fromkeys(item.condition.adapter for item in self.conditions))

    def active(self, progress: Callable[[], Progress] | None = None) -> tuple[int, ...]:
        """Numbers of the conditions that act in the present step.

        Args:
            progress: tells where the sampler is; `None`: the run's own.
        """
        if all((item.condition.start, item.condition.end) == (0.0, 1.0) for item in self.conditions):
            return tuple(range(len(self.conditions)))
        now = (progress or self.progress)()
        return tuple(i for i, item in enumerate(self.conditions) if item.condition.acts(*now))

    def at(self, grid: tuple[int, int]) -> ConditionRun:
        """The run whose conditions are fitted to an image of so many rows and columns of tokens: mostly this one."""
        if self.refit is None or all(_fits(item, grid, self.side) for item in self.conditions):
            return self
        with self._lock:
            if grid not in self._refitted:
                self._refitted[grid] = self.refit(grid)
            return self._refitted[grid]

    def arrange(
        self,
        own: Sequence[Frame],
        text_length: int,
        pairing: Pairing,
        cached_by: torch.Tensor,
        active: tuple[int, ...] | None = None,
        *,
        step_cache: bool,
        empty: bool = False,
        hidden: bool = False,
    ) -> Arranged:
        """What rides along in one forward pass.

        Args:
            own: frames of the image tokens, the image that is generated first.
            pairing: tells which of a condition's images each row of the batch meets.
            cached_by: (B, P) what the conditions' keys and values depend on besides weights, such as pooled text.
            active: numbers of the conditions that act; `None`: by the run's progress.
            step_cache: a cache compares tokens over steps: the same conditions ride along in every one, and those
                that do not act now are not seen.
            empty: put black images in the conditions' place.
            hidden: frames of the image tokens behind the first one are not seen.
        """
        active = self.active() if active is None else active
        riding = tuple(range(len(self.conditions))) if step_cache else active
        cache = None
        if self.cached and active and not step_cache and not torch.is_grad_enabled():
            orders = tuple(pairing.order(len(self.conditions[i].tokens)) for i in active)
            cache = self._cache((active, orders), empty, tuple(frame.size for frame in own), cached_by)
        mode = None if cache is None else cache.mode
        kinds = tuple((frame.size, frame.mask is None, frame.sigma, frame.strength, frame.index) for frame in own)
        key = (kinds, text_length, active, riding, hidden, mode)
        layout = _remembered(
            self._layouts,
            key,
            lambda: self._layout(own, text_length, active, riding, hidden=hidden, reads=mode == "read"),
            _KEPT_LAYOUTS,
        )
        tokens = None
        if len(layout.live) > len(own):
            tokens = self._tokens([riding[i - len(own)] for i in layout.live[len(own) :]], pairing, empty)
        return Arranged(key, layout, tokens, cache)

    def _tokens(self, riders: Sequence[int], pairing: Pairing, empty: bool) -> torch.Tensor:
        """(B, n, C) of some conditions, for the rows of a batch."""
        items = [self.conditions[i] for i in riders]
        parts = [part for part in (item.empty if empty else item.tokens for item in items) if part is not None]
        orders = tuple(pairing.order(len(part)) for part in parts)
        return _remembered(
            self._kept.tensors,
            ("tokens", *riders, empty, orders),
            lambda: torch.cat([_per_row(part, order) for part, order in zip(parts, orders, strict=True)], dim=1),
        )

    def step(
        self,
        arranged: Arranged,
        own: int,
        rope: Callable[[Sequence[Frame], torch.Tensor | None], torch.Tensor] | None = None,
        places: tuple = (),
        numbers: tuple[int, ...] = (),
        *,
        kept: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> Step:
        """The plan of a pass for a hooked transformer.

        Args:
            own: frames of the image tokens.
            rope: gives the rotations of the sequence, from the frames of the conditions in it and the numbers of the
                image tokens that are computed; `None`: positions are added.
            places: objects that the rotations depend on; they are computed again when a pipeline passes others.
            numbers: that the rotations depend on.
            kept: numbers of the image tokens that are computed; `None`: those that the first frame's mask leaves.
            device: of the tokens, where there are no conditions to tell it.
        """
        key, layout, tokens, cache = arranged
        device = self.conditions[0].tokens.device if self.conditions else torch.device(device or "cpu")
        plans = block_plans(layout, device, writes=cache is not None and cache.mode == "write")
        mask, table = layout.frames[0].mask, None
        if mask is not None:
            kept = layout.kept(("places", device), lambda: mask.flatten().nonzero().flatten().to(device))
        if rope is not None:
            riders = [layout.frames[i] for i in layout.live[own:]]
            table, _ = _remembered(
                self._kept.tables,
                (key, numbers, *map(id, places)),
                lambda: (rope(riders, kept), places),  # holding the objects, so that their ids stay theirs
            )
        return Step(layout, own, *plans, table, tokens, cache, kept)

    def kept_rows(self, arranged: Arranged, call: Call, present: torch.Tensor) -> torch.Tensor | None:
        """Numbers of the image tokens that are computed; `None`: all.

        Args:
            present: boolean, one for each token of the references.
        """
        if bool(present.all()):
            return None

        def build() -> torch.Tensor:
            image = torch.arange(call.length - len(present))
            return torch.cat([image, len(image) + present.nonzero().flatten()]).to(call.latents.device)

        return _remembered(self._kept.tensors, ("rows", arranged.key, call.length), build)

    def streams(self, arranged: Arranged, given: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Results that are kept of blocks which depend on some arguments alone; an empty dictionary to put them in
        where none are.

        Args:
            given: the arguments.
        """
        active = tuple(tuple(layer.active_adapters) for layer in self.lora_layers)
        key = (arranged.key, active, self._weights(lambda layer: tuple(layer.lora_A)))
        kept = self._kept
        for entry in kept.streams:
            if entry.key == key and all(map(_same, entry.given, given)):
                return entry.results
        seen = tuple(None if one is None else _Seen(one) for one in given)
        kept.streams = [*kept.streams[-_KEPT_CACHES + 1 :], _Streams(key, seen, {})]
        return kept.streams[-1].results

    def reference_keys(self, arranged: Arranged, texts: Sequence[torch.Tensor], step: int) -> ReferenceKeys:
        """The keys and values of references that were kept in this call of the pipeline; to be written if none were.

        Args:
            arranged: the pass without a cache.
            texts: of the pass, see `Call.texts`.
            step: of the pass, from 0.
        """
        kept = self._kept
        if step == 0:  # of a new call, but for what another guidance branch has just written
            kept.references = [entry for entry in kept.references if entry.used == 0]
        for entry in kept.references:
            if entry.key == arranged.key and all(map(_same, entry.texts, texts)):
                if entry.written < step:
                    entry.used = step
                    return entry
                kept.references.remove(entry)
                break
        new = ReferenceKeys(arranged.key, tuple(_Seen(one) for one in texts), step, step)
        kept.references = [*kept.references[-_KEPT_CACHES + 1 :], new]
        return new

    def completed(self, image: Frame) -> Frame:
        """The frame of an image of which complements know a part: its tokens are those that are generated."""
        region = self.region
        assert region is not None
        size = (region.shape[0], region.shape[1])
        return _remembered(self._frames, (image.sigma,), lambda: replace(image, size=size, mask=region))

    def region_on(self, device: torch.device) -> torch.Tensor:
        """The region on the device of the tokens."""
        assert self.region is not None
        region = self.region
        return _remembered(self._kept.tensors, ("region", device), lambda: region.to(device))

    def forget(self) -> None:
        """Drop the kept keys and values; the next pass computes them."""
        self._kept = _Kept()
        with self._lock:
            for other in self._refitted.values():
                other.forget()

    def known(self, pairing: Pairing = ONE) -> torch.Tensor:
        """(B, N, C) tokens of the complement conditions at their places, zero where none is."""
        assert self.region is not None
        tokens, rows = self.region.numel(), pairing.batch
        complements = [item for item in self.conditions if item.condition.complement]
        orders = tuple(pairing.order(len(item.tokens)) for item in complements)

        def build() -> torch.Tensor:
            first = complements[0].tokens
            full = first.new_zeros(rows, tokens, first.shape[2])
            for item, order in zip(complements, orders, strict=True):
                assert item.frame.mask is not None
                full[:, item.frame.mask.flatten()] = _per_row(item.tokens, order)
            return full

        return _remembered(self._kept.tensors, ("known", rows, orders), build)

    def _layout(
        self,
        own: Sequence[Frame],
        text_length: int,
        active: tuple[int, ...],
        riding: tuple[int, ...],
        *,
        hidden: bool,
        reads: bool,
    ) -> FrameLayout:
        frames = [*own, *(self.conditions[i].frame for i in riding)]
        layout = FrameLayout.build(frames, text_length, main_adapters=self.main_adapters)
        first = layout.num_texts + len(own)
        idle = [place for place, i in enumerate(riding, start=first) if i not in active]
        idle += range(layout.num_texts + 1, first) if hidden else []
        if idle:
            visible = layout.visible.clone()
            visible[idle] = False
            visible[:, idle] = False
            visible[idle, idle] = True
            layout = replace(layout, visible=visible)
        return layout.without_frozen() if reads else layout

    def _reading(self, layer: LoraLayer) -> Sequence[str]:
        """Adapters on which keys and values of conditions depend: their own, and those of the main rows, which act on
        all rows in layers that OminiControl does not switch."""
        main = layer.active_adapters if self.main_adapters is None else self.main_adapters
        return list(dict.fromkeys((*self.adapters, *main)))

    def _weights(self, names: Callable[[LoraLayer], Sequence[str]]) -> tuple:
        """What changes when adapters of some names change."""
        return tuple(
            (name, layer.scaling[name], *_state(layer.lora_A[name].weight), *_state(layer.lora_B[name].weight))
            for layer in self.lora_layers
            for name in names(layer)
            if name in layer.lora_A
        )

    def _cache(self, active: tuple, empty: bool, sizes: tuple, cached_by: torch.Tensor) -> KVCache:
        """The cache that belongs to these conditions, this prompt and these weights; a new one if none does."""
        weights = self._weights(self._reading)
        kept = self._kept
        for entry in kept.caches:
            if entry[:4] == (active, empty, sizes, weights) and entry.cached_by.equals(cached_by):
                return entry.cache
        kept.caches = [entry for entry in kept.caches if entry.weights == weights][-_KEPT_CACHES + 1 :]
        kept.caches.append(_Entry(active, empty, sizes, weights, _Seen(cached_by), KVCache()))
        return kept.caches[-1].cache


_KEPT_CACHES = 4  # two guidance branches, each with its black image
_KEPT_TENSORS = 8
_KEPT_LAYOUTS = 32


def _remembered(kept: dict[tuple, _T], key: tuple, build: Callable[[], _T], most: int = _KEPT_TENSORS) -> _T:
    """What was built for an earlier pass, or is built now; so many at most."""
    found = kept.get(key)
    if found is None:
        if len(kept) >= most:
            kept.clear()
        found = kept[key] = build()
    return found


def _per_row(tokens: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Tokens (b, n, C) of b images for each row of a batch: (B, n, C)."""
    return tokens.expand(len(order), -1, -1) if len(tokens) == 1 else tokens[list(order)]


def _fits(item: EncodedCondition, grid: tuple[int, int], side: int) -> bool:
    """Whether a condition has the size at which it is read for an image of so many rows and columns of tokens."""
    rows, columns = item.frame.size
    if item.condition.position == "centred" and item.target != grid:
        return False
    return item.condition.read_size(item.source_size, side, grid) == (rows * side, columns * side)


def _state(weight: torch.Tensor) -> tuple[int, int]:
    """What changes when a weight is written (its version) or given other memory (hot-swapping)."""
    return weight._version, weight.data_ptr()


def _version(tensor: torch.Tensor) -> int | None:
    """What changes when a tensor is written; `None` for one of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version
