"""Which of a condition's images each sample of a batch meets.

Samples stand prompt by prompt ([p0, p0, p1, p1] for two prompts with two images each), and guidance repeats the whole
batch behind itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

COPIES = (1, 2, 3)
"""Of the samples in one forward pass: alone, under guidance, under perturbed-attention guidance besides."""


@dataclass(frozen=True)
class Samples:
    """What a call of a pipeline makes."""

    count: int
    """Images in all."""
    prompts: int | None = None
    """`None`: not known; any divisor of `count` may be the number of prompts."""

    @classmethod
    def of_prompts(cls, prompts: int, images_per_prompt: int = 1) -> Samples:
        """The batch of a call of a pipeline."""
        return cls(prompts * images_per_prompt, prompts)

    def order(self, images: int) -> tuple[int, ...]:
        """Number of the image, of so many, that each sample meets.

        Raises:
            ValueError: the images are neither one, nor one per prompt, nor one per sample.
        """
        if images == 1:
            return (0,) * self.count
        if images == self.count:
            return tuple(range(self.count))
        if images == self.prompts or (self.prompts is None and images < self.count and self.count % images == 0):
            each = self.count // images
            return tuple(number // each for number in range(self.count))
        prompts = "" if self.prompts is None else f"{self.prompts} prompt(s) and "
        raise ValueError(
            f"a condition holds {images} images for {prompts}{self.count} sample(s); give one for all, one per "
            "prompt, or one per sample"
        )


@dataclass(frozen=True, eq=False)
class Pairing:
    """What tells, in a forward pass, which image belongs to which row of its batch."""

    batch: int
    samples: Samples | None = None
    """`None`: found out by what follows."""
    latents: torch.Tensor | None = None
    """(B, …) what the model denoises: under guidance its copies are equal bit for bit."""
    texts: Sequence[torch.Tensor] = ()
    """Each (B, …): equal for all samples of a prompt."""
    copies: Sequence[int] = COPIES
    """How often the batch may hold the samples."""
    guided: bool | None = None
    """Whether the pipeline says that guidance repeats them; asked where all else leaves it open."""

    def order(self, images: int) -> tuple[int, ...]:
        """Number of the image, of so many, that each row of the batch meets.

        Raises:
            ValueError: the images are neither one, nor one per prompt, nor one per sample; or nobody can tell.
        """
        if images == 1:
            return (0,) * self.batch
        if self.samples is not None:
            if self.batch % self.samples.count:
                raise ValueError(
                    f"the transformer got a batch of {self.batch}, which is no multiple of the {self.samples.count} "
                    "samples that were told; correct samples="
                )
            return self.samples.order(images) * (self.batch // self.samples.count)
        readings = {self._reading(copies, images) for copies in self._copies()} - {()}
        if len(readings) > 1:
            raise ValueError(
                f"a condition holds {images} images, and which row of the batch of {self.batch} meets which cannot be "
                "told, as prompts or noises are equal; pass samples=, the number of images that the call makes "
                "(prompts times num_images_per_prompt), to use()"
            )
        order = readings.pop() if readings else None
        if order is None:
            raise ValueError(
                f"a condition holds {images} images for a batch of {self.batch}; give one for all, one per prompt, or "
                "one per sample"
            )
        return order

    def _copies(self) -> list[int]:
        """How often the batch may hold the samples, by what it holds and by what the pipeline says."""
        able = [copies for copies in self.copies if self.batch % copies == 0 and self._repeats(copies)]
        if self.guided and len(able) > 1:
            return able[1:]
        return able[:1] if self.guided is False else able

    def _repeats(self, copies: int) -> bool:
        if self.latents is None:
            return True
        first, *others = self.latents.split(self.batch // copies)
        return all(torch.equal(first, other) for other in others)

    def _reading(self, copies: int, images: int) -> tuple[int, ...] | None:
        """The order if the batch holds the samples so often: `None` if the images do not belong to them, () if the
        texts say that it does not."""
        count = self.batch // copies
        if count < images or count % images:
            return None
        each = count // images
        groups = [group for text in self.texts for group in text.split(each)]
        if not all(torch.equal(group, group[:1].expand_as(group)) for group in groups):
            return ()
        return Samples(count).order(images) * copies


@dataclass(frozen=True)
class Target:
    """What is known of the images that a call generates, before it begins."""

    grid: tuple[int, int] | None = None
    """Rows and columns of tokens, which conditions are fitted to."""
    samples: Samples | None = None

    @classmethod
    def of(cls, size: tuple[int | None, int | None], side: int, samples: Samples | None = None) -> Target:
        """Of a height and a width in pixels, `None` where they are not known.

        Args:
            side: pixels per side of a token.
            samples: if their number is known.
        """
        height, width = size
        return cls(None if height is None or width is None else (height // side, width // side), samples)


UNKNOWN = Target()
ONE = Pairing(1)
