"""The names that LoRA files of FLUX.1, SD3 and SD3.5 use, to diffusers' names and back.

peft       `transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight`: diffusers, OminiControl, ours; also
           without a prefix, behind `base_model.model.`, and with the adapter's name (`.lora_A.default.weight`)
comfyui    `diffusion_model.single_blocks.0.linear1.lora_A.weight`: the names of the models' own repositories
kohya      `lora_unet_single_blocks_0_linear1.lora_down.weight`: the same with underscores
onetrainer `lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight`: diffusers' with underscores
xlabs      `single_blocks.0.processor.qkv_lora.down.weight`

The models' own names fuse projections that diffusers keeps apart: a fused LoRA is the parts' down-projections above
each other and their up-projections on a block diagonal. diffusers' converters for FLUX.1 are written for its published
size and lose layers of some dialects, so the families have tables; a test holds them to diffusers' converters at that
size.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from imgdit.family import LoraNames, families
from imgdit.lora.guess import families_of, family_of
from imgdit.naming import check_name

__all__ = ["family_of"]  # of version 0.1


class _Tables(NamedTuple):
    """The names of all families together; where two families give one a meaning, the first one's counts."""

    blocks: dict[str, tuple[str, dict[str, tuple[str, ...]]]]
    """By own name of a list of blocks: diffusers' name of the list, and the layers."""
    root: dict[str, tuple[str, ...]]
    lists: dict[str, str]
    """Names of lists of blocks, own and diffusers', by themselves with underscores."""
    own_block: re.Pattern[str]
    block: re.Pattern[str]
    layers: dict[str, str]
    """diffusers' names of the layers of a block, by themselves with underscores."""
    roots: dict[str, str]
    """Names of layers outside of blocks, own and diffusers', by themselves with underscores."""
    scale_first: frozenset[str]
    scale_first_alone: tuple[str, ...]
    """See `LoraNames`."""


@functools.cache
def _tables(names: tuple[LoraNames, ...]) -> _Tables:
    blocks: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {}
    root: dict[str, tuple[str, ...]] = {}
    for one in names:
        for own, (listed, layers) in one.blocks.items():
            blocks.setdefault(own, (listed, dict(layers)))
        root = {**one.root, **root}
    lists = sorted({listed for listed, _ in blocks.values()})
    inner = [part for _, table in blocks.values() for parts in table.values() for part in parts]
    inner += [part for one in names for part in one.layers]
    return _Tables(
        blocks,
        root,
        {name.replace(".", "_"): name for name in (*lists, *blocks)},
        _block_names(blocks),
        _block_names(lists),
        {part.replace(".", "_"): part for part in inner},
        {name.replace(".", "_"): name for own, parts in root.items() for name in (own, *parts)},
        frozenset(name for one in names for name in one.scale_first),
        tuple(name for one in names for name in one.scale_first_alone),
    )


def _block_names(lists: Iterable[str]) -> re.Pattern[str]:
    """Names of layers in lists of blocks, with dots or underscores: list, number, layer."""
    named = "|".join(re.escape(name).replace(r"\.", "[._]") for name in lists)
    return re.compile(rf"({named})[._](\d+)[._](.+)")


def _known(first: LoraNames | None = None) -> tuple[LoraNames, ...]:
    """The names of a family, if one is told, and then those of the others."""
    known = [family.lora for family in families() if family.lora is not None]
    return tuple(dict.fromkeys(known if first is None else [first, *known]))


class LoraPair(NamedTuple):
    """One module's LoRA; its change of the weights is `up @ down`."""

    down: torch.Tensor
    """A: (rank, in, ...)"""
    up: torch.Tensor
    """B: (out, rank, ...)"""


class LoraShapeError(ValueError):
    """Tensors that cannot be a LoRA; names the module."""


class LoraKindError(ValueError):
    """Keys of something that is no plain LoRA of one adapter; says what."""


class Names(NamedTuple):
    """What a file's keys are, by their names alone."""

    parts: dict[str, dict[str, str]]
    """By module: the keys of "down", "up" and, where there is one, "alpha". A fused layer has its own name here."""
    own: frozenset[str]
    """The modules under names of the model's own repository."""
    dialect: str
    unused: tuple[str, ...]
    """Keys that are no part of a LoRA of the transformer, or of half a LoRA; sorted."""
    aside: dict[str, str]
    """Those of them that are understood: key and what it is."""
    tables: _Tables
    """The names by which they were understood."""
    families: tuple[LoraNames, ...] = ()
    """The families whose names they may be."""

    @property
    def used(self) -> list[str]:
        """Keys of the LoRA."""
        return [key for parts in self.parts.values() for key in parts.values()]


class Renamed(NamedTuple):
    """A file's tensors under diffusers' names."""

    pairs: dict[str, LoraPair]
    """By module, as `transformer_blocks.0.attn.to_q`; the file's alphas are multiplied into `up`."""
    dialect: str
    unused: tuple[str, ...]
    """Keys that are no part of a LoRA of the transformer, or of half a LoRA."""
    aside: dict[str, str]
    """Those of them that are understood: key and what it is."""


Scale = Callable[[str, int], float]
"""Factor of a module's change, by the module's name in the file and the rank."""


# Reading names

_KEY = re.compile(
    r"(?P<module>.+?)\.?(?:"
    r"(?<=\.)lora_(?P<peft>[AB])(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?"
    r"|(?<=\.)lora[_.](?P<kohya>down|up)\.weight"
    r"|(?:(?<=_lora\.)|(?<=_lora[12]\.))(?P<xlabs>down|up)\.weight"
    r"|(?<=\.)(?P<alpha>alpha))"
)
_PARTS = {"A": "down", "down": "down", "B": "up", "up": "up", "alpha": "alpha"}
_OWN_PREFIXES = ("diffusion_model.", "lora_unet_", "lycoris_")
PREFIXES = re.compile(
    r"(?:(?:_orig_mod|module|base_model\.model|model\.diffusion_model|diffusion_model|transformer|model)\."
    r"|(?:lora_unet|lora_transformer|lycoris)_)*"
)
_TEXT_ENCODER = re.compile(
    r"(lora_)?(prior_)?(te|text_encoders?|text_model|clip(_[lg])?|t5(xxl)?|cond_stage_model|conditioner)(_?\d+)?[._]"
    r"|encoder\.(block|layers)\."
)
_EMBEDDING = re.compile(r"(bundle_emb|emb_params|string_to_param)([._]|$)")
_KINDS = {
    "DoRA": r"magnitude_vector|dora_scale",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_",
    "OFT or BOFT": r"\.b?oft_",
    "(IA)³": r"\.ia3_",
    "VeRA": r"\.vera_",
    "LoCon with a core (Tucker)": r"\.lora_mid\.",
    "LoRA with biases (lora_bias=True)": r"\.lora_B(\.[^.]+)?\.bias$",
}
OF_TEXT_ENCODER = "of a text encoder, which nothing here uses"
_OF_EMBEDDING = "of a learned word (textual inversion), which nothing here uses"
_WHOLE = "of whole weights or differences of them, which cannot act on some tokens only"
_AGAIN = "of layers that the file holds under other names as well"
CONTROL = (
    "is a FLUX Control LoRA: it reads its condition as further channels of the latents. Use diffusers' "
    "FluxControlPipeline with load_lora_weights(); OmniControl takes LoRAs that read a condition as tokens"
)


_BESIDE = re.compile(r"(^|\.)control(net)?_(\w*blocks|layers|\w*refiner|\w*embedder|img_in)[._]")
"""Keys of networks beside the transformer: ControlNets of diffusers and VideoX-Fun's."""


def sort_names(
    keys: Iterable[str], family: LoraNames | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Names:
    """Understand a file by its keys.

    Args:
        family: names of the model's family, which count before those of the others; `None`: told by the names.
        shapes: of the tensors, by key, which tell families apart that share names.

    Raises:
        LoraKindError: an adapter of another kind, several adapters, a FLUX Control LoRA, or a network beside the
            transformer.
    """
    keys = sorted(keys)
    if any(key.endswith("norm.query_norm.scale") for key in keys):
        raise LoraKindError(CONTROL)
    if beside := next((key for key in keys if _BESIDE.search(key)), None):
        raise LoraKindError(
            f"is a ControlNet, a network beside the transformer, by its key {beside!r}. OmniControl takes LoRAs that "
            "read a condition as tokens; load it by a ControlNet pipeline of diffusers for this model"
        )
    aside: dict[str, str] = {}
    unused: list[str] = []
    read: list[tuple[str, str, str, re.Match[str]]] = []
    for key in keys:
        prefix = PREFIXES.match(key)[0]  # type: ignore[index]
        name = key[len(prefix) :]
        if _TEXT_ENCODER.match(name):
            aside[key] = OF_TEXT_ENCODER
        elif _EMBEDDING.match(name):
            aside[key] = _OF_EMBEDDING
        elif kind := next((kind for kind, pattern in _KINDS.items() if re.search(pattern, key)), None):
            raise LoraKindError(
                f"is a {kind}, by its key {key!r}; expected a plain LoRA (lora_A and lora_B, or lora_down and "
                "lora_up). DoRA, LoKr, LoHa and the like change whole weights and cannot act on one condition's "
                "tokens"
            )
        elif match := _KEY.fullmatch(name):
            read.append((key, prefix, match["module"], match))
        elif re.search(r"\.(weight|bias|scale|diff|diff_b|w_norm|b_norm)$", key):
            aside[key] = _WHOLE
        else:
            unused.append(key)
    adapters = sorted({match["adapter"] or "" for *_, match in read if match["peft"]})
    if len(adapters) > 1:
        raise LoraKindError(
            f"holds the adapters {', '.join(map(repr, adapters))} in one file; expected one. Save them apart "
            "(PEFT: save_pretrained(folder, selected_adapters=[name]))"
        )
    found = families_of({match["module"] for *_, match in read}, _ratios(read, shapes or {}))
    first = family if family is not None else next(iter(found), None)
    return _by_module(read, unused, aside, _tables(_known(first)))._replace(families=found)


def _ratios(
    read: Iterable[tuple[str, str, str, re.Match[str]]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """Rows per column of each module, by the shapes of its parts."""
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    for key, _, module, match in read:
        part = _PARTS[match["peft"] or match["kohya"] or match["xlabs"] or match["alpha"]]
        shape = shapes.get(key, ())
        if part == "up" and shape:
            rows[module] = shape[0]
        elif part == "down" and len(shape) > 1:
            columns[module] = shape[1]
    return {module: count / columns[module] for module, count in rows.items() if columns.get(module)}


def _by_module(
    read: list[tuple[str, str, str, re.Match[str]]], unused: list[str], aside: dict[str, str], tables: _Tables
) -> Names:
    """Put the parts of each module together."""
    repositories = {prefix for _, prefix, module, _ in read if tables.own_block.match(module)}
    others = {prefix for _, prefix, module, _ in read if tables.block.match(module)}
    plain: dict[str, dict[str, str]] = {}
    own: dict[str, dict[str, str]] = {}
    sources: dict[str, str] = {}
    for key, prefix, module, match in read:
        # `img_in` is a name of FLUX's repository only where the file's blocks say so, or its prefix does.
        native = prefix in repositories or (prefix not in others and prefix.endswith(_OWN_PREFIXES))
        name = _dotted(module, native, tables) if prefix.endswith("_") else module
        if name is None:
            unused.append(key)
            continue
        table = own if _own_parts(name, tables) and (native or name not in tables.root) else plain
        taken = table.setdefault(name, {})
        part = _PARTS[match["peft"] or match["kohya"] or match["xlabs"] or match["alpha"]]
        if part in taken or sources.setdefault(name, prefix) != prefix:
            aside[key] = _AGAIN
        else:
            taken[part] = key
    for name in list(own):  # published files hold the same LoRA by two trainers' names
        if any(part in plain for part in _own_parts(name, tables)):
            aside |= dict.fromkeys(own.pop(name).values(), _AGAIN)
    parts = plain | own
    for name in [name for name, keys in parts.items() if not {"down", "up"} <= keys.keys()]:
        unused += parts.pop(name).values()
    return Names(
        parts,
        frozenset(parts.keys() & own.keys()),
        _dialect(parts, own),
        tuple(sorted([*unused, *aside])),
        aside,
        tables,
    )


def _dialect(parts: Mapping[str, Mapping[str, str]], own: Mapping[str, Any]) -> str:
    """The dialect of most modules."""

    def of(name: str) -> str:
        key = parts[name]["down"]
        if key.startswith("lora_transformer_"):
            return "onetrainer"
        if key.startswith(("lora_unet_", "lycoris_")):
            return "kohya"
        if ".processor." in key:
            return "xlabs"
        return "comfyui" if name in own or "diffusion_model." in key else "peft"

    counts = Counter(of(name) for name in parts)
    return counts.most_common(1)[0][0] if counts else "peft"


def _own_parts(name: str, tables: _Tables) -> tuple[str, ...]:
    """diffusers' names of the parts of a layer under its own name; none for any other name."""
    match = tables.own_block.fullmatch(name)
    if match is None:
        return tables.root.get(name, ())
    blocks, table = tables.blocks[_listed(match, tables)]
    parts = tuple(f"{blocks}.{match[2]}.{part}" for part in table.get(match[3], ()))
    return () if parts == (name,) else parts


def _listed(match: re.Match[str], tables: _Tables) -> str:
    """The list of blocks that a name begins with."""
    return tables.lists[match[1].replace(".", "_")]


def _dotted(name: str, native: bool, tables: _Tables) -> str | None:
    """A module's name with dots; `None` for a name that no family has."""
    match = tables.own_block.fullmatch(name)
    if match is not None:
        listed = _listed(match, tables)
        inner = next((own for own in tables.blocks[listed][1] if own.replace(".", "_") == match[3]), None)
        if inner is not None:
            return f"{listed}.{match[2]}.{inner}"
    if found := tables.block.fullmatch(name):
        inner = tables.layers.get(found[3])
        return inner and f"{_listed(found, tables)}.{found[2]}.{inner}"
    if match is not None:
        return None
    return tables.roots.get(name) if native or name not in tables.root else name


# Reading tensors


def to_diffusers(tensors: Mapping[str, torch.Tensor], scale: Scale | None = None) -> Renamed:
    """Read any of the dialects.

    Args:
        tensors: as in the file.
        scale: factor of each module, as a PEFT configuration has it; `alpha` keys of the file take its place.

    Raises:
        LoraShapeError: a pair whose shapes do not fit each other, or the layer that its name says.
        LoraKindError: see `sort_names`.
    """
    names = sort_names(tensors, shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return Renamed(read_pairs(names, tensors, scale), names.dialect, names.unused, names.aside)


def read_pairs(names: Names, tensors: Mapping[str, torch.Tensor], scale: Scale | None = None) -> dict[str, LoraPair]:
    """The LoRAs under diffusers' names; see `to_diffusers`."""
    pairs: dict[str, LoraPair] = {}
    for name, keys in names.parts.items():
        parts = {part: tensors[key] for part, key in keys.items()}
        down, up = _checked(name, parts)
        if "alpha" in parts:
            factor = float(parts["alpha"]) / down.shape[0]
        else:
            factor = 1.0 if scale is None else scale(name, down.shape[0])
        pair = LoraPair(down, up if factor == 1.0 else up * factor)
        pairs |= _split(name, pair, names.tables) if name in names.own else {name: pair}
    return pairs


DIALECTS = ("peft", "comfyui", "kohya")
"""Names that a file can be written by."""


def from_diffusers(
    pairs: Mapping[str, LoraPair], dialect: str, family: LoraNames | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of a file, by the names of `dialect`; the inverse of `to_diffusers`.

    Args:
        family: whose layers these are; `None`: told by their names.

    Raises:
        ValueError: a layer that the family's repository has no name for.
    """
    check_name("dialect", dialect, DIALECTS)
    if dialect == "peft":
        return _named("transformer.", pairs)
    found = families_of(pairs) if family is None else (family,)
    order = [names for names in dict.fromkeys((*found, *_known())) if names.written]
    left = dict(pairs)
    fused: dict[str, LoraPair] = {}
    for name in pairs:
        if name not in left:
            continue
        native, parts, names = _native(name, order, dialect)
        fused[native] = _fuse([left.pop(part, None) for part in parts], parts, names)
    return _named("diffusion_model.", fused) if dialect == "comfyui" else _kohya(fused)


def _kohya(pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = pair.down.contiguous()
        tensors[f"{stem}.lora_up.weight"] = pair.up.contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(float(pair.down.shape[0]))
    return tensors


def _checked(module: str, parts: Mapping[str, torch.Tensor]) -> LoraPair:
    """A pair that fits, in a type that can be computed with."""
    down, up = parts["down"], parts["up"]
    if not (down.is_floating_point() and up.is_floating_point()):
        raise LoraShapeError(f"{module} has {down.dtype} and {up.dtype}; expected floating-point numbers")
    fits = (
        down.ndim >= 2 and up.ndim == down.ndim and up.shape[1] == down.shape[0] and max(up.shape[2:], default=1) == 1
    )
    if not (fits and down.numel() and up.numel()):
        raise LoraShapeError(
            f"{module} is {tuple(down.shape)} and {tuple(up.shape)}; expected (rank, in, …) and (out, rank, …)"
        )
    alpha = parts.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or not abs(float(alpha)) < 1e9):
        raise LoraShapeError(
            f"the alpha of {module} is {alpha.dtype} of shape {tuple(alpha.shape)}; expected one number"
        )
    if down.ndim > 2 and max(*down.shape[2:], *up.shape[2:]) == 1:  # a linear layer written as a 1x1 convolution
        down, up = down.flatten(1), up.flatten(1)
    small = torch.bfloat16  # which holds every 8-bit float, and has the operations that those lack
    return LoraPair(*(t.to(small) if t.itemsize == 1 else t for t in (down, up)))


def _named(prefix: str, pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = pair.up.contiguous()
    return tensors


def _split(module: str, pair: LoraPair, tables: _Tables) -> dict[str, LoraPair]:
    """The parts of a LoRA under its own name."""
    parts, width = _own_parts(module, tables), pair.down.shape[1]
    if len(parts) == 1:
        swapped = _is_swapped(parts[0], pair, tables)
        return {parts[0]: LoraPair(pair.down, _scale_first(pair.up) if swapped else pair.up)}
    rest = pair.up.shape[0] - 3 * width
    if pair.up.ndim != 2 or rest < 0 or (rest > 0) != (len(parts) > 3):
        short = ", ".join(part.rpartition(".")[2] for part in parts)
        raise LoraShapeError(f"{module} is {tuple(pair.up.shape)}, whose rows are no {short} of width {width}")
    rows = [width] * 3 + [rest] * (len(parts) - 3)
    split = {}
    for part, up in zip(parts, pair.up.split(rows)):
        used = up.any(dim=0)  # a LoRA of another part has nothing here
        if used.any():
            split[part] = LoraPair(pair.down[used], up[:, used])
    return split or {part: LoraPair(pair.down, up) for part, up in zip(parts, pair.up.split(rows))}


def _is_swapped(name: str, pair: LoraPair, tables: _Tables | LoraNames) -> bool:
    """Whether a layer gives scale and shift, which diffusers keeps in the other order: the last norm of the image, and
    of SD3's last block that of the text, which gives nothing else."""
    alone = name.endswith(tables.scale_first_alone) and pair.up.shape[0] == 2 * pair.down.shape[1]
    return name in tables.scale_first or alone


def _scale_first(up: torch.Tensor) -> torch.Tensor:
    return torch.cat(up.chunk(2)[::-1])


def _native(name: str, order: Iterable[LoraNames], dialect: str) -> tuple[str, tuple[str, ...], LoraNames]:
    """The repository's name of the layer that holds a module, diffusers' names of the layer's parts, and the family's
    names."""
    order = list(order)
    for names in order:
        for own, (blocks, layers) in names.blocks.items():
            match = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name)
            for native, parts in layers.items():
                if match and match[2] in parts:
                    whole = tuple(f"{blocks}.{match[1]}.{part}" for part in parts)
                    return f"{own}.{match[1]}.{native}", whole, names
        for native, parts in names.root.items():
            if name in parts:
                return native, parts, names
        if re.sub(r"^(transformer_blocks|layers)\.\d+\.", "", name) in names.layers:
            return name, (name,), names
    others = ", ".join(names.label for names in order if names.label != "FLUX.1")
    raise ValueError(
        f"{name!r} has no name in FLUX's own repository, nor in those of {others}; only LoRAs for these can be "
        f"written as {dialect!r}"
    )


def _fuse(pairs: list[LoraPair | None], parts: tuple[str, ...], names: LoraNames) -> LoraPair:
    present = [pair for pair in pairs if pair is not None]
    if len(parts) == 1:
        (down, up) = present[0]
        return LoraPair(down, _scale_first(up) if _is_swapped(parts[0], present[0], names) else up)
    down = torch.cat([pair.down for pair in present])  # (sum of ranks, in)
    width, blocks, rank = down.shape[1], [], 0
    for pair, name in zip(pairs, parts):
        rows = width * names.missing_rows.get(name.rpartition(".")[2], 1)
        up = down.new_zeros(rows if pair is None else pair.up.shape[0], down.shape[0])
        if pair is not None:
            up[:, rank : rank + pair.up.shape[1]] = pair.up
            rank += pair.up.shape[1]
        blocks.append(up)
    return LoraPair(down, torch.cat(blocks))
