"""Where the image is in what a module returns.

A denoiser's modules return planes (B, C, H, W), token sequences, or tuples of several streams whose order differs by
class: FLUX's blocks return the text first, its attention the image first, its single blocks' attention both in one
sequence. Of the image's tokens, only those of the frame being generated are meant; conditions stand before or after
them.

B batch, N image tokens, T text tokens, n tokens of the frames being generated, d width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention

from imgdit import compat
from imgdit.family import Grid
from imgdit.sae.calls import DenoiserCall


class Tokens(NamedTuple):
    """Activations of the frames being generated, or of the text, at one hookpoint."""

    values: torch.Tensor
    """(B, n, d); of a text, its padding too."""
    grids: tuple[Grid, ...]
    """Rows and columns of each frame; none of a text."""
    call: DenoiserCall
    inputs: torch.Tensor | None = None
    """(B, n, d) the same tokens at the module's input, where a transcoder reads; `values` is the module's output."""

    @property
    def encoded(self) -> torch.Tensor:
        """(B, n, d) what a sparse autoencoder encodes."""
        return self.values if self.inputs is None else self.inputs


class Site(NamedTuple):
    """A module that is read or changed."""

    path: str
    """Its hookpoint: component and module path, as in "transformer.transformer_blocks.3"."""
    module: torch.nn.Module
    single_stream: bool
    """Whether it works on text and image as one sequence."""
    text: bool = False
    """Whether it works on the text alone."""
    in_attention: bool = False
    """Whether it is a part of an attention, where tensors may be split into heads."""
    image_first: bool = False
    """Whether the image stands before the text in such a sequence."""
    sequence_first: bool = False
    """Whether its tokens are (N, B, d)."""
    image_place: int | None = None
    """Where the image stands in a tuple that the module returns, by its family; `None`: that does not say."""

    def tokens(
        self, output: Any, call: DenoiserCall, plane: Grid | None = None, *, beside_text: bool | None = None
    ) -> Tokens:
        """Tokens of the frames being generated, or of the text, in what the module returned.

        Args:
            plane: grid of the token sequence inside a model that works on planes.
            beside_text: whether the image stream lies apart from the text; `None`: as `apart` tells of the output.
        """
        tensor = self._tensor(output, call)
        if self.text:
            if tensor.shape[0] != call.batch:
                raise ValueError(f"{self.path} has {tensor.shape[0]} texts for a batch of {call.batch}")
            return Tokens(tensor, (), call)
        if tensor.ndim == 4:
            return Tokens(tensor.flatten(2).transpose(1, 2), ((tensor.shape[2], tensor.shape[3]),), call)
        parts = [
            tensor[:, rows]
            for rows in self._rows(tensor, call, self.apart(output) if beside_text is None else beside_text)
        ]
        grids = call.grids or (() if plane is None else (plane,))
        return Tokens(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), grids, call)

    def replaced(self, output: Any, call: DenoiserCall, values: torch.Tensor) -> Any:
        """The output with other tokens (B, n, d) of the frames being generated, or of the text."""
        tensor = self._tensor(output, call)
        values = values.to(tensor.dtype)
        if self.text:
            return self._rebuilt(output, values)
        if tensor.ndim == 4:
            return self._rebuilt(output, values.transpose(1, 2).reshape(tensor.shape))
        rows = self._rows(tensor, call, self.apart(output))
        if rows == (slice(0, tensor.shape[1]),):
            return self._rebuilt(output, values)
        changed, start = tensor.clone(), 0
        for part in rows:
            length = part.stop - part.start
            changed[:, part] = values[:, start : start + length]
            start += length
        return self._rebuilt(output, changed)

    def _place(self, output: Any) -> int | None:
        """Index of the image stream in a tuple; `None` for a bare tensor."""
        if isinstance(output, torch.Tensor):
            return None
        if self.image_place is not None:
            return self.image_place
        streams = compat.block_streams(type(self.module))
        if streams is not None:
            return streams[0]
        if isinstance(self.module, (Attention, AttentionModuleMixin)):
            return 0
        raise ValueError(
            f"{self.path}: {type(self.module).__name__} returns {type(output).__name__} and is not known to say which "
            "part is the image; name it in its family's image_places"
        )

    def _tensor(self, output: Any, call: DenoiserCall) -> torch.Tensor:
        """The stream's tokens (B, N, d), or a plane (B, C, H, W)."""
        place = self._place(output)
        tensor = output if place is None else output[place]
        what = f"{self.path}: {type(self.module).__name__} returns"
        if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (3, 4):
            got = f"{tuple(tensor.shape)}, " if isinstance(tensor, torch.Tensor) else ""
            raise ValueError(f"{what} {got}no tokens (B, N, d) and no plane (B, C, H, W)")
        if tensor.ndim == 4 and (self.in_attention or self.text or not self._is_plane(tensor, call)):
            raise ValueError(
                f"{what} {tuple(tensor.shape)}, which is no plane of the {call.grids} tokens; an attention's heads "
                "(B, N, heads, d) are not read, hook the attention itself, its to_q or to_k, or the block around it"
            )
        return tensor.transpose(0, 1) if self.sequence_first else tensor

    def _is_plane(self, tensor: torch.Tensor, call: DenoiserCall) -> bool:
        """Whether 4 dimensions are a plane: in a model that works on planes, or of the size of the token grid."""
        return call.rows is None or call.grids == (tuple(tensor.shape[2:]),)

    def _rebuilt(self, output: Any, tensor: torch.Tensor) -> Any:
        place = self._place(output)
        if self.sequence_first:
            tensor = tensor.transpose(0, 1)
        if place is None:
            return tensor
        if not isinstance(output, (tuple, list)):  # a ModelOutput, which has its image first
            return type(output)(**{**output, next(iter(output)): tensor})
        return type(output)((*output[:place], tensor, *output[place + 1 :]))

    def apart(self, output: Any) -> bool:
        """Whether the image stream lies apart from the text: it does in a tuple, and in modules that know no text."""
        return not (self.single_stream and isinstance(output, torch.Tensor))

    def _rows(self, tensor: torch.Tensor, call: DenoiserCall, apart: bool) -> tuple[slice, ...]:
        """Rows of the frames being generated in the token sequence."""
        if call.rows is None:
            return (slice(0, tensor.shape[1]),)
        start = 0 if apart or self.image_first else call.text_length
        end = start + call.rows[-1].stop
        if tensor.shape[1] < end:
            raise ValueError(
                f"{self.path}: {type(self.module).__name__} returned {tensor.shape[1]} tokens, the generated frames "
                f"end at {end}; is it a module of the text stream?"
            )
        return tuple(slice(start + rows.start, start + rows.stop) for rows in call.rows)
