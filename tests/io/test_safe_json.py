"""Files of others: what tests/fuzz found once, held one by one."""

import json
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from training.toy import recipe, toy_train

from imgdit.apps.jobs.plan import Plan
from imgdit.apps.jobs.request import Request
from imgdit.data import open_rows
from imgdit.data.opening import decode_image
from imgdit.data.shards import write_shards
from imgdit.io.safe_json import climbs, inside, parse_json
from imgdit.lora.files import LORA_ADAPTER_METADATA_KEY, read_adapter
from imgdit.sae.model import load_sae
from imgdit.training.recipe import load_recipe
from imgdit.training.trained import load_trained


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "..", "a/.."])
def test_names_that_climb(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path, name)


def test_names_that_stay(tmp_path):
    assert not any(map(climbs, ["a.png", "a/b.png", "..a/b..png", "A: red cube.png", "~/x"]))
    assert inside(tmp_path, "a/b") == tmp_path / "a" / "b"


@pytest.mark.parametrize("text", ["[" * 100_000, "{", b"\xff\xfe", "1" * 6000])
def test_json_of_any_kind(text):
    with pytest.raises(ValueError, match="that file is damaged, expected JSON"):
        parse_json(text, "that file")


def secret(tmp_path):
    """An image beside the folder that is read."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("column", ["file_name", "depth_file_name", "frames_file_names"])
@pytest.mark.parametrize("absolute", [False, True])
def test_metadata_cannot_name_what_is_outside(tmp_path, column, absolute):
    folder = secret(tmp_path)
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    name = str(tmp_path / "secret.png") if absolute else "../secret.png"
    line = {"file_name": "a.png", column: [name] if column.endswith("s") else name}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    rows = open_rows(folder)
    assert not rows.rows and [problem.kind for problem in rows.problems] == ["outside"]


def test_a_shard_cannot_name_what_is_outside(tmp_path):
    data = (secret(tmp_path).parent / "secret.png").read_bytes()
    write_shards(tmp_path / "tars", [("a", {"png": data}), ("../../b", {"png": data}), ("/etc/c", {"png": data})])
    rows = open_rows(tmp_path / "tars")
    assert [row.name for row in rows.rows] == ["a"]
    assert [problem.kind for problem in rows.problems] == ["outside", "outside"]


def test_lines_cannot_name_what_is_outside(tmp_path):
    path = secret(tmp_path) / "lines.jsonl"
    path.write_text(json.dumps({"prompt": "x", "control": {"depth": "../secret.png"}}))
    with pytest.raises(ValueError, match=r"line 1: '../secret.png' leads out of"):
        Plan().read(path, Request())
    path.write_text(json.dumps({"prompt": "x", "num_images": 10**30}))
    with pytest.raises(ValueError, match="num_images must be a whole number from 1 to"):
        Plan().read(path, Request())


def test_a_checkpoint_whose_recipe_is_of_a_huge_model(tmp_path):
    """It would take years, or all memory; and is not what the weights are of."""
    toy_train(recipe(tmp_path, model={"arguments": toy_arguments()}), stop_at=1)
    state = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    values = json.loads(state.read_text())
    for name, size in (("num_layers", 2**31), ("num_attention_heads", 10**6), ("num_attention_heads", 2**61)):
        changed = json.loads(json.dumps(values))
        changed["recipe"]["model"]["arguments"][name] = size
        state.write_text(json.dumps(changed))
        started = time.process_time()
        with pytest.raises(
            ValueError, match=r"num_layers=2147483648|is of another model|of no model that can be made"
        ):
            load_trained(tmp_path)
        assert time.process_time() - started < 5
    state.write_text(json.dumps(values))
    load_trained(tmp_path)


def toy_arguments():
    from tiny import rope_config

    return {**rope_config(num_layers=1, num_single_layers=1), "axes_dims_rope": [4, 6, 6]}


def test_an_sae_whose_configuration_is_huge(tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 10**6, "num_latents": 10**9, "k": 2}))
    save_file({"encoder.weight": torch.zeros(4, 2)}, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=r"encoder.weight must be \(1000000000, 1000000\)"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": "2", "num_latents": 4, "k": 2}))
    with pytest.raises(ValueError, match="d_in must be a whole number, got str"):
        load_sae(tmp_path)


def test_aliases_that_explode_make_a_short_message(tmp_path):
    levels = ", ".join(f"&{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi"))
    (tmp_path / "r.yaml").write_text(f"run: {{folder: x, batch_size: 1, steps: [&a [x, x, x], {levels}]}}")
    with pytest.raises(ValueError, match=r"run.steps must be a whole number") as error:
        load_recipe(tmp_path / "r.yaml")
    assert len(str(error.value)) < 1000
    (tmp_path / "r.yaml").write_text("run: !!timestamp x")
    with pytest.raises(ValueError, match="is not a YAML file"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("pattern", ["(a+)+b", "x*", "(", "[a-z]{9}", 3])
def test_a_lora_cannot_bring_expressions_that_take_for_ever(tmp_path, pattern):
    name = "transformer.transformer_blocks.0." + "a" * 60
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    config = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {pattern: 2}}
    told = {LORA_ADAPTER_METADATA_KEY: json.dumps(config)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=told)
    if pattern == 3:  # JSON makes a text of it, which is a fine name
        assert read_adapter(tmp_path / "a.safetensors").pairs
        return
    with pytest.raises(ValueError, match=r"alpha_pattern has .* expected names of modules"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("down", "up"), [((2,), (4, 2)), ((2, 4), (4, 3)), ((0, 4), (4, 0)), ((2, 4, 1, 1), (4, 2))])
def test_a_lora_of_tensors_that_do_not_fit(tmp_path, down, up):
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(down), f"{name}.lora_B.weight": torch.ones(up)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"a.safetensors is damaged or no plain LoRA: transformer_blocks.0.attn.to_q is"
    ):
        read_adapter(tmp_path / "a.safetensors")


def test_whatever_a_damaged_image_does_to_pillow_is_told():
    gif = b"GIF89a" + b"\x01\0\x01\0\x80\0\0" + bytes(6) + b"\x2c" + bytes(4)
    with pytest.raises(ValueError, match="damaged or no image"):
        decode_image(gif)
