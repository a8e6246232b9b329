"""Tiles of an image as vectors in the sequence of a language model: projector, pooling, rows, newline vectors.

LLaDA-V, arXiv 2505.16933; LaViDa, arXiv 2505.16839; both lay tokens out as LLaVA-NeXT and LLaVA-OneVision do.

T tiles of n = s x s tokens; d features of the language model; N vectors of an image. Sizes of images are
(width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional

from imgdit.compat import ModelMixin, SafetensorsOnly
from imgdit.images.fitting import Size
from imgdit.images.tiles import Mode, Tiling, Video
from imgdit.naming import check_choice

Pool = Literal["bilinear", "average", "max"]
VideoNewline = Literal["grid", "frame", "one_token", "no_token"]
SHRINK_ABOVE = 1.1
"""Ratio of sides above which a map of too many tokens is scaled down."""


class ImageProjector(SafetensorsOnly, ModelMixin, ConfigMixin):
    """Projects a vision tower's features to the width of a language model and lays them out as its tokens.

    Weights have their published names without "model.": `mm_projector.0`, `mm_projector.2`, `image_newline`.

    Args:
        vision_size: features of the tower.
        hidden_size: d.
        layers: linear layers, with GELU between.
        image_size, patch_size: of the tower, in pixels.
        tiling, grids, pads_base: see `imgdit.images.tiles.Tiling`.
        most_tiles: areas of so many tiles above which the map of a grid is scaled down (LLaDA-V: 4); `None`: never.
        pool_stride: by which a tile's tokens are pooled after projection (LaViDa: 2); 1: not.
        pool_mode: how; "bilinear" rounds the side up, "average" and "max" down.
        video_stride: as `pool_stride`, of a video's frames.
        video_newline: where a video has newline vectors: after each row ("grid"), each frame, once at the end, or
            nowhere.
    """

    @register_to_config
    def __init__(
        self,
        vision_size: int = 1152,
        hidden_size: int = 4096,
        layers: int = 2,
        image_size: int = 384,
        patch_size: int = 14,
        tiling: Mode = "anyres",
        grids: Sequence[Sequence[int]] = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)),
        pads_base: bool = False,
        most_tiles: int | None = None,
        pool_stride: int = 1,
        pool_mode: Pool = "bilinear",
        video_stride: int = 2,
        video_newline: VideoNewline = "grid",
    ):
        super().__init__()
        check_choice("pool_mode", pool_mode, get_args(Pool))
        check_choice("video_newline", video_newline, get_args(VideoNewline))
        if layers < 1 or pool_stride < 1 or video_stride < 1:
            raise ValueError(
                f"layers, pool_stride and video_stride must be at least 1, got {layers}, {pool_stride} and "
                f"{video_stride}"
            )
        self.tiling = Tiling(tiling, tuple((width, height) for width, height in grids), image_size, pads_base)
        linear = [nn.Linear(vision_size if n == 0 else hidden_size, hidden_size) for n in range(layers)]
        self.mm_projector = nn.Sequential(*[part for layer in linear for part in (nn.GELU(), layer)][1:])
        self.image_newline = nn.Parameter(torch.randn(hidden_size) / math.sqrt(hidden_size))

    @property
    def side(self) -> int:
        """s, tokens per side of a tile before pooling."""
        return self.config.image_size // self.config.patch_size

    def forward(self, features: Sequence[torch.Tensor], shown: Sequence[Size | Video]) -> list[torch.Tensor]:
        """Vectors (N, d) of each image.

        Args:
            features: (T, n, vision_size) of each image's tiles, or of each video's frames.
            shown: size of each image, or the video.

        Raises:
            ValueError: features of another tower, or an image so narrow that no row of tokens is left of it.
        """
        wanted = (self.side**2, self.config.vision_size)
        for one in features:
            if tuple(one.shape[1:]) != wanted:
                raise ValueError(
                    f"the vision tower gives {one.shape[1]} tokens of {one.shape[2]} features, the projector reads "
                    f"{wanted[0]} of {wanted[1]}"
                )
        projected = self.mm_projector(torch.cat(list(features))).split([len(one) for one in features])
        return [self._tokens(one, what) for one, what in zip(projected, shown)]

    def lengths(self, tiles: Sequence[int], shown: Sequence[Size | Video]) -> list[int]:
        """N of each image, before anything is computed.

        Args:
            tiles: number of each image's tiles.
            shown: as in `forward`.
        """
        empty = [torch.empty(count, self.side**2, self.config.hidden_size, device="meta") for count in tiles]
        return [len(self._tokens(one, what)) for one, what in zip(empty, shown)]

    def _tokens(self, tiles: torch.Tensor, shown: Size | Video) -> torch.Tensor:
        config = self.config
        if isinstance(shown, Video):
            pooled = pool_tokens(tiles, config.video_stride, config.pool_mode)
            return join_frames(pooled, self.image_newline, config.video_newline)
        tiles = pool_tokens(tiles, config.pool_stride, config.pool_mode)
        return join_tiles(tiles, shown, self.tiling.grid_of(shown), self.image_newline, config.most_tiles)


def pool_tokens(tokens: torch.Tensor, stride: int, mode: Pool = "bilinear") -> torch.Tensor:
    """Tokens (T, s * s, d) of square maps pooled to fewer.

    Args:
        mode: "bilinear": to sides of ceil(s / stride), half-pixel centres, without antialiasing; "average" and "max":
            of stride x stride tokens, to sides of floor(s / stride).
    """
    if stride == 1:
        return tokens
    maps = _maps(tokens)
    if mode == "bilinear":
        side = math.ceil(maps.shape[-1] / stride)
        maps = functional.interpolate(maps, (side, side), mode="bilinear")
    else:
        maps = (functional.avg_pool2d if mode == "average" else functional.max_pool2d)(maps, stride)
    return maps.flatten(2).transpose(1, 2)


def join_tiles(
    tiles: torch.Tensor, size: Size, grid: Size | None, newline: torch.Tensor, most_tiles: int | None = None
) -> torch.Tensor:
    """Vectors (N, d) of an image: the whole image's tokens, then the map of its grid row by row.

    The map is cut back to the image's aspect, scaled down if it is too large, and a newline vector ends each row. An
    image of one tile has one newline vector at its end.

    Args:
        tiles: (T, s * s, d), the whole image first.
        size: of the image, in pixels.
        grid: columns and rows of tiles; `None`: there is one tile.
        newline: (d,).
        most_tiles: areas of so many tiles that the map may have.
    """
    if grid is None:
        return torch.cat([tiles[0], newline[None].to(tiles)])
    base, (columns, rows) = tiles[0], grid
    maps = _maps(tiles[1:])  # (columns * rows, d, s, s)
    side = maps.shape[-1]
    whole = maps.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)  # (d, H, W)
    whole = cut_to_aspect(whole, size)
    height, width = whole.shape[1:]
    if most_tiles is not None:
        times = math.sqrt(height * width / (most_tiles * side**2))
        if times > SHRINK_ABOVE:
            smaller = (max(1, int(height // times)), max(1, int(width // times)))
            whole = functional.interpolate(whole[None], smaller, mode="bilinear")[0]
    ends = newline.to(whole)[:, None, None].expand(-1, whole.shape[1], 1)
    return torch.cat([base, torch.cat([whole, ends], 2).flatten(1).T])


def cut_to_aspect(tokens: torch.Tensor, size: Size) -> torch.Tensor:
    """The middle (d, h, w) of a map (d, H, W) that an image of a size fills.

    Raises:
        ValueError: the image is so narrow that nothing is left.
    """
    height, width = tokens.shape[1:]
    if size[0] / size[1] > width / height:
        border = (height - int(size[1] * (width / size[0]))) // 2
        cut = tokens[:, border : height - border]
    else:
        border = (width - int(size[0] * (height / size[1]))) // 2
        cut = tokens[:, :, border : width - border]
    if not cut.numel():
        raise ValueError(
            f"an image of {size[0]}x{size[1]} pixels is too narrow: of {width}x{height} tokens not one row is left in "
            "its aspect; cut it, or use tiling 'pad'"
        )
    return cut


def join_frames(frames: torch.Tensor, newline: torch.Tensor, position: VideoNewline) -> torch.Tensor:
    """Vectors (N, d) of a video's frames (T, s * s, d), see `ImageProjector`."""
    ends = newline.to(frames)
    if position == "grid":
        rows = _maps(frames).permute(0, 2, 3, 1)  # (T, s, s, d)
        return torch.cat([rows, ends.expand(*rows.shape[:2], 1, -1)], 2).flatten(0, 2)
    if position == "frame":
        return torch.cat([frames, ends.expand(len(frames), 1, -1)], 1).flatten(0, 1)
    joined = frames.flatten(0, 1)
    return torch.cat([joined, ends[None]]) if position == "one_token" else joined


def _maps(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (T, s * s, d) as maps (T, d, s, s)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def tower_features(tower: Any, tiles: torch.Tensor, at_once: int = 16) -> torch.Tensor:
    """Features (T, n, vision_size) of tiles (T, 3, S, S): the output of the tower's last layer, without a norm.

    Args:
        tower: transformers' `SiglipVisionModel`, of the layers that are used.
        at_once: tiles per pass.
    """
    found = [
        tower(pixel_values=part.to(tower.dtype), output_hidden_states=True).hidden_states[-1]
        for part in tiles.split(at_once)
    ]
    return torch.cat(found)
