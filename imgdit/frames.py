"""Frames, and the layout by which a backbone reads them.

A generation is a sequence of frames: the image being generated, a depth map that is given, a condition that steers, a
prompt, a caption that is generated. `Frame` is a latent grid, `TextFrame` a row of tokens, and `Segment` what both
have in common. `FrameLayout` puts them in a row and answers what the backbone asks: how long each is, where each token
sits, its noise level, which adapter reads it, and who sees whom.

T text tokens, N image tokens, X texts, F frames. Segments are numbered texts first, then frames, and the joint
sequence holds their tokens in that order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from imgdit.display import Shown
from imgdit.moved import renamed
from imgdit.naming import old_names


@old_names(held="is_clean")
class Segment(Shown):
    """What `Frame` and `TextFrame` have in common: tokens with a noise level, an adapter, and what they see."""

    sigma: float | None
    adapter: str | None
    sees: Literal["all", "joint", "self"]
    guidance: float | None
    strength: float = 1.0
    reference: bool = False
    everywhere: bool = False

    @property
    def is_clean(self) -> bool:
        """Whether it conditions: it keeps its noise level, mostly 0, and is not denoised."""
        return self.sigma is not None

    @property
    def predicted(self) -> bool:
        """Whether the model predicts it: it is generated and does not condition."""
        return self.sigma is None and not self.reference

    def _check(self) -> None:
        if self.sigma is not None and not 0.0 <= self.sigma <= 1.0:
            raise ValueError(f"a frame's sigma is a noise level in [0, 1] or None, got {self.sigma}")
        if self.sees not in ("all", "joint", "self"):
            raise ValueError(f"a frame sees 'all', 'joint' or 'self', got {self.sees!r}")


@dataclass(frozen=True, eq=False)
class Frame(Segment):
    """One latent grid: its tokens' places, its noise level, and the adapter that reads it."""

    size: tuple[int, int]
    """Rows and columns of the token grid."""
    sigma: float | None = None
    """Noise level in [0, 1] the frame keeps; `None`: the frame is generated and follows the schedule."""
    adapter: str | None = None
    """Name of the LoRA adapter that acts on this frame's tokens, and on no others."""
    sees: Literal["all", "joint", "self"] = "all"
    """What its tokens attend to: everything; everything but other frames that have an adapter (OminiControl's joint
    mode); only themselves (its independent mode, which makes keys and values cacheable)."""
    index: float = 0.0
    """First position coordinate: the frame's number (OneDiffusion), 0 where frames share a plane (OminiControl)."""
    offset: tuple[float, float] = (0.0, 0.0)
    """Rows and columns added to the grid's coordinates, in tokens."""
    scale: float = 1.0
    """Size of a token of this frame in tokens of the target: 2 for a condition at half the side (OminiControl2)."""
    guidance: float | None = None
    """Guidance the embedding of a guidance-distilled model is given for this frame; `None`: the run's."""
    mask: torch.Tensor | None = None
    """Boolean (rows, columns): the tokens that are present. `None`: all of them."""
    strength: float = 1.0
    """γ > 0: log γ is added to the attention logits between this frame and everything else (OminiControl, section
    3.2). 1 is no bias; a frame of strength 0 is left out."""
    reference: bool = False
    """A conditioning frame without `sigma`: it has the noise level of the image that is generated,
    and no velocity is predicted for it."""
    everywhere: bool = False
    """Whether its adapter acts on all tokens, as a LoRA of the model does, and not on this frame's alone. Such a frame
    is read by the main adapters too."""

    def __post_init__(self) -> None:
        rows, columns = self.size
        if rows < 1 or columns < 1:
            raise ValueError(f"a frame needs at least one row and one column of tokens, got size={self.size}")
        self._check()
        if self.scale <= 0:
            raise ValueError(f"a frame's scale must be positive, got {self.scale}")
        if not 0.0 < self.strength < math.inf:
            raise ValueError(f"a frame's strength must be positive, got {self.strength}; leave the frame out for 0")
        if self.reference and self.is_clean:
            raise ValueError(f"a reference has the noise level of the image, got sigma={self.sigma}; leave one out")
        if self.mask is not None:
            if self.mask.dtype != torch.bool or tuple(self.mask.shape) != tuple(self.size):
                raise ValueError(
                    f"a frame's mask must be boolean of shape {tuple(self.size)} (rows, columns), "
                    f"got {self.mask.dtype} of shape {tuple(self.mask.shape)}"
                )
            if not self.mask.any():
                raise ValueError("a frame's mask selects no token; leave the frame out instead")

    @cached_property
    def length(self) -> int:
        """Number of tokens."""
        return self.size[0] * self.size[1] if self.mask is None else int(self.mask.sum())

    def ids(self) -> torch.Tensor:
        """Position ids (n, 3) float32: (frame, row, column). `(grid + offset) * scale + (scale - 1) / 2` centres a
        coarse token on the fine tokens it covers (OminiControl2, arXiv 2503.08280)."""
        rows, columns = (
            (torch.arange(n, dtype=torch.float32) + shift) * self.scale + (self.scale - 1) / 2
            for n, shift in zip(self.size, self.offset, strict=True)
        )
        grid = torch.stack(
            [
                torch.full(self.size, float(self.index)),
                rows[:, None].expand(self.size),
                columns[None, :].expand(self.size),
            ],
            dim=-1,
        )
        return grid[self.mask] if self.mask is not None else grid.reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class TextFrame(Segment):
    """One row of text tokens. Its noise level is the expected fraction of masked tokens.

    For pipelines write `TextFrame.clean("a red cube")`, `TextFrame.generate(32)`,
    `TextFrame.fill("a [?] cube on a [?] floor")` and `TextFrame.ask("what colour is the left object?")`; they count
    the tokens.
    """

    length: int = 0
    """Number of tokens. In pipelines 0: as many as the text has, or as the model writes by default."""
    sigma: float | None = 0.0
    """Noise level in [0, 1] the text keeps, 0 for a prompt; `None`: the text is generated.

    A prompt is modulated by the level of the run if it sees anything that is generated, as FLUX and SD3 were trained,
    otherwise by the highest level of what it sees."""
    keep: torch.Tensor | None = None
    """Boolean (length,) or (B, length): tokens of a generated text that are known and never masked, such as a question
    before its answer. `None`: none."""
    sees: Literal["all", "joint", "self"] = "all"
    """What its tokens attend to, as in `Frame`; a block never sees later blocks."""
    adapter: str | None = None
    """Name of the LoRA adapter that acts on this text's tokens, and on no others."""
    block: int | None = None
    """Number of the block in a text that is generated block by block; `None`: the text is not in blocks."""
    guidance: float | None = None
    """Guidance the embedding of a guidance-distilled model is given for this text; `None`: the run's."""
    start: int | None = None
    """Position of its first token. `None`: 0 for a text that is generated; a prompt has no positions, as in FLUX."""
    text: str | Sequence[str] | None = None
    """For pipelines: what a clean text says, or what of a generated one is known, with `[?]` for a token to fill and
    `[?3]` for three; one, or one per sample."""
    question: str | Sequence[str] | None = None
    """For pipelines: a question that the generated text answers; one, or one per sample."""

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"the length of a text counts tokens, got {self.length}")
        self._check()
        if self.block is not None and self.block < 0:
            raise ValueError(f"blocks are numbered from 0, got block={self.block}")
        if self.keep is not None:
            if self.keep.dtype != torch.bool or self.keep.ndim not in (1, 2) or self.keep.shape[-1] != self.length:
                raise ValueError(
                    f"a text's keep must be boolean of shape ({self.length},) or (batch, {self.length}), got "
                    f"{self.keep.dtype} of shape {tuple(self.keep.shape)}"
                )
            if self.is_clean:
                raise ValueError(f"keep is for a text that is generated, this one is clean at sigma={self.sigma}")

    @classmethod
    def clean(cls, text: str | Sequence[str], **options: Any) -> TextFrame:
        """A clean text: a prompt."""
        return cls(sigma=0.0, text=text, **options)

    @classmethod
    def generate(cls, max_length: int = 0, **options: Any) -> TextFrame:
        """A text that is generated, of at most so many tokens; 0: as the model writes by default."""
        return cls(max_length, None, **options)

    @classmethod
    def fill(cls, text: str | Sequence[str], max_length: int = 0, **options: Any) -> TextFrame:
        """A text whose holes are generated: `[?]` for a token, `[?3]` for three."""
        return cls(max_length, None, text=text, **options)

    @classmethod
    def ask(cls, question: str | Sequence[str], max_length: int = 0, **options: Any) -> TextFrame:
        """A question whose answer is generated; both have at most so many tokens."""
        return cls(max_length, None, question=question, **options)

    @classmethod
    def in_blocks(cls, length: int, block_length: int, done: int = 0, **options: Any) -> Iterator[TextFrame]:
        """The segments of a text in blocks: those that are done are clean, the next one is generated.

        Args:
            length: tokens of the whole text; a multiple of `block_length`.
            block_length: tokens of a block.
            done: blocks that are finished.
            options: other fields of each.
        """
        if block_length < 1 or length % block_length or not 0 <= done < length // block_length:
            raise ValueError(
                f"length must be a multiple of block_length with a block left after done, got {length}, "
                f"{block_length} and {done}"
            )
        for block in range(done + 1):
            sigma = 0.0 if block < done else None
            yield cls(block_length, sigma, block=block, start=block * block_length, **options)

    @property
    def entries(self) -> int:
        """Samples that it has a text or question for; 1 where one is for all."""
        source = self.text if self.question is None else self.question
        return 1 if source is None or isinstance(source, str) else len(source)

    def positions(self) -> torch.Tensor:
        """Positions (n,) float32 along the text: 0, 1, … from `start`, or zeros where it has none."""
        if self.is_clean and self.start is None:
            return torch.zeros(self.length)
        return torch.arange(self.length, dtype=torch.float32) + (self.start or 0)


def __getattr__(name: str) -> Any:
    """Names of version 0.1; they go with version 0.3."""
    return renamed(__name__, name, {"FrameLayout": "layout.FrameLayout", "RowGroup": "layout.RowGroup"})
