"""Hashes of weights that stand in files of earlier versions."""

import torch

from imgdit.io.fingerprints import sampled_hash, weights_hash


def model():
    found = torch.nn.Linear(3, 2)
    found.weight.data = torch.arange(6.0).reshape(2, 3) / 7
    found.bias.data = torch.tensor([0.1, -0.2])
    return found


def test_hashes_are_those_of_version_0_1():
    assert weights_hash(model(), dtype=torch.float16) == "9e4d155bf70fb7a7"  # of autoencoders, beside cached latents
    assert weights_hash(model(), model()) == "d78fa0d83c4a4a9a"  # of a pipeline, in names of benchmarks' images
    assert weights_hash(model(), dtype=torch.float32, length=64).startswith("2ff5ffe97cb8dc5c")  # of an autoencoder


def test_rounded_weights_have_the_same_hash():
    assert weights_hash(model().half(), dtype=torch.float16) == weights_hash(model(), dtype=torch.float16)
    assert sampled_hash(model().bfloat16()) == sampled_hash(model())


def test_other_weights_have_another_hash():
    other = model()
    other.bias.data[0] += 1
    assert weights_hash(other) != weights_hash(model())
    assert sampled_hash(other) != sampled_hash(model())
