"""Unlearning in pipelines whose weights lie elsewhere, or that `torch.compile` compiled: the same images, and the
autoencoder stays whole."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from tiny_sae import all_features, flux, ours, run, sd3, tiny_sae, unet, unlearner_of

from imgdit.sae.features import heat_maps, survey_features
from imgdit.sae.hooks import hooked
from imgdit.sae.model import DeviceCopies
from imgdit.sae.unlearning import ConceptUnlearner

CPU = torch.device("cpu")
MAKERS = {"ours": ours, "flux": flux, "sd3": sd3, "unet": unet}
PLACES = {"unet": "unet.up_blocks.0.attentions.0"}
SEQUENTIAL = "sequential"


def denoiser(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


def sequential(pipe, folder):
    """As `enable_sequential_cpu_offload`: layers on the meta device between their calls."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, execution_device=CPU)


def whole(pipe, folder):
    """As `enable_model_cpu_offload`, which takes its hook off after every call of the pipeline."""
    add_hook_to_module(denoiser(pipe), CpuOffload(CPU))


def group(kind, on_disk=False, **options):
    def apply(pipe, folder):
        if on_disk:
            options["offload_to_disk_path"] = str(folder)
        apply_group_offloading(denoiser(pipe), CPU, CPU, offload_type=kind, **options)

    return apply


OFFLOADS = {
    SEQUENTIAL: sequential,
    "model": whole,
    "group, leaves": group("leaf_level"),
    "group, blocks": group("block_level", num_blocks_per_group=1),
    "group, disk": group("leaf_level", on_disk=True),
}


@pytest.mark.parametrize(
    ("name", "kind", "first"),
    [(name, kind, "offload") for name in MAKERS for kind in OFFLOADS]
    + [("ours", kind, "unlearner") for kind in OFFLOADS],
)
def test_offloaded(name, kind, first, tmp_path):
    hookpoint = PLACES.get(name, "transformer.transformer_blocks.1")
    pipe, inputs = MAKERS[name]()
    unlearner = unlearner_of(pipe, hookpoint, [all_features()])
    plain = run(pipe, inputs, steps=2)
    with unlearner.attach(pipe, ["everything"]):
        expected = run(pipe, inputs, steps=2)
    assert not torch.equal(expected, plain)

    other, _ = MAKERS[name]()
    sae = unlearner.saes[hookpoint]
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    if first == "offload":
        OFFLOADS[kind](other, tmp_path)
    with unlearner.attach(other, ["everything"]):
        if first == "unlearner":
            OFFLOADS[kind](other, tmp_path)
        assert torch.equal(run(other, inputs, steps=2), expected)
        if kind == "model":
            remove_hook_from_module(denoiser(other), recurse=True)
            whole(other, tmp_path)
        assert torch.equal(run(other, inputs, steps=2), expected)
    assert torch.equal(run(other, inputs, steps=2), plain)
    assert unlearner.saes[hookpoint] is sae
    for key, value in sae.state_dict().items():
        assert value.device == CPU and torch.equal(value, before[key])


@pytest.mark.parametrize("kind", OFFLOADS)
def test_another_model_that_is_offloaded(kind, tmp_path):
    """Weights that lie elsewhere are looked at where they are; what diffusers keeps on a disk tells nothing."""
    hookpoint = "transformer.transformer_blocks.1"
    pipe, _ = ours()
    unlearner = unlearner_of(pipe, hookpoint, [all_features()])
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.5)
    OFFLOADS[kind](pipe, tmp_path)
    if kind == "group, disk":
        with unlearner.attach(pipe, ["everything"]):
            pass
    else:
        with pytest.raises(ValueError, match="selected in another model"), unlearner.attach(pipe, ["everything"]):
            raise AssertionError("not reached")


@pytest.mark.parametrize("kind", [SEQUENTIAL, "model", "group, leaves"])
def test_learning_from_an_offloaded_model(kind, tmp_path):
    """Statistics, features and heat maps, with the autoencoder where it was."""
    hookpoint = "transformer.transformer_blocks.1"
    found = []
    for offloaded in (False, True):
        pipe, inputs = ours()
        if offloaded:
            OFFLOADS[kind](pipe, tmp_path)
        sae = tiny_sae(hookpoint)
        options = {name: inputs[name] for name in ("height", "width", "guidance_scale")}
        options["num_inference_steps"] = 2
        unlearner = ConceptUnlearner({hookpoint: sae})
        unlearner.learn(pipe, {"one": ["a red cube"], "other": ["the blue sphere left"]}, top_n=2, **options)
        survey = survey_features(pipe, sae, inputs["prompt"], **options)
        maps = heat_maps(pipe, sae, inputs["prompt"], [3, 5], **options).maps
        found.append([unlearner.books[hookpoint].selections["one"].means, survey.means, maps])
        assert sae.W_dec.device == CPU
    for plain, offloaded in zip(*found):
        assert torch.equal(plain, offloaded)


def test_a_copy_elsewhere():
    sae = tiny_sae().bfloat16()
    copies = DeviceCopies(sae)
    assert copies.on(CPU) is sae
    there = copies.on(torch.device("meta"))
    assert there is copies.on(torch.device("meta"))
    assert {p.device.type for p in there.parameters()} == {"meta"} and there.W_dec.dtype == torch.bfloat16
    assert {p.device.type for p in sae.parameters()} == {"cpu"} and there.config == sae.config


# Compiled


def compile_all(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compile_in_place(pipe):
    pipe.transformer.compile(backend="eager")


def compile_repeated(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)


def compile_a_block(pipe):
    blocks = pipe.transformer.transformer_blocks
    blocks[1] = torch.compile(blocks[1], backend="eager", fullgraph=True)


@pytest.mark.parametrize("compiled", [compile_all, compile_in_place, compile_repeated, compile_a_block])
def test_compiled(compiled):
    hookpoint = "transformer.transformer_blocks.1"
    pipe, inputs = flux()
    unlearner = unlearner_of(pipe, hookpoint, [all_features()])
    with unlearner.attach(pipe, ["everything"]):
        expected = run(pipe, inputs, steps=2)
    compiled(pipe)
    torch.compiler.reset()
    plain = run(pipe, inputs, steps=2)
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    assert frames
    with unlearner.attach(pipe, ["everything"]):
        torch.testing.assert_close(run(pipe, inputs, steps=2), expected)
    seen = []
    with hooked(pipe, {hookpoint: lambda tokens: seen.append(tokens.call.timestep)}):
        assert torch.equal(run(pipe, inputs, steps=2), plain)
    assert len(seen) == 2
    # What was compiled before is used again.
    assert torch.equal(run(pipe, inputs, steps=2), plain)
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames
