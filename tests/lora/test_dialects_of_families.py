"""LoRA files of every family by every dialect: keys that are read, files that can be written (docs/files.md)."""

import functools
import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_pipeline import Krea2LoraLoaderMixin, QwenImageLoraLoaderMixin, ZImageLoraLoaderMixin
from peft.tuners.lora import LoraLayer
from test_lora_names import dotted, underscored
from tiny_control import flux, sd3
from tiny_ernie_image import ernie_image
from tiny_flux2 import flux2
from tiny_flux_kin import CASES as KIN
from tiny_ideogram4 import ideogram4
from tiny_krea2 import CASES as KREA2
from tiny_qwen_image import transformer as qwen_image
from tiny_qwen_image21 import qwen_image21
from tiny_z_image import CASES as Z_IMAGE

from imgdit.family import find_family
from imgdit.lora.config import OMINICONTROL_TARGETS
from imgdit.lora.dialects import LoraPair, from_diffusers, read_pairs, sort_names
from imgdit.lora.fitting import layers_of
from imgdit.lora.guess import family_of
from imgdit.training.build import add_adapter
from imgdit.training.recipe import AdapterConfig

MODELS = {
    "FLUX.1": lambda: flux(guidance_embeds=True).transformer,
    "SD3": lambda: sd3().transformer,
    "FLUX.2": lambda: flux2().transformer,
    "Qwen-Image": qwen_image,
    "Z-Image": lambda: next(iter(Z_IMAGE.values())).pipeline().transformer,
    "Krea 2": lambda: next(iter(KREA2.values())).pipeline().transformer,
    "Chroma": lambda: KIN["Chroma"].pipeline().transformer,
    "LongCat-Image": lambda: KIN["LongCat-Image"].pipeline().transformer,
    "Qwen-Image 2.1": lambda: qwen_image21().transformer,
    "Ideogram 4": lambda: ideogram4().transformer,
    "ERNIE-Image": lambda: ernie_image().transformer,
}
# Keys of a layer: down, up and alpha or none; whether the names are the repository's; the dialect that writes it.
DIALECTS = {
    "`transformer.` (diffusers)": (dotted("transformer."), False, False, "peft"),
    "no prefix, `.default.` (DiffSynth)": (dotted("", weight=".default.weight"), False, False, None),
    "`base_model.model.` (PEFT)": (dotted("base_model.model."), False, False, None),
    "`lora_transformer_` (OneTrainer)": (underscored("lora_transformer_"), True, False, None),
    "`diffusion_model.`, diffusers' names": (dotted("diffusion_model."), True, False, None),
    "`diffusion_model.` (ComfyUI, ai-toolkit)": (dotted("diffusion_model."), False, True, "comfyui"),
    "`diffusion_model.`, down, up, alpha": (dotted("diffusion_model.", "lora_down", "lora_up"), True, True, None),
    "`lora_unet_` (kohya, musubi)": (underscored("lora_unet_"), True, True, "kohya"),
}


@functools.cache
def model_of(family):
    return MODELS[family]()


def layers_by_name(model, names, own):
    """Layers of a file and diffusers' names of their parts."""
    shapes = layers_of(model)
    if not own:
        return {name: (name,) for name in shapes}
    found = {}
    for listed, (blocks, table) in names.blocks.items():
        for number in range(9):
            for native, parts in table.items():
                whole = tuple(f"{blocks}.{number}.{part}" for part in parts)
                if "processor" not in native and whole[0] in shapes:
                    found[f"{listed}.{number}.{native}"] = whole
    found |= {native: parts for native, parts in names.root.items() if parts[0] in shapes}
    covered = {part for parts in found.values() for part in parts}
    return found | {name: (name,) for name in shapes if name not in covered and names.layers}


def file_of(model, names, dialect):
    """Tensors of a file, and what each module's weights change by."""
    keys, with_alpha, own, _ = DIALECTS[dialect]
    shapes, generator, tensors, right = layers_of(model), torch.Generator().manual_seed(0), {}, {}
    for native, parts in layers_by_name(model, names, own).items():
        out, inner = [len(shapes[part].weight) for part in parts], shapes[parts[0]].weight.shape[1:]
        down = torch.randn(2, *inner, generator=generator)
        up = torch.randn(sum(out), 2, *[1] * (len(inner) - 1), generator=generator)
        down_key, up_key, alpha_key = keys(native)
        tensors |= {down_key: down, up_key: up} | ({alpha_key: torch.tensor(1.0)} if with_alpha else {})
        change = up.flatten(1) @ down.flatten(1) * (0.5 if with_alpha else 1.0)
        for part, piece in zip(parts, change.split(out), strict=True):
            alone = part.endswith(names.scale_first_alone) and piece.shape[0] == 2 * piece.shape[1]
            swapped = native != part and (part in names.scale_first or alone)
            right[part] = torch.cat(piece.chunk(2)[::-1]) if swapped else piece
    return tensors, right


def shapes_of(tensors):
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def changes(pairs):
    return {name: pair.up.flatten(1) @ pair.down.flatten(1) for name, pair in pairs.items()}


def cell(family, dialect):
    """What becomes of a file of every layer of a family."""
    model = model_of(family)
    names = find_family(model).lora
    own, writes = DIALECTS[dialect][2:]
    if own and not names.blocks and not names.layers:
        return "–"
    tensors, right = file_of(model, names, dialect)
    found = sort_names(tensors, names)
    pairs = read_pairs(found, tensors)
    assert pairs.keys() == right.keys(), sorted(pairs.keys() ^ right.keys())[:5]
    for name, change in changes(pairs).items():
        torch.testing.assert_close(change, right[name], msg=name)
    told = sort_names(tensors, shapes=shapes_of(tensors))
    labels = [one.label for one in told.families]
    assert {family, *(names.also if own else ())} & set(labels), labels
    if labels == [family]:
        assert read_pairs(told, tensors).keys() == right.keys()
    written = writes is not None and (writes == "peft" or names.written)
    if written:
        again = from_diffusers(pairs, writes, names)
        read = read_pairs(sort_names(again, names), again)
        for name, change in changes(read).items():
            torch.testing.assert_close(change, right[name], msg=name)
        assert read.keys() == right.keys()
    return f"{len(found.used)} of {len(tensors)}" + (", written" if written else "")


PAGE = Path(__file__).resolve().parents[2] / "docs/files.md"
TABLE = re.compile(r"^\| dialect \| FLUX\.1 .*\n(?:\|.*\n)+", re.M)


def table():
    """Of docs/files.md."""
    lines = ["| dialect | " + " | ".join(MODELS) + " |", "|---" * (1 + len(MODELS)) + "|"]
    for dialect in DIALECTS:
        lines.append(f"| {dialect} | " + " | ".join(cell(family, dialect) for family in MODELS) + " |")
    return "\n".join(lines) + "\n"


def test_every_key_of_every_dialect_is_accounted_for():
    """`python tests/lora/test_dialects_of_families.py` writes the page."""
    (written,) = TABLE.findall(PAGE.read_text())
    assert written == table()


CONVERTERS = {
    ("Qwen-Image", "`lora_unet_` (kohya, musubi)"): QwenImageLoraLoaderMixin,
    ("Qwen-Image", "no prefix, `.default.` (DiffSynth)"): QwenImageLoraLoaderMixin,
    ("Krea 2", "`diffusion_model.` (ComfyUI, ai-toolkit)"): Krea2LoraLoaderMixin,
    ("Z-Image", "`diffusion_model.`, diffusers' names"): ZImageLoraLoaderMixin,
}


@pytest.mark.parametrize(("family", "dialect"), CONVERTERS)
def test_diffusers_converters_agree(family, dialect):
    """Where they lose nothing."""
    model = model_of(family)
    tensors, _ = file_of(model, find_family(model).lora, dialect)
    theirs = CONVERTERS[family, dialect].lora_state_dict(dict(tensors))
    ours = read_pairs(sort_names(tensors), tensors)
    names = {key.removeprefix("transformer.").partition(".lora_")[0] for key in theirs}
    shared = names & ours.keys()
    assert len(shared) >= len(ours) - 1, sorted(names ^ ours.keys())
    for name in shared:
        stem = f"transformer.{name}" if f"transformer.{name}.lora_A.weight" in theirs else name
        down, up = (theirs[f"{stem}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(ours[name].up @ ours[name].down, up @ down, msg=name)


def test_files_with_names_of_two_families_are_told_apart_by_their_shapes():
    for family, dialect in (("FLUX.1", "`lora_unet_` (kohya, musubi)"), ("FLUX.2", "`lora_unet_` (kohya, musubi)")):
        model = model_of(family)
        tensors, _ = file_of(model, find_family(model).lora, dialect)
        for layer, labels in (("linear1", family), ("img_mlp_2", family), ("img_attn_proj", None)):
            part = {key: tensor for key, tensor in tensors.items() if f"_{layer}." in key}
            found = [one.label for one in sort_names(part, shapes=shapes_of(part)).families]
            assert (labels in found and {"FLUX.1", "FLUX.2"} - {labels} not in found) if labels else len(found) > 1
            assert ("FLUX.1" in found) == (labels != "FLUX.2") and ("FLUX.2" in found) == (labels != "FLUX.1")


def test_families_of_the_same_names_are_both_named():
    """LongCat-Image has FLUX.1's names, but for the embedders of pooled text and guidance."""
    for family, labels in (("FLUX.1", ["FLUX.1"]), ("LongCat-Image", ["FLUX.1", "LongCat-Image"])):
        model = model_of(family)
        for dialect in ("`diffusion_model.` (ComfyUI, ai-toolkit)", "`lora_unet_` (kohya, musubi)"):
            tensors, _ = file_of(model, find_family(model).lora, dialect)
            assert [one.label for one in sort_names(tensors, shapes=shapes_of(tensors)).families] == labels


def test_families_are_told_by_their_layers():
    for family in MODELS:
        assert family_of(layers_of(model_of(family))) == family


def test_layers_without_a_name_in_the_repository_cannot_be_written():
    pair = LoraPair(torch.ones(2, 32), torch.ones(32, 2))
    with pytest.raises(ValueError, match="has no name in FLUX's own repository, nor in those of SD3, FLUX"):
        from_diffusers({"some.layer": pair}, "kohya")


@pytest.mark.parametrize("family", MODELS)
def test_adapters_have_layers_of_their_family_by_default(family):
    """None of the text's, and those that a recipe names where it names some."""
    model = MODELS[family]()
    names = find_family(model).lora
    wanted = names.targets or OMINICONTROL_TARGETS
    assert all(any(re.fullmatch(target, name) for name in layers_of(model)) for target in names.targets)
    add_adapter(model, AdapterConfig(rank=1), seed=0)
    having = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert having == {name for name in layers_of(model) if re.fullmatch("|".join(wanted), name)}
    assert not any(re.search(r"add_|context|txt|cap_|text", name) for name in having)
    model = MODELS[family]()
    add_adapter(model, AdapterConfig(rank=1, targets=(r".*\.0\.(self_)?att(n|ention)\.to_q",)), seed=0)
    assert all(name.endswith("to_q") for name, module in model.named_modules() if isinstance(module, LoraLayer))


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
