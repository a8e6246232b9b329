"""A folder of adapters as people have it: what lies there besides stops nothing, and names of files may hold dots."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_pipeline
from tiny_control import one_layer, strangers
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.apps.commands import lora
from imgdit.apps.jobs.request import Control, Request
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.lora.files import adapter_pairs, read_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_strangers_among_adapters_stop_nothing(model, tmp_path):
    session = Session(Shelf(model, adapters=strangers(tmp_path / "adapters")))
    one_layer(tmp_path / "adapters/edges-v1_1.safetensors", seed=3)  # the same name in torch
    assert (
        set(session.shelf.adapters) == {"edges-v1.1", "edges-v1_1", "style"}
        and session.shelf.adapter_for("canny") == "edges-v1.1"
    )
    for kind in ("edges-v1.1", "edges-v1_1", "canny"):
        control = Control(kind, Image.effect_noise((16, 16), 80).convert("RGB"))
        request = Request("a red cube", steps=1, height=16, width=16, controls=(control,))
        session.generate(request)
    for adapter, file in (("edges-v1_1", "edges-v1.1"), ("edges-v1_1_2", "edges-v1_1")):
        (pair,) = adapter_pairs(session.pipe.transformer, adapter).values()
        (expected,) = read_adapter(session.shelf.adapters[file]).pairs.values()
        assert torch.equal(pair.up, expected.up)


def test_a_control_by_a_file_name_with_dots(model, tmp_path):
    Image.effect_noise((16, 16), 80).convert("RGB").save(tmp_path / "given.png")
    folder, out = strangers(tmp_path / "adapters"), tmp_path / "out.png"
    options = ["--control", f"edges-v1.1={tmp_path / 'given.png'}", "--steps", "1", "--size", "16", "--out", str(out)]
    done = CliRunner().invoke(app, ["generate", "a cube", "--model", str(model), "--adapters", str(folder), *options])
    assert done.exit_code == 0, done.output
    assert out.is_file()


def test_commands_say_the_dialect_and_what_became_of_the_keys(tmp_path):
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    tensors |= {f"lora_te1_layers_{n}_fc1.lora_down.weight": torch.ones(2, 4) for n in range(30)}
    tensors |= {f"lora_unet_nowhere_{n}.lora_down.weight": torch.ones(2, 4) for n in range(12)}
    file = tmp_path / "style-v2.0.safetensors"
    save_file(tensors, file)
    for command in (["inspect", file], ["convert", file, "--to", "peft"]):
        done = CliRunner().invoke(lora.app, [str(part) for part in command])
        assert done.exit_code == 0, done.output
        for part in ("kohya names", "3 read, 30 set aside, 12 not understood", "30 keys of a text encoder", "2 more"):
            assert part in done.output
        assert done.output.count("lora_te1") == 0
    assert Path(tmp_path / "style-v2.0.peft.safetensors").is_file()
