"""What an `MMDiT` with a text head predicts of texts about images, as the language model of a `MaskedTextPipeline`.

B rows, L tokens, V vocabulary, C channels of a latent, A tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from imgdit.attention.cache import KVCache
from imgdit.frames import Frame, TextFrame
from imgdit.layout import FrameLayout
from imgdit.models.functional import pack
from imgdit.models.masked_lm import rows_of
from imgdit.models.masked_text_passes import answer_likelihood
from imgdit.models.mmdit import MMDiT
from imgdit.pipelines.image_text_inputs import Rows

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Tokens (B, L) to text (B, L, J)."""


class ImageTextReader(torch.nn.Module):
    """Logits of masked texts about images. Passes over the same tokens are made once.

    Args:
        transformer: with a text head.
        embed: of its tokens.
        latents: (B, C, h, w) of the images; `None`: there are none.
        pooled: (1, P) pooled text of the empty prompt; `None`: the model has none.
        holes: boolean (B, L), masks that are filled, by whose fraction the noise level goes.
        mask_token_id: the mask.
        guidance_scale: above 1, steer away from the prediction without an image.
        adapter: LoRA that reads the texts.
        device: on which all of it is computed.
        cache: whether keys and values of images that see only themselves are kept over the passes.
    """

    def __init__(
        self,
        transformer: MMDiT,
        embed: Embed,
        latents: torch.Tensor | None,
        pooled: torch.Tensor | None,
        holes: torch.Tensor,
        mask_token_id: int,
        guidance_scale: float = 1.0,
        adapter: str | None = None,
        device: torch.device | str = "cpu",
        cache: bool = True,
    ):
        super().__init__()
        self._parts = (transformer, embed)  # not modules of this one
        self.latents, self.pooled, self.holes, self.adapter = latents, pooled, holes, adapter
        self.guidance_scale = guidance_scale
        self.config = SimpleNamespace(
            vocab_size=transformer.config.text_vocab_size, mask_token_id=mask_token_id, eos_token_id=None
        )
        self.device = torch.device(device)
        self._keep = cache
        self._cache: KVCache | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Logits (B, L, V) of tokens (B, L)."""
        if self._last is None or not torch.equal(self._last[0], input_ids):
            transformer, _ = self._parts
            with transformer.cache_context("plain"):
                logits = self._logits(input_ids, self.latents)
            if self.guidance_scale > 1 and self.latents is not None:
                with transformer.cache_context("uncond"):
                    free = self._logits(input_ids, None)
                logits = free + self.guidance_scale * (logits - free)
            self._last = (input_ids.clone(), logits)
        return SimpleNamespace(logits=self._last[1])

    def _logits(self, ids: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        transformer, embed = self._parts
        text = embed(ids).to(transformer.dtype)
        if reads_as_dual_diffusion(transformer):
            # The image is clean at timestep 0, and the text has no level of its own.
            image = None if latents is None else latents.to(transformer.dtype)
            return transformer(image, text, None, torch.zeros(len(ids), device=ids.device)).text_logits
        return self._in_layout(transformer, text, ids, latents)

    def _in_layout(
        self, transformer: MMDiT, text: torch.Tensor, ids: torch.Tensor, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """The image sees only itself, so it is computed in the first pass; without one the text sees only itself."""
        config = transformer.config
        caption = TextFrame(ids.shape[1], sigma=None, adapter=self.adapter)
        masked = (ids == self.config.mask_token_id) & self.holes
        level = masked.sum(1) / self.holes.sum(1).clamp(min=1)
        call: dict[str, Any] = {
            "encoder_hidden_states": text,
            "pooled_projections": None if self.pooled is None else self.pooled.to(text).expand(len(ids), -1),
            "timestep": text.new_zeros(len(ids)),
            "text_timestep": level * (1000.0 / config.timestep_scale),
        }
        if latents is None:
            none = text.new_zeros(len(ids), 0, transformer.token_channels)
            return transformer(none, layout=FrameLayout.build([caption]), **call).text_logits
        patch = int((transformer.token_channels // latents.shape[1]) ** 0.5)
        tokens = pack(latents.to(text), patch)
        grid = (latents.shape[2] // patch, latents.shape[3] // patch)
        layout = FrameLayout.build([caption, Frame(grid, sigma=0.0, sees="self")])
        if not self._keep:
            return transformer(tokens, layout=layout, **call).text_logits
        if self._cache is None:
            self._cache = KVCache()
            logits = transformer(tokens, layout=layout, cache=self._cache, **call).text_logits
            self._cache.freeze()
            return logits
        rest = layout.without_frozen()
        return transformer(tokens[:, :0], layout=rest, cache=self._cache, **call).text_logits


class AnswerPart(NamedTuple):
    """Tokens of an answer from some place on; those before stay masked."""

    start: int
    """Places between the question and these tokens."""
    tokens: Sequence[int]

    @property
    def stop(self) -> int:
        """Places up to the last of them."""
        return self.start + len(self.tokens)


def answer_likelihoods(
    reader: ImageTextReader, rows: Rows, answers: Sequence[AnswerPart | None]
) -> torch.Tensor:  # fmt: skip
    """Log-likelihoods (B,) float64 of an answer of each row, see `answer_likelihood`; 0 where there is none."""
    ids, starts = rows.ids.to(reader.device), torch.tensor(rows.starts, device=reader.device)
    found = torch.zeros(len(ids), dtype=torch.float64, device=reader.device)
    for length in {len(one.tokens) for one in answers if one is not None}:
        some = [(n, one) for n, one in enumerate(answers) if one is not None and len(one.tokens) == length]
        where = torch.tensor([n for n, _ in some], device=reader.device)
        first = starts[where] + torch.tensor([one.start for _, one in some], device=reader.device)
        places = first[:, None] + torch.arange(length, device=reader.device)  # (rows of this length, A)
        tokens = torch.tensor([list(one.tokens) for _, one in some])
        predict = partial(_logits_at, reader, ids, where, places)
        found[where] = answer_likelihood(predict, ids[where], places, tokens, reader.config.mask_token_id)
    return found


def _logits_at(
    reader: ImageTextReader, ids: torch.Tensor, where: torch.Tensor, places: torch.Tensor, grid: torch.Tensor
) -> torch.Tensor:
    """Logits (b, A, V) at places (b, A) of some rows of a grid (b, L), which take theirs among the ids (B, L)."""
    return rows_of(reader(ids.index_copy(0, where, grid)).logits[where], places)


def reads_as_dual_diffusion(transformer: Any) -> bool:
    """Whether Dual Diffusion's rules hold (arXiv 2501.00289): a text encoder reads texts with their masks and their
    padding, text and image see each other, and both have the timestep of the image. Its transformer has no pooled
    text."""
    return transformer.config.pooled_projection_dim is None
