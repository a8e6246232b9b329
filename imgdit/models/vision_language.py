"""Language models that see: a masked language model, a vision tower and a projector between them.

LLaDA-V (arXiv 2505.16933) and LaViDa (arXiv 2505.16839) put an image's vectors in place of a token of the prompt.
`load_vision_language` reads their published folders without remote code: the language model by `load_masked_lm`, the
tower as transformers' `SiglipVisionModel` with the layers that are used, from the folder itself or from the folder
that its `config.json` names.

B rows, L places, d features of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from imgdit.compat import Adapters
from imgdit.hub import hub_file
from imgdit.images.fitting import Size
from imgdit.images.tiles import Mode, Tiling, Video
from imgdit.io.safe_json import read_object
from imgdit.models.image_tokens import ImageProjector, tower_features
from imgdit.models.masked_lm import load_masked_lm, model_folder
from imgdit.naming import nearest, shown

MASK = "<|mdm_mask|>"
INSIDE = "model.vision_tower.vision_tower.vision_model."
"""Weights of the tower in a published folder."""
BESIDE = "vision_model."
"""Weights of the tower in a folder of its own."""
UNUSED = r"(post_layernorm|head)\."
"""Weights of the tower behind the features that are used."""


class VisionLanguageModel(Adapters, nn.Module):
    """The three parts as one module, for training."""

    base_model_prefix = ""  # PEFT asks transformers for the names of weights, which reads this of a model's root

    def __init__(self, language_model: Any, vision_tower: Any, projector: ImageProjector):
        super().__init__()
        self.language_model, self.vision_tower, self.projector = language_model, vision_tower, projector

    @property
    def config(self) -> Any:
        """Of the language model."""
        return self.language_model.config

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the language model's activations in the backward pass."""
        model = self.language_model
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its new name

    def forward(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor,
        tiles: Sequence[torch.Tensor],
        shown: Sequence[Size | Video],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, V).

        Args:
            input_ids: (B, L), some tokens masked; B may be a multiple of the rows of `images`.
            images: boolean (rows, L), places of images, see `JoinedRows`.
            tiles: (T, 3, S, S) of each image.
            shown: size of each image, or the video.
            attention_mask: (B, L), or boolean (B, 1, L, L), true where a place (row) sees another (column).
            position_ids: (B, L).
        """
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if tiles:
            counts = [len(one) for one in tiles]
            features = tower_features(self.vision_tower, torch.cat(list(tiles))).split(counts)
            vectors = torch.cat(self.projector(features, shown)).to(embeds.dtype)
            copies = len(input_ids) // len(images)
            embeds = embeds.masked_scatter(images.repeat(copies, 1)[..., None], vectors.repeat(copies, 1))
        return self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids
        ).logits


def load_vision_language(
    source: str | Path,
    *,
    subfolder: str | None = None,
    vision_tower: str | Path | None = None,
    mask_token_id: int | None = None,
    dtype: Any = "auto",
    **options: Any,
) -> VisionLanguageModel:
    """A published folder of LLaDA-V or LaViDa, or a pipeline's folder that `save_pretrained` wrote.

    Args:
        source: folder or Hub repository.
        subfolder: of `source`; of a pipeline's folder all parts are read whatever it says.
        vision_tower: folder or repository of the tower, in place of the one that `config.json` names.
        mask_token_id: in place of the one that `config.json`, or where that is silent the tokenizer, names.
        dtype: of all weights; "auto": as stored.
        options: of `load_masked_lm`.

    Returns:
        The parts in evaluation mode. The tower has the layers that are used, and no pooling head.

    Raises:
        ValueError: no such folder, a model of another kind, no tower, or parts that do not fit together.
    """
    local = Path(source).expanduser()
    if (local / "model_index.json").is_file():
        return _saved(local, dtype, options)
    folder = model_folder(source, subfolder, options.get("revision"), options.get("token"))
    values = read_config(folder)
    tower = load_vision_tower(folder, values, vision_tower, dtype)
    projector = load_projector(folder, values, tower.config, dtype)
    if mask_token_id is None and values.get("mask_token_id") is None:
        mask_token_id = mask_token_of(folder)
    model = load_masked_lm(folder, mask_token_id=mask_token_id, dtype=dtype, **options)
    if (got := projector.config.hidden_size) != model.config.hidden_size:
        raise ValueError(
            f"{folder}: the projector makes {got} features, the language model reads {model.config.hidden_size}"
        )
    return VisionLanguageModel(model, tower, projector).eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a published folder.

    Raises:
        ValueError: it is of a model of another kind.
    """
    values = read_object(folder / "config.json")
    if values.get("model_type") != "llava_llada":
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {nearest(str(values.get('model_type')), ['llava_llada'])}; "
            "expected LLaDA-V or LaViDa on LLaDA"
        )
    return values


def mask_token_of(folder: Path) -> int | None:
    """LLaDA's mask token in a folder's `tokenizer.json`, which its tokenizers do not register as one."""
    file = folder / "tokenizer.json"
    added = read_object(file).get("added_tokens", []) if file.is_file() else []
    return next((token["id"] for token in added if token.get("content") == MASK), None)


def read_tiling(source: str | Path) -> Tiling:
    """How a model's images are cut into tiles, without loading it.

    Args:
        source: as of `load_vision_language`.

    Raises:
        ValueError: no such folder, or settings that are not known.
    """
    projector = Path(source).expanduser() / "projector"
    if (projector / "config.json").is_file():
        config = {**read_object(projector / "config.json")}
        return Tiling(config["tiling"], tuple(map(tuple, config["grids"])), config["image_size"], config["pads_base"])
    folder = model_folder(source, None, None, None)
    values = read_config(folder)
    mode, _, grids = _image_settings(folder, values)
    return Tiling(mode, grids, _tower_settings(_tower_folder(folder, values, None, whole=False)).image_size)


def _saved(folder: Path, dtype: Any, options: Mapping[str, Any]) -> VisionLanguageModel:
    """The parts of a saved pipeline."""
    lacking = [
        name for name in ("model", "vision_tower", "projector") if not (folder / name / "config.json").is_file()
    ]
    if lacking:
        raise ValueError(
            f"{folder} has no {lacking[0]}/config.json; expected the folder of a vision-language pipeline"
        )
    model = load_masked_lm(folder / "model", dtype=dtype, **options)
    tower = SiglipVisionModel.from_pretrained(folder / "vision_tower", dtype=dtype, use_safetensors=True)
    kept = {} if dtype == "auto" else {"torch_dtype": dtype}
    projector = ImageProjector.from_pretrained(folder / "projector", **kept)
    return VisionLanguageModel(model, tower, projector).eval()


def load_vision_tower(
    folder: Path, values: Mapping[str, Any], named: str | Path | None = None, dtype: Any = "auto"
) -> SiglipVisionModel:
    """The vision tower of a published folder, with the layers that are used.

    Args:
        folder: of the whole model.
        values: its `config.json`.
        named: folder or repository of the tower, in place of the one that `config.json` names.
        dtype: of the weights; "auto": as stored.

    Raises:
        ValueError: there is no tower, or its weights are not of the size that its configuration says.
    """
    weights, where = read_weights(folder, INSIDE), folder
    beside = _tower_folder(folder, values, named, whole=not weights)
    config = _tower_settings(beside)
    select = values.get("mm_vision_select_layer", -2)
    if values.get("mm_vision_select_feature", "patch") != "patch" or not -config.num_hidden_layers <= select < 0:
        raise ValueError(
            f"{folder / 'config.json'}: expected mm_vision_select_feature 'patch' and mm_vision_select_layer in "
            f"-{config.num_hidden_layers}..-1, got {values.get('mm_vision_select_feature')!r} and {select!r}"
        )
    config.num_hidden_layers += 1 + select
    config.vision_use_head = False
    if not weights:
        weights, where = read_weights(beside, BESIDE), beside
    if not weights:
        raise ValueError(
            f"neither {folder} ({INSIDE}*) nor {beside} ({BESIDE}*) has weights of the vision tower; name the tower's "
            "folder"
        )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights, which are replaced
        tower = SiglipVisionModel(config)
    _fill(tower, weights, str(where))
    return tower if dtype == "auto" else tower.to(dtype)


def _tower_settings(folder: Path) -> SiglipVisionConfig:
    """The configuration of a tower's own folder."""
    settings = read_object(folder / "config.json")
    settings = settings.get("vision_config", settings)
    kind = str(settings.get("model_type", "siglip_vision_model"))
    if kind not in ("siglip_vision_model", "siglip"):
        raise ValueError(f"{folder / 'config.json'}: expected a SigLIP tower, got model_type {kind!r}")
    taken = SiglipVisionConfig().to_dict()
    return SiglipVisionConfig(**{name: value for name, value in settings.items() if name in taken})


def _tower_folder(folder: Path, values: Mapping[str, Any], named: str | Path | None, whole: bool) -> Path:
    """Where the tower's own configuration is, and if wanted all of it."""
    name = values.get("mm_vision_tower") if named is None else named
    if not name:
        raise ValueError(f"{folder / 'config.json'} names no mm_vision_tower; name the vision tower's folder")
    for place in (Path(name).expanduser(), folder / name, folder.parent / name):
        if (place / "config.json").is_file():
            return place
    try:
        return model_folder(str(name), None, None, None) if whole else hub_file(str(name), "config.json").parent
    except Exception as error:  # of whichever library carries the request
        raise ValueError(
            f"{folder / 'config.json'} names the vision tower {str(name)!r}, which is neither in {folder.parent} nor "
            f"on the Hub ({error}); name the tower's folder"
        ) from error


def load_projector(folder: Path, values: Mapping[str, Any], tower: Any, dtype: Any = "auto") -> ImageProjector:
    """The projector of a published folder, with the settings of images in its `config.json`.

    Args:
        tower: configuration of the vision tower.

    Raises:
        ValueError: settings that are not known, or a tower of another size.
    """
    file = folder / "config.json"
    kind = re.fullmatch(r"mlp(\d+)x_gelu", str(values.get("mm_projector_type")))
    if kind is None or values.get("mm_patch_merge_type", "spatial_unpad") != "spatial_unpad":
        raise ValueError(
            f"{file}: expected mm_projector_type mlp2x_gelu and mm_patch_merge_type spatial_unpad, got "
            f"{values.get('mm_projector_type')!r} and {values.get('mm_patch_merge_type')!r}"
        )
    mode, most_tiles, grids = _image_settings(folder, values)
    weights = {
        **{f"mm_projector.{name}": value for name, value in read_weights(folder, "model.mm_projector.").items()},
        **{f"image_newline{name}": value for name, value in read_weights(folder, "model.image_newline").items()},
    }
    first = weights.get("mm_projector.0.weight")
    if first is None:
        raise ValueError(f"{folder} has no weights model.mm_projector.*; is it the folder of a whole model?")
    if first.shape[1] != tower.hidden_size:
        raise ValueError(
            f"{folder}: the projector reads {first.shape[1]} features, the vision tower that {file} names "
            f"({values.get('mm_vision_tower')!r}) gives {tower.hidden_size}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            projector = ImageProjector(
                first.shape[1], first.shape[0], int(kind[1]), tower.image_size, tower.patch_size, mode, grids,
                most_tiles=most_tiles,
                pool_stride=values.get("mm_pooler_ratio") or 1,
                pool_mode=values.get("mm_spatial_pool_mode") or "bilinear",
                video_stride=values.get("mm_spatial_pool_stride") or 2,
                video_newline=values.get("mm_newline_position") or "grid",
            )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    _fill(projector, weights, str(folder))
    return projector if dtype == "auto" else nn.Module.to(projector, dtype)


def _image_settings(folder: Path, values: Mapping[str, Any]) -> tuple[Mode, int | None, tuple[Size, ...]]:
    """Mode, tiles that a map is scaled down to, and grids of a published folder's images."""
    file = folder / "config.json"
    aspect = re.fullmatch(r"(square|pad|anyres)(?:_max_(\d+))?", str(values.get("image_aspect_ratio")))
    if aspect is None:
        raise ValueError(
            f"{file}: expected image_aspect_ratio square, pad, anyres or anyres_max_4, got "
            f"{values.get('image_aspect_ratio')!r}"
        )
    grids = values.get("image_grid_pinpoints") or ()
    if not all(isinstance(grid, (list, tuple)) and len(grid) == 2 for grid in grids):
        raise ValueError(f"{file}: image_grid_pinpoints must be a list of [width, height], got {shown(grids)}")
    mode: Any = aspect[1]
    return mode, int(aspect[2]) if aspect[2] else None, tuple((width, height) for width, height in grids)


def read_weights(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors of a folder whose names begin with a prefix, named without it."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no mapping
            found |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return found


def _fill(module: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Put weights into a module, all that it uses, and give it their number type."""
    own = module.state_dict()
    lacking = sorted(name for name in own.keys() - weights.keys() if not re.match(UNUSED, name))
    odd = sorted(name for name in own.keys() & weights.keys() if weights[name].shape != own[name].shape)
    if lacking or odd:
        name = (lacking or odd)[0]
        got = "is missing" if lacking else f"is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        raise ValueError(f"{source}: {name} of the {type(module).__name__} {got}; are these weights of its size?")
    nn.Module.to(module, next(iter(weights.values())).dtype).eval()  # diffusers' own warns at every change of type
    module.load_state_dict({name: tensor for name, tensor in weights.items() if name in own}, strict=False)
