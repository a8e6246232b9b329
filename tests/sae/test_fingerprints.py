"""A denoiser and an autoencoder are known again, however their weights are kept, and others are not."""

import hashlib
import json

import pytest
import torch
from peft import LoraConfig
from tiny import randomize
from tiny_sae import (
    all_features,
    dit,
    flux,
    flux2,
    hunyuan,
    ours,
    pixart,
    run,
    sana,
    sd3,
    tiny_sae,
    unet,
    unlearner_of,
)

from imgdit import DiffusionPipeline
from imgdit.checkpoints import SCENES
from imgdit.models.quantized import quantize_rows
from imgdit.sae.concepts import ConceptBook
from imgdit.sae.fingerprints import is_fingerprint_of, model_fingerprint, same_model
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner

HOOKPOINT = "transformer.transformer_blocks.1"


def add_lora(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))


KEPT = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float8 storage": lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "int8 rows": quantize_rows,
    "fused projections": lambda model: model.fuse_qkv_projections(),
    "fused and int8": lambda model: (model.fuse_qkv_projections(), quantize_rows(model)),
    "adapter": add_lora,
    "adapter on int8": lambda model: (quantize_rows(model), add_lora(model)),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("make", [ours, flux, sd3])
def test_the_same_model(make, kept):
    pipe, inputs = make()
    unlearner = unlearner_of(pipe, HOOKPOINT, [all_features()])
    KEPT[kept](pipe.transformer)
    plain = run(pipe, inputs, steps=1) if make is ours else None
    with unlearner.attach(pipe, ["everything"]):
        assert plain is None or not torch.equal(run(pipe, inputs, steps=1), plain)
    # Selected in this form, and known in the plain one.
    other, _ = make()
    book = ConceptBook.empty(unlearner.saes[HOOKPOINT].fingerprint(), pipe.transformer)
    assert book.is_of(other.transformer)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("make", [ours, flux, sd3])
def test_another_model(make, kept):
    pipe, _ = make()
    unlearner = unlearner_of(pipe, HOOKPOINT, [all_features()])
    randomize(pipe.transformer, seed=9, std=0.5)
    KEPT[kept](pipe.transformer)
    with pytest.raises(ValueError, match="selected in another model"), unlearner.attach(pipe, ["everything"]):
        raise AssertionError("not reached")


@pytest.mark.parametrize("make", [ours, flux, flux2, sd3, pixart, dit, sana, hunyuan, unet])
def test_every_architecture_can_be_described(make):
    """A fingerprint of the configuration's names and of the weights as they stand are one for a plain model."""
    pipe, _ = make()
    model = getattr(pipe, "transformer", None) or pipe.unet
    found = model_fingerprint(model)
    assert found == earlier_fingerprint(model) and None not in found["sketch"]


def earlier_fingerprint(model):
    """As versions before wrote it."""
    parameters = {
        name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name and p.ndim
    }
    names = sorted(parameters)
    picked = [names[i * len(names) // 64] for i in range(64)]
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters.values()),
        "sketch": [
            float(parameters[name].detach().flatten()[(i * 7919) % parameters[name].numel()])
            for i, name in enumerate(picked)
        ],
    }


@pytest.mark.parametrize("then", KEPT)
@pytest.mark.parametrize("now", KEPT)
def test_earlier_fingerprints(then, now):
    """Files of earlier versions hold the weights as they stood: of a plain model, they are known in every form; of a
    model in another form, in that form."""
    plain, _ = ours()
    before = earlier_fingerprint(plain.transformer)
    KEPT[now](plain.transformer)
    assert is_fingerprint_of(before, plain.transformer)
    if then == now:
        assert is_fingerprint_of(earlier_fingerprint(plain.transformer), plain.transformer)


@pytest.mark.parametrize("kept", ["int8 rows", "fused projections"])
def test_the_embedded_concepts(kept):
    pipe = DiffusionPipeline.from_pretrained(SCENES)
    unlearner = ConceptUnlearner.from_pretrained(SCENES / "sae")
    KEPT[kept](pipe.transformer)
    with unlearner.attach(pipe, unlearner.concepts[:1]):
        pass


def test_what_cannot_be_read_is_not_compared():
    pipe, _ = ours()
    whole = model_fingerprint(pipe.transformer)
    partly = {**whole, "sketch": [None, *whole["sketch"][1:]]}
    assert same_model(whole, json.loads(json.dumps(partly)))
    other = {**partly, "sketch": [None, whole["sketch"][1] + 1, *whole["sketch"][2:]]}
    assert not same_model(whole, other)


# Autoencoders


def test_fingerprint_of_an_autoencoder():
    sae, other = tiny_sae(), SparseAutoencoder(tiny_sae().config)
    known = sae.fingerprint()
    assert sae.has_fingerprint(known) and not other.has_fingerprint(known)
    assert tiny_sae().bfloat16().has_fingerprint(known)
    every = hashlib.sha256()  # as versions before
    for name, tensor in sorted(sae.state_dict().items()):
        every.update(name.encode() + tensor.numpy().tobytes())
    assert sae.has_fingerprint(every.hexdigest()) and not other.has_fingerprint(every.hexdigest())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_in_half_precision(dtype, tmp_path):
    pipe, inputs = ours()
    unlearner = unlearner_of(pipe, HOOKPOINT, [all_features()])
    unlearner.saes[HOOKPOINT].to(dtype)
    plain = run(pipe, inputs)
    with unlearner.attach(pipe, ["everything"]):
        assert not torch.equal(run(pipe, inputs), plain)
    unlearner.save_pretrained(tmp_path)
    again = ConceptUnlearner.from_pretrained(tmp_path)
    with again.attach(pipe, ["everything"]):
        assert not torch.equal(run(pipe, inputs), plain)
    unlearner.saes[HOOKPOINT].save_pretrained(tmp_path / "alone")
    for loaded in (again.saes[HOOKPOINT], SparseAutoencoder.from_pretrained(tmp_path / "alone")):
        assert torch.equal(loaded.W_dec, unlearner.saes[HOOKPOINT].W_dec.float())
