"""DiT-μP and PixArt-α-μP: roles, forward passes and training steps recorded from the reference (tests/parity/mup).

diffusers' classes stand in for the reference: the converter's key map leads from one to the other.
"""

import argparse
import json
import math
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from parity.mup_cases import assert_trained_alike
from safetensors.torch import load_file
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.models import published_mup
from imgdit.models.published_mup import convert_dit, convert_pixart, original_timesteps, read_checkpoint
from imgdit.mup import configure, mup_table, param_groups

FIXTURES = Path(__file__).parents[1] / "parity" / "mup"
FORWARD = ["dit_fwd_w48_b24", "dit_fwd_w48_b48_om2"]


def read(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def part(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def dit(case, device="meta"):
    with torch.device(device):
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=case["heads"],
            attention_head_dim=case["width"] // case["heads"],
            in_channels=4,
            out_channels=8,
            num_layers=case["depth"],
            sample_size=case["input_size"],
            num_embeds_ada_norm=case["num_classes"],
        )


def new_names(old, depth, layout, embedders=()):
    """Names in diffusers' model of a parameter of the original."""
    return [name for name, _ in published_mup._renamed({old: torch.zeros(3)}, layout, 1.0, depth, dict(embedders))]


@pytest.mark.parametrize(
    "case", read("dit_params")["cases"] + read("dit_xl2_params")["cases"], ids=lambda c: f"{c['model']} {c['width']}"
)
def test_table_of_dit(case):
    model = dit(case)
    configure(model, base_width=case["base_width"], output_mult=case["output_mult"], adaln_init="normal")
    rules = {rule.name: rule for rule in mup_table(model)}
    sgd = {n: g for g in param_groups(model, 1.0, 1.0, optimizer_kind="sgd", no_decay=()) for n in g["names"]}
    seen = set()
    for row in case["params"]:
        if not row["trainable"]:
            continue
        fold, matrix = row["forward_mult"], row["role"] == "hidden"
        for name in new_names(row["name"], case["depth"], published_mup._DIT, published_mup._DIT_EMBEDDERS):
            rule = rules[name]
            assert ("hidden" if rule.role == "modulation" else rule.role) == row["role"], name
            assert rule.growth == pytest.approx(row["width_mult"] if row["ninf"] else 1.0), name
            assert rule.lr_mult == pytest.approx(row["adam_lr_mult"] * fold, rel=1e-6), name
            assert rule.wd_mult == pytest.approx(row["adam_wd_mult_coupled"] / fold, rel=1e-6), name
            assert rule.eps_mult == pytest.approx(1 / fold, rel=1e-6), name
            assert rule.init_std == pytest.approx(row["init"]["std"], rel=1e-6), name
            assert sgd[name]["lr"] == pytest.approx(row["sgd_lr_mult"] * fold**2, rel=1e-6), name
            assert sgd[name]["weight_decay"] == pytest.approx(row["sgd_wd_mult_coupled"] / fold**2, rel=1e-6), name
            assert math.prod(rule.shape) * (3 if ".qkv." in row["name"] else 1) == math.prod(row["shape"]), name
            assert matrix == (rule.role in ("hidden", "modulation"))
            seen.add(name)
    assert seen == rules.keys()


def test_roles_of_pixart():
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(
            num_layers=1, cross_attention_dim=1152, caption_channels=4096, sample_size=32
        )
    configure(model, base_width=288)
    rules, seen = {rule.name: rule for rule in mup_table(model)}, set()
    for row in read("pixart_roles")["params"]:
        for name in new_names(row["name"], 1, published_mup._PIXART):
            rule, fold = rules[name], row["forward_mult_at_1152"]
            assert ("hidden" if rule.role == "modulation" else rule.role) == row["role"], name
            assert rule.lr_mult == row["adam_lr_mult_at_1152"] * fold, name
            assert rule.wd_mult == row["adam_wd_mult_coupled_at_1152"] / fold, name
            seen.add(name)
    assert seen == rules.keys()


@pytest.mark.parametrize("name", FORWARD)
def test_converted_checkpoint(name, tmp_path):
    """A published kind of file, through the command, loaded by diffusers: the reference's activations and output."""
    case, tensors = read(name), load_file(FIXTURES / f"{name}.safetensors")
    weights = part(tensors, "w.")
    wrong = {key: torch.zeros_like(t) for key, t in weights.items()}
    saved = {"model": wrong, "ema": weights, "opt": {"state": {}}, "args": argparse.Namespace(lr=1.0)}
    torch.save(saved, tmp_path / "dit.pt")
    options = ["--head-dim", case["width"] // case["heads"], "--base-width", case["base_width"]]
    options += ["--output-mult", case["output_mult"]]
    command = ["convert", "dit-mup", str(tmp_path / "dit.pt"), str(tmp_path / "out"), *map(str, options)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    model = original_timesteps(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval())
    expected = part(tensors, "act.")
    modules = {"x_embedder": "pos_embed.proj", "blocks.0.attn": "transformer_blocks.0.attn1"}
    modules |= {"blocks.0": "transformer_blocks.0", "blocks.1": "transformer_blocks.1"}
    modules |= {"blocks.0.mlp": "transformer_blocks.0.ff", "final_layer": "proj_out_2"}
    modules |= {
        "final_layer.adaLN_modulation": "proj_out_1",
        "blocks.0.adaLN_modulation": "transformer_blocks.0.norm1.linear",
    }
    seen = {}

    def embedded(module, arguments, out):
        """The record's: the processor's cosines of large numbers differ more than all that follows."""
        torch.testing.assert_close(out, expected["t_embedder"], atol=2e-4, rtol=0)
        return expected["t_embedder"]

    for block in model.transformer_blocks:
        block.norm1.emb.timestep_embedder.register_forward_hook(embedded)
    for old, new in modules.items():
        model.get_submodule(new).register_forward_hook(lambda _, __, out, old=old: seen.__setitem__(old, out))
    with torch.no_grad():
        x, t, y = (tensors[f"in.{key}"] for key in "xty")
        torch.testing.assert_close(model(x, t, y).sample, tensors["out"], atol=2e-5, rtol=0)
        seen["x_embedder"] = seen["x_embedder"].flatten(2).transpose(1, 2)
        for old, out in seen.items():
            torch.testing.assert_close(out, expected[old], atol=2e-5, rtol=0, msg=lambda m, n=old: f"{n}: {m}")
    model = original_timesteps(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval())
    with torch.no_grad():
        # Guidance of the first three channels, as DiT does it.
        half = tensors["in_cfg.x"][: len(x) // 2]
        out = model(torch.cat([half, half]), tensors["in_cfg.t"], tensors["in_cfg.y"]).sample
        cond, uncond = out[:, :3].chunk(2)
        guided = uncond + case["cfg_scale"] * (cond - uncond)
        out = torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)
        torch.testing.assert_close(out, tensors["out_cfg"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["dit_train_w48_b24", "dit_train_w48_b24_dec"])
def test_four_training_steps_of_dit(name):
    """AdamW on `param_groups` is the reference's MuAdamW, with both of its weight decays."""
    case, tensors = read(name), load_file(FIXTURES / f"{name}.safetensors")
    sizes = {"head_dim": case["width"] // case["heads"], "base_width": case["base_width"]}
    model = original_timesteps(convert_dit(part(tensors, "w0."), **sizes).eval())
    for block in model.transformer_blocks:  # the reference has one embedder
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    exponent = 0.0 if case["wd_mode"].startswith("group wd unscaled") else 1.0
    configure(model, base_width=case["base_width"], wd_exponent=exponent)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = param_groups(model, case["lr"], case["weight_decay"], eps=case["eps"], no_decay=())
    optimizer = torch.optim.AdamW(groups, betas=tuple(case["betas"]))
    x, t, y = (tensors[f"in.{key}"] for key in "xty")
    for step, expected in enumerate([*case["losses"], case["loss_after"]]):
        out = model(x, t, y).sample
        loss = (out[:, :4] - tensors["in.target"]).square().mean()
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        if step < 4:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(out.detach(), tensors["out_after"], atol=1e-4, rtol=0)

    def renamed(weights, factor):
        layout, embedders = published_mup._DIT, published_mup._DIT_EMBEDDERS
        return dict(published_mup._renamed(weights, layout, factor, case["depth"], embedders))

    factor = case["base_width"] / case["width"]
    final = model.state_dict()
    for key, value in renamed(part(tensors, "w4."), factor).items():
        # The exact gradient of a key's bias is 0: what Adam makes of rounding says nothing.
        if not key.endswith("to_k.bias"):
            assert_trained_alike(final[key], value, key)
    for old, row in case["params"].items():
        if not row["delta_rms"] or "qkv" in old:
            continue
        new = new_names(old, case["depth"], published_mup._DIT, published_mup._DIT_EMBEDDERS)[0]
        scale = factor if new == "proj_out_2.weight" else 1.0
        change = (final[new] - before[new]).double().square().mean().sqrt().item() / scale
        assert change == pytest.approx(row["delta_rms"], rel=1e-3), old


class PixArt:
    """The forward pass of PixArt-α (arXiv 2310.00426, section 2.3), on a checkpoint's own names."""

    def __init__(self, weights, heads, readout):
        self.w, self.heads, self.readout = weights, heads, readout

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def attend(self, q, k, v):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def __call__(self, x, t, caption):
        w = self.w
        width = w["pos_embed"].shape[-1]
        tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2)
        tokens = tokens.transpose(1, 2) + w["pos_embed"]
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        vector = self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))
        vector = self.linear("t_embedder.mlp.2", F.silu(vector))
        shared = self.linear("t_block.1", F.silu(vector)).unflatten(1, (6, width))
        caption = F.gelu(self.linear("y_embedder.y_proj.fc1", caption), approximate="tanh")
        caption = self.linear("y_embedder.y_proj.fc2", caption)
        for i in range(2):
            b = f"blocks.{i}."
            parts = (w[b + "scale_shift_table"] + shared).chunk(6, dim=1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
            normed = F.layer_norm(tokens, (width,), eps=1e-6) * (1 + scale) + shift
            out = self.attend(*self.linear(b + "attn.qkv", normed).chunk(3, dim=-1))
            tokens = tokens + gate * self.linear(b + "attn.proj", out)
            keys, values = self.linear(b + "cross_attn.kv_linear", caption).chunk(2, dim=-1)
            out = self.attend(self.linear(b + "cross_attn.q_linear", tokens), keys, values)
            tokens = tokens + self.linear(b + "cross_attn.proj", out)
            normed = F.layer_norm(tokens, (width,), eps=1e-6) * (1 + scale_mlp) + shift_mlp
            out = F.gelu(self.linear(b + "mlp.fc1", normed), approximate="tanh")
            tokens = tokens + gate_mlp * self.linear(b + "mlp.fc2", out)
        shift, scale = (w["final_layer.scale_shift_table"] + vector[:, None]).chunk(2, dim=1)
        tokens = F.layer_norm(tokens, (width,), eps=1e-6) * (1 + scale) + shift
        out = F.linear(
            self.readout * tokens, w["final_layer.linear.weight"], w["final_layer.linear.bias"]
        )  # `mup` scales the readout's input
        side = math.isqrt(out.shape[1])
        return out.reshape(-1, side, side, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, 2 * side, 2 * side)


def pixart_weights(width=48, caption=20, side=4, scale=1.0):
    """Random weights with the recorded names of PixArt-α-μP, for two blocks."""
    shapes = {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
    }
    shapes |= {"t_block.1": (6 * width, width), "y_embedder.y_proj.fc1": (width, caption)}
    shapes |= {"y_embedder.y_proj.fc2": (width, width), "final_layer.linear": (32, width)}
    for i in range(2):
        names = {"attn.qkv": 3, "attn.proj": 1, "cross_attn.q_linear": 1, "cross_attn.kv_linear": 2}
        names |= {"cross_attn.proj": 1, "mlp.fc1": 4}
        shapes |= {f"blocks.{i}.{name}": (rows * width, width) for name, rows in names.items()}
        shapes[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, std=0.1):
        return std * torch.randn(shape, generator=generator)

    weights = {f"{name}.weight": draw(*shape, std=math.prod(shape[1:]) ** -0.5) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": draw(shape[0]) for name, shape in shapes.items()}
    weights |= {f"blocks.{i}.scale_shift_table": draw(6, width) for i in range(2)}
    weights["final_layer.scale_shift_table"] = draw(2, width)
    weights["y_embedder.y_embedding"] = draw(120, caption)
    positions = diffusers.models.embeddings.PatchEmbed(
        2 * side, 2 * side, 2, 4, width, interpolation_scale=scale
    ).pos_embed
    return {**weights, "pos_embed": positions}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_converted_pixart(scale, tmp_path):
    weights = pixart_weights(scale=scale)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "pixart.pth")
    command = ["convert", "pixart-mup", str(tmp_path / "pixart.pth"), str(tmp_path / "out"), "--head-dim", "12"]
    done = CliRunner().invoke(app, [*command, "--base-width", "24"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    model = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3.0, 970.0])
    caption = torch.randn(2, 5, 20, generator=generator)
    conditions = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        expected = PixArt(weights, heads=4, readout=0.5)(x, t, caption)
        got = model(x, caption, timestep=t, added_cond_kwargs=conditions).sample
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("t_block.1.bias"), r"adaln_single.linear.bias should have shape \(288,\), got None"),
        (lambda w: w.update({"blocks.0.moe": torch.zeros(2)}), "'blocks.0.moe' is no parameter of the original model"),
        (lambda w: w.pop("pos_embed"), "has no 'pos_embed'"),
        (lambda w: w.update(pos_embed=w["pos_embed"] + 1), "not the sin-cos table of 4x4 patches"),
        (lambda w: w.update({"t_block.1.bias": torch.zeros(3)}), r"shape \(288,\), got \(3,\)"),
    ],
)
def test_checkpoints_of_another_kind(change, message):
    weights = pixart_weights()
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_pixart(weights, head_dim=12)


@pytest.mark.parametrize("ratio", [2, 3])
def test_mlps_that_diffusers_cannot_hold_are_told_first(ratio):
    weights = pixart_weights()
    for i in range(2):
        for name, shape in (
            ("fc1.weight", (ratio * 48, 48)),
            ("fc1.bias", (ratio * 48,)),
            ("fc2.weight", (48, ratio * 48)),
        ):
            weights[f"blocks.{i}.mlp.{name}"] = torch.zeros(shape)
    with pytest.raises(
        ValueError, match=f"MLPs have {48 * ratio} features, {ratio} times its width 48; .* has 4 times"
    ):
        convert_pixart(weights, head_dim=12)


def test_converted_models_train_with_the_rates_of_mup(tmp_path):
    """Of the base width that the readout was folded with; their folders too."""
    model = convert_pixart(pixart_weights(), head_dim=12, base_width=24, output_mult=3.0)
    model.save_pretrained(tmp_path)
    for one in (model, diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)):
        rates = {group["role"]: group["lr_mult"] for group in param_groups(one, 1e-2)}
        assert rates["hidden"] == rates["modulation"] == 0.5 and rates["output"] == 1.5 and rates["input"] == 1.0


def test_head_dimension_that_does_not_divide():
    with pytest.raises(ValueError, match="width 48 is no multiple of the head dimension 72"):
        convert_pixart(pixart_weights())


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ema": {"x": Evil()}}, "cannot be read as a torch file of tensors and plain values"),
        ([1, 2], "holds no weights"),
        ({"ema": {"x": 1}}, "holds no weights"),
    ],
)
def test_files_without_weights(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.pt")
    assert "run" not in capsys.readouterr().out


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none.pt"):
        read_checkpoint(tmp_path / "none.pt")
