"""Recorded runs of LLaDA-V and LaViDa, and parts that replay them."""

import json
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from imgdit.images.tiles import Tiling, cut_tiles
from imgdit.models.image_tokens import tower_features
from imgdit.models.vision_language import VisionLanguageModel, load_vision_language

FIXTURES = Path(__file__).parent / "parity"
SETS = ("llada_v", "lavida")
RECORDS = {name: json.loads((FIXTURES / name / "cases.json").read_text()) for name in SETS}
CASES = {
    f"{name}/{case['name']}": case | {"set": name, "meta": record["meta"]}
    for name, record in RECORDS.items()
    for case in record["cases"]
}


def named(*kinds: str, sets: tuple[str, ...] = SETS) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] in kinds and case["set"] in sets]


@cache
def _tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / name / "cases.safetensors")


def recorded(case: str, way: str) -> dict[str, torch.Tensor]:
    """Tensors of a case that went "in" or came "out", by their names within it."""
    owner, name = case.split("/")
    start = f"{name}.{way}."
    return {key.removeprefix(start): value for key, value in _tensors(owner).items() if key.startswith(start)}


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """The error rule of the recordings."""
    assert got.shape == want.shape
    error = float((got.detach().double() - want.double()).abs().max())
    assert error <= tolerance * max(1.0, float(want.abs().max())), error


def image_of(values: torch.Tensor, repeat: int = 1) -> Image.Image:
    """A PIL image of stored pixels (H, W, 3), each repeated in both directions."""
    return Image.fromarray(values.repeat_interleave(repeat, 0).repeat_interleave(repeat, 1).numpy())


@cache
def model_of(name: str) -> VisionLanguageModel:
    mask = RECORDS[name]["meta"]["special_ids"]["mask"]
    return load_vision_language(FIXTURES / name / "model", mask_token_id=mask)


def tiling_of(name: str, aspect: str, pads_base: bool = False) -> Tiling:
    """The tiling of a case's `image_aspect_ratio`."""
    tiling = model_of(name).projector.tiling
    return Tiling(aspect.split("_")[0], tiling.grids, tiling.size, pads_base)


def picture(name: str, key: str) -> Image.Image:
    """An image that cases name."""
    record = RECORDS[name]["meta"]["pictures"][key]
    return image_of(recorded(f"{name}/{record['case']}", "in")["image"], record["repeat"])


@cache
def features(name: str, key: str) -> torch.Tensor:
    """The tower's features of such an image's tiles."""
    aspect = RECORDS[name]["meta"]["pictures"][key]["image_aspect_ratio"]
    tiles = cut_tiles(picture(name, key), tiling_of(name, aspect))
    with torch.no_grad():
        return tower_features(model_of(name).vision_tower, tiles)


class settings_of:
    """The projector with the settings that such an image was recorded with, for a while."""

    def __init__(self, name: str, key: str):
        self.projector = model_of(name).projector
        self.record = RECORDS[name]["meta"]["pictures"][key]
        self.aspect = self.record["image_aspect_ratio"]
        self.name = name

    def __enter__(self):
        projector = self.projector
        self.before = projector.tiling, projector.config.pool_stride
        projector.tiling = tiling_of(self.name, self.aspect)
        projector.register_to_config(pool_stride=2 if self.record.get("pooled") else 1)
        return projector

    def __exit__(self, *_):
        self.projector.tiling = self.before[0]
        self.projector.register_to_config(pool_stride=self.before[1])


@cache
def vectors(name: str, key: str) -> torch.Tensor:
    """Vectors (N, d) of such an image."""
    with torch.no_grad(), settings_of(name, key) as projector:
        return projector([features(name, key)], [picture(name, key).size])[0]
