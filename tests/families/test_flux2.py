"""FLUX.2 dev and klein beside conditions: normalisation, what is refused, LoRA names."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from diffusers.loaders import Flux2LoraLoaderMixin
from diffusers.models.transformers import transformer_flux2
from safetensors.torch import save_file
from tiny_control import image, lora_file
from tiny_families import differs, loaded, make, near, used
from tiny_flux2 import CASES, flux2
from torch.nn import Linear

from imgdit import Condition, OmniControl
from imgdit.adapters.references import References
from imgdit.families import step
from imgdit.families.flux2 import FAMILY
from imgdit.family import MeasuredPlaces
from imgdit.frames import Frame
from imgdit.lora.dialects import family_of, read_pairs, sort_names
from imgdit.lora.files import adapter_pairs


@pytest.mark.parametrize("kind", CASES)
def test_conditions_have_the_pipelines_normalisation(kind):
    pipe = CASES[kind].pipeline()
    pixels = image()[None] * 2 - 1
    expected = pipe._pack_latents(pipe._encode_vae_image(pixels, None))
    near(FAMILY.tokens.encode(pipe.transformer, pipe.vae, pixels, None), expected, 1e-6)


def test_the_pipeline_that_keeps_keys_is_refused():
    pipe = flux2(Flux2KleinPipeline)
    with pytest.raises(ValueError, match="keeps the keys and values of its reference images itself"):
        OmniControl(Flux2KleinKVPipeline(**pipe.components))
    control = OmniControl(pipe)  # on the same transformer, whose processors the other pipeline changed
    with pytest.raises(ValueError, match="KVAttnProcessor: Flux2KleinKVPipeline keeps"), control.use([]):
        pass


def test_adapters_that_are_trained_without_references_act_alike_beside_them(tmp_path):
    """In independent mode: keys and values of their conditions are the same."""
    case = CASES["FLUX.2 dev"]
    control, kept = loaded(case, case.pipeline(), tmp_path), []
    for call in ({}, case.references()):
        with control.use(Condition(image(), "canny"), mode="independent"):
            make(case, control.pipe, steps=1, **call)
            (entry,) = control.run._kept.caches
            kept.append([layer._stored["attn"] for layer in entry.cache._layers.values()])
    for alone, beside in zip(*kept, strict=True):
        near(beside[0], alone[0])
        near(beside[1], alone[1])


def test_positions_that_the_pipeline_makes_in_every_step_are_read_once_in_a_call(tmp_path):
    """It joins those of the image and of its reference images anew."""
    case = CASES["FLUX.2 dev"]
    control = loaded(case, case.pipeline(), tmp_path)
    with ExitStack() as stack:
        rotations, grids, references = (
            stack.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
            for module, name in ((step, "rope_table"), (step, "grid_of_ids"), (step, "references_of_ids"))
        )
        for calls in (1, 2):
            with control.use(Condition(image(), "canny"), references=References(0.5)):
                for _ in range(calls):
                    make(case, control.pipe, **case.references())
            done = 1 if calls == 1 else 3
            assert rotations.call_count == references.call_count == done
            assert grids.call_count == 2 * done  # of the image and of its reference


def test_positions_of_each_call_are_its_own():
    """Calls of the transformer itself, whose image has another grid under the same positions of the text."""
    model = flux2().transformer
    measured, text = MeasuredPlaces(), torch.zeros(4, 4)
    for size in ((2, 8), (4, 4)):
        ids = torch.nn.functional.pad(Frame(size).ids(), (0, 1))
        assert measured.of(FAMILY, model, {"txt_ids": text, "img_ids": ids}) == ((slice(0, 16), size),)


class Foreign:
    """An attention processor of somebody else."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("place", "own"),
    [
        ("transformer_blocks.1.attn", "Flux2AttnProcessor"),
        ("single_transformer_blocks.0.attn", "Flux2ParallelSelfAttnProcessor"),
    ],
)
def test_the_refusal_of_a_processor_names_that_of_its_block(place, own):
    pipe = flux2()
    transformer, control = pipe.transformer, OmniControl(pipe)
    attention = transformer.get_submodule(place)
    attention.set_processor(Foreign(attention.processor))
    with pytest.raises(ValueError, match="which conditions would leave out") as refusal, control.use([]):
        pass
    advice = f"transformer.get_submodule({place!r}).set_processor({own}())"
    assert f"Call {advice} first" in str(refusal.value)
    exec(advice, {"transformer": transformer, own: getattr(transformer_flux2, own)})
    with control.use([]):
        assert type(attention.processor).__name__ == own


# LoRA names

OWN = {
    "double_blocks.1.img_attn.qkv": ("to_q", "to_k", "to_v"),
    "double_blocks.1.txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "double_blocks.1.img_attn.proj": ("to_out.0",),
    "double_blocks.1.txt_attn.proj": ("to_add_out",),
    "double_blocks.1.img_mlp.0": ("ff.linear_in",),
    "double_blocks.1.img_mlp.2": ("ff.linear_out",),
    "double_blocks.1.txt_mlp.0": ("ff_context.linear_in",),
    "double_blocks.1.txt_mlp.2": ("ff_context.linear_out",),
    "single_blocks.1.linear1": ("single_transformer_blocks.1.attn.to_qkv_mlp_proj",),
    "single_blocks.1.linear2": ("single_transformer_blocks.1.attn.to_out",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


def own_tensors(model, key):
    """A LoRA of every layer of the repository; `key` gives the names of down, up and alpha."""
    shapes = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, Linear)}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for own, parts in OWN.items():
        prefix = "transformer_blocks.1." if own.startswith("double_blocks") else ""
        prefix += "attn." if "_attn." in own else ""
        out = sum(shapes[prefix + part][0] for part in parts)
        columns = shapes[prefix + parts[0]][1]
        down, up, alpha = key(own)
        tensors[down] = torch.randn(2, columns, generator=generator)
        tensors[up] = torch.randn(out, 2, generator=generator)
        if alpha is not None:
            tensors[alpha] = torch.tensor(1.0)
    return tensors


def comfyui(name):
    return f"diffusion_model.{name}.lora_A.weight", f"diffusion_model.{name}.lora_B.weight", None


def scaled(name):
    stem = f"diffusion_model.{name}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def kohya(name):
    stem = "lora_unet_" + name.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def test_lora_names_are_those_of_diffusers_converter():
    model = flux2().transformer
    tensors = own_tensors(model, comfyui)
    expected = Flux2LoraLoaderMixin.lora_state_dict(dict(tensors))
    names = sort_names(tensors, FAMILY.lora)
    assert not names.unused
    pairs = read_pairs(names, tensors)
    assert {f"transformer.{name}.lora_{side}.weight" for name in pairs for side in "AB"} == set(expected)
    for name, pair in pairs.items():
        change = expected[f"transformer.{name}.lora_B.weight"] @ expected[f"transformer.{name}.lora_A.weight"]
        if name == "norm_out.linear":  # diffusers swaps shift and scale of the base weights alone
            change = torch.cat(change.chunk(2)[::-1])
        torch.testing.assert_close(pair.up @ pair.down, change)


@pytest.mark.parametrize("key", [comfyui, scaled, kohya])
def test_files_by_the_repositorys_names_are_read_whole(key, tmp_path):
    """diffusers' converter takes no alphas, loses `lora_down`, and in kohya's files modulation and last layer."""
    pipe = flux2()
    tensors = own_tensors(pipe.transformer, key)
    expected = {name: pair.up @ pair.down for name, pair in pairs_of_comfyui(pipe.transformer).items()}
    save_file(tensors, tmp_path / "own.safetensors")
    report = OmniControl(pipe).load(tmp_path / "own.safetensors")
    assert not report.unused and report.used == len(tensors) and set(report.matched) == set(expected)
    factor = 1.0 if key is comfyui else 0.5  # alpha 1, rank 2
    for name, pair in adapter_pairs(pipe.transformer, "own").items():
        torch.testing.assert_close(pair.up @ pair.down, expected[name] * factor)


def pairs_of_comfyui(model):
    tensors = own_tensors(model, comfyui)
    return read_pairs(sort_names(tensors, FAMILY.lora), tensors)


@pytest.mark.parametrize("name", ["single_transformer_blocks.0.attn.to_out", "transformer_blocks.0.ff.linear_in"])
def test_single_layers_tell_the_family(name, tmp_path):
    assert family_of([name]) == "FLUX.2"
    pipe = flux2()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "one.safetensors", pipe.transformer, name.replace(".", r"\.")))
    case = CASES["FLUX.2 dev"]
    differs(used(case, control, Condition(image(), "one")), used(case, control, Condition(image(1), "one")), 1e-5)
