"""`MagViTv2` against recorded runs, and what its loader refuses."""

import json
import shutil

import pytest
import torch
from mmada_cases import CASES, FIXTURES, META, SIZES, image_tokenizer, named, recorded
from safetensors.torch import load_file, save_file

from imgdit.models.magvitv2 import MagViTv2, load_magvitv2

TOLERANCES = META["tolerances"]["magvit"]


def close(mine, theirs, tolerance):
    assert (mine - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def procedural(model):
    """Fill a model with the numbers of the fixtures' README."""
    names = sorted(name for name in model.state_dict() if not name.startswith("quantize."))
    for n, name in enumerate(names):
        tensor = model.state_dict()[name]
        x = (torch.arange(tensor.numel()) * 2654435761 + n * 40503 + 12345) % 2**32
        x = (x ^ (x >> 15)) * 2246822519 % 2**32
        u = (x ^ (x >> 13)).double() / 2**31 - 1
        if tensor.ndim == 1:
            values = 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
        else:
            values = u * (3 / tensor[0].numel()) ** 0.5
        tensor.copy_(values.view(tensor.shape))
    return names


def model_of(case):
    options = CASES[case]["options"]
    if options.get("weights") != "procedural":
        return image_tokenizer()
    channels = {f"{part}_channels": options[part]["ch"] for part in ("encoder", "decoder")}
    model = MagViTv2(**channels).eval()
    with torch.no_grad():
        names = procedural(model)
    assert len(names) == options["state_dict_shapes_count"]
    for name, first in options["procedural_check"].items():
        torch.testing.assert_close(model.state_dict()[name].flatten()[:3], torch.tensor(first))
    return model


@pytest.mark.parametrize("name", named("magvit"))
@torch.no_grad()
def test_codes_and_images_are_the_recorded_ones(name):
    model, (given, found) = model_of(name), recorded(name)
    rows, columns = CASES[name]["options"]["shape"]
    encoded = model.encode(given["pixel_values"])
    assert torch.equal(encoded.codes, found["codes"].view(-1, rows, columns))
    close(encoded.latents, found["z"], TOLERANCES["z"])
    close(model.decode(encoded.codes), found["decoded"], TOLERANCES["decoded"])
    if "z_q" in found:
        assert torch.equal(encoded.quantized, found["z_q"])
        assert torch.equal(model.quantize.signs(encoded.codes), found["codes_bits"])
        close(model.decode_latents(found["z_q"]), found["decoded_from_z_q"], TOLERANCES["decoded"])
        losses = model.quantize.losses(encoded.latents)
        close(losses.commitment, found["quantizer_loss"], TOLERANCES["losses"])
        close(losses.entropy, found["entropy_loss"], TOLERANCES["losses"])


def test_the_published_names_and_shapes_are_ours():
    with torch.device("meta"):
        model = MagViTv2()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == META["magvit_published_state_dict"]
    assert sum(p.numel() for p in model.parameters()) == META["magvit_published_parameters"]
    assert model.factor == 16 and model.codebook_size == 8192


def test_zero_is_a_bit_of_zero_and_the_first_channel_counts_most():
    quantize = image_tokenizer().quantize
    latents = torch.zeros(1, 6, 1, 2)
    latents[0, 0, 0, 1] = 1e-9
    assert quantize.codes(latents).tolist() == [[[0, 32]]]
    assert quantize(latents)[0, :, 0, 0].tolist() == [-1] * 6


def test_images_have_gradients_through_the_codes():
    model = load_magvitv2(FIXTURES / "magvitv2", sizes=SIZES)
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    made = model(pixels)
    with torch.no_grad():
        torch.testing.assert_close(made, model.decode(model.encode(pixels).codes))
    made.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = image_tokenizer()
    model.save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 8, 12) * 2 - 1
    expected = model.encode(pixels)
    for loaded in (load_magvitv2(tmp_path), MagViTv2.from_pretrained(tmp_path)):
        assert torch.equal(loaded.encode(pixels).latents, expected.latents)
    half = load_magvitv2(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.decode(expected.codes).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 10, 8)), "multiples of 4 pixels, got 10x8"),
        (lambda m: m.encode(torch.zeros(3, 8, 8)), r"\(batch, 3, height, width\), got \(3, 8, 8\)"),
        (lambda m: m.decode(torch.full((1, 2, 2), 64)), r"0\.\.63, the table of this image tokenizer, got 64 to 64"),
        (lambda m: m.decode(torch.full((1, 2, 2), -1)), "got -1 to -1"),
        (lambda m: m.decode(torch.zeros(1, 4, dtype=torch.long)), r"\(batch, rows, columns\), got .* \(1, 4\)"),
        (lambda m: MagViTv2(encoder_channels=20), "multiples of 32, got"),
        (lambda m: MagViTv2(decoder_blocks=(1, 2)), r"blocks for each level, got .* \(1, 2\)"),
        (lambda m: MagViTv2(decoder_blocks=(1,), decoder_multipliers=(1,)), "as many levels, got 5 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(image_tokenizer())


def test_folders_of_unknown_sizes_or_other_weights_are_refused(tmp_path):
    folder = tmp_path / "magvitv2"
    shutil.copytree(FIXTURES / "magvitv2", folder)
    file = folder / "pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"config\.json says no sizes.*names or shapes differ, first .* Give sizes"):
        load_magvitv2(folder)
    with pytest.raises(ValueError, match=r"pytorch_model\.safetensors: 2 names or shapes .* first decoder\.conv_out"):
        weights = load_file(file)
        del weights["encoder.conv_in.bias"]
        weights["decoder.conv_out.bias"] = torch.zeros(4)
        save_file(weights, file)
        load_magvitv2(folder, sizes=SIZES)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SIZES))
    with pytest.raises(ValueError, match="2 names or shapes"):
        load_magvitv2(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_magvitv2(folder)
