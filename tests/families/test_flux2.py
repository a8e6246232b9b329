"""FLUX.2 dev and klein: conditions against a dense reference, activation hooks, LoRA names and roles of parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.loaders import Flux2LoraLoaderMixin
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import save_file
from tiny import randomize
from tiny_control import image, lora_file, quiet
from torch.nn import Linear

from imgdit import Condition, OmniControl
from imgdit.families.flux2 import FAMILY
from imgdit.lora.dialects import family_of, read_pairs, sort_names
from imgdit.lora.files import adapter_pairs
from imgdit.mup import mup_table
from imgdit.sae.hooks import hooked

TARGETS = (
    r"x_embedder|(double_stream_modulation_img|single_stream_modulation)\.linear|.*ff\.linear_(in|out)"
    r"|transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
STYLE = TARGETS + r"|double_stream_modulation_txt\.linear|.*add_[qkv]_proj|.*ff_context\.linear_(in|out)"


def flux2(kind=Flux2Pipeline):
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind is Flux2Pipeline,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.randn(16) * 0.5)
    vae.bn.running_var.copy_(torch.rand(16) + 0.2)
    return quiet(kind(FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, randomize(model).eval()))


KINDS = {"dev": Flux2Pipeline, "klein": Flux2KleinPipeline}


@pytest.fixture(params=KINDS)
def pipe(request):
    return flux2(KINDS[request.param])


def loaded(pipe, tmp_path):
    control = OmniControl(pipe)
    for seed, name in enumerate(("canny", "depth")):
        control.load(lora_file(tmp_path / f"{name}.safetensors", pipe.transformer, TARGETS, seed=seed, std=0.2))
    return control


@pytest.fixture
def control(pipe, tmp_path):
    return loaded(pipe, tmp_path)


def make(pipe, batch=1, steps=3, **changes):
    generator = torch.Generator().manual_seed(3)
    names = ["prompt_embeds"] + (["negative_prompt_embeds"] if isinstance(pipe, Flux2KleinPipeline) else [])
    dtype = pipe.transformer.dtype
    embeds = {name: torch.randn(batch, 5, 24, generator=generator).to(dtype) for name in names}
    options = {"height": 16, "width": 16, "num_inference_steps": steps, "output_type": "latent", "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(5)
    return pipe(**embeds, **(options | changes), generator=generator, return_dict=False)[0]


def used(control, *conditions, call=None, **options):
    with control.use(conditions, **options):
        return make(control.pipe, **(call or {}))


def differs(a, b, least=1e-3):
    assert a.shape == b.shape and (a - b).abs().max() > least, (a - b).abs().max()


def near(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


# Dense reference: rows [text, image, conditions], each at its own noise level, with the LoRA of its owner.


def dense(model, given, conditions=()):
    """What the model gives for a call, by an attention with an explicit bias (S, S)."""
    text, x = given["encoder_hidden_states"], given["hidden_states"]
    batch, n = x.shape[:2]
    lengths = [text.shape[1], n] + [item.frame.length for item in conditions]
    owners = [None, None] + [item.condition.adapter for item in conditions]
    tokens = torch.cat([x, *(item.tokens.expand(batch, -1, -1) for item in conditions)], dim=1)
    rows = torch.tensor(lengths)
    segment = torch.arange(len(lengths)).repeat_interleave(rows)

    def lin(module, x, segments):
        if not isinstance(module, LoraLayer):
            return module(x)
        out = module.base_layer(x)
        for name in dict.fromkeys(owner for owner in owners if owner in module.lora_A):
            mine = torch.tensor([owners[i] == name for i in segments.tolist()])[None, :, None]
            out = out + mine * module.scaling[name] * (x @ module.lora_A[name].weight.T @ module.lora_B[name].weight.T)
        return out

    def vector(held):
        time, guidance = given["timestep"] * (0 if held else 1000), given.get("guidance")
        guidance = guidance if guidance is None else torch.full_like(guidance, 1000.0) if held else guidance * 1000
        return model.time_guidance_embed(time, guidance)

    vectors = torch.stack([vector(i > 1) for i in range(len(lengths))], dim=1)[:, segment]  # (B, S, D)
    text_rows, image_rows = segment[: lengths[0]], segment[lengths[0] :]
    split = lengths[0]
    mod_text = lin(model.double_stream_modulation_txt.linear, F.silu(vectors[:, :split]), text_rows).chunk(6, -1)
    mod_image = lin(model.double_stream_modulation_img.linear, F.silu(vectors[:, split:]), image_rows).chunk(6, -1)
    mod = lin(model.single_stream_modulation.linear, F.silu(vectors), segment).chunk(3, -1)

    riders = [F.pad(item.frame.ids(), (0, 1)) for item in conditions]
    ids = torch.cat([given["txt_ids"][0].float(), given["img_ids"][0].float(), *riders])
    frequency = 2000.0 ** -(torch.arange(0, 4, 2).double() / 4)
    angle = (ids[:, :, None].double() * frequency).flatten(1).float()[:, None]  # (S, 1, d/2)

    def turn(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    bias = torch.zeros(len(lengths), len(lengths))
    for i, item in enumerate(conditions, start=2):
        bias[i] += math.log(item.condition.strength)
        bias[:, i] += math.log(item.condition.strength)
    for i, item in enumerate(conditions, start=2):
        bias[i, 2:] = -math.inf
        if item.frame.sees == "self":
            bias[i] = -math.inf
        bias[i, i] = 0.0
    bias = bias[segment][:, segment]

    def heads(x, norm=None):
        x = x.unflatten(-1, (2, 16))
        return x if norm is None else norm(x)

    def attend(q, k, v):
        logits = torch.einsum("bihd,bjhd->bhij", turn(q), turn(k)) / 4 + bias
        return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).flatten(2)

    def swiglu(x):
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value

    def norm(x, shift, scale):
        return F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift

    x, text = lin(model.x_embedder, tokens, image_rows), model.context_embedder(text)
    for block in model.transformer_blocks:
        attn, a, b = block.attn, norm(x, *mod_image[:2]), norm(text, *mod_text[:2])
        of_text = attn.add_q_proj(b), attn.add_k_proj(b), attn.add_v_proj(b)
        of_image = (lin(module, a, image_rows) for module in (attn.to_q, attn.to_k, attn.to_v))
        norms = (attn.norm_added_q, attn.norm_q), (attn.norm_added_k, attn.norm_k), (None, None)
        rows = (
            torch.cat([heads(first, norm_first), heads(second, norm_second)], dim=1)
            for first, second, (norm_first, norm_second) in zip(of_text, of_image, norms, strict=True)
        )
        out = attend(*rows)
        text = text + mod_text[2] * attn.to_add_out(out[:, :split])
        x = x + mod_image[2] * lin(attn.to_out[0], out[:, split:], image_rows)
        a, b = norm(x, *mod_image[3:5]), norm(text, *mod_text[3:5])
        a = lin(block.ff.linear_out, swiglu(lin(block.ff.linear_in, a, image_rows)), image_rows)
        x = x + mod_image[5] * a
        text = text + mod_text[5] * block.ff_context.linear_out(swiglu(block.ff_context.linear_in(b)))
    joint = torch.cat([text, x], 1)
    for block in model.single_transformer_blocks:
        attn = block.attn
        q, k, v, mlp = lin(attn.to_qkv_mlp_proj, norm(joint, *mod[:2]), segment).split([32, 32, 32, 192], -1)
        out = attend(heads(q, attn.norm_q), heads(k, attn.norm_k), heads(v))
        joint = joint + mod[2] * lin(attn.to_out, torch.cat([out, swiglu(mlp)], -1), segment)
    return model.proj_out(model.norm_out(joint[:, split : split + n], vector(False)))


@torch.no_grad()
def passes(control, conditions=(), **options):
    """Arguments and result of each call of the transformer, and the encoded conditions."""
    found, call = [], options.pop("call", {})
    handle = control.transformer.register_forward_hook(
        lambda module, args, kwargs, output: found.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        with control.use(conditions, **options):
            make(control.pipe, **call)
            riding = () if control.run is None else control.run.conditions
    finally:
        handle.remove()
    return found, riding


def reference():
    return Image.fromarray((image(7, 64).permute(1, 2, 0) * 255).byte().numpy())


def test_the_reference_is_the_model(control):
    for call in ({}, {"image": [reference(), reference()]}):
        for given, out in passes(control, call=call)[0]:
            near(dense(control.transformer, given), out)


CASES = {
    "one": [Condition(image(), "canny")],
    "several": [Condition(image(), "canny"), Condition(image(1), "depth", position="subject")],
    "weak, moved": [Condition(image(), "canny", strength=0.3, position=(1, 2))],
    "strong, compact": [Condition(image(size=8), "canny", scale=2.0, strength=3.0), Condition(image(1), "depth")],
    "part": [Condition(image(), "canny", mask=torch.eye(4).bool())],
}


@pytest.mark.parametrize("mode", ["joint", "independent"])
@pytest.mark.parametrize("case", CASES)
def test_conditions_equal_the_reference(control, case, mode):
    found, riding = passes(control, CASES[case], mode=mode)
    assert len(found) == (6 if isinstance(control.pipe, Flux2KleinPipeline) else 3)
    for given, out in found:
        near(out, dense(control.transformer, given, riding))
        differs(out, dense(control.transformer, given))


@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_batches_and_the_pipelines_references(control, mode):
    pair = [Condition([image(), image(1)], "canny")]
    for conditions, call in ((pair, {"batch": 2}), (CASES["several"], {"image": [reference()], "steps": 2})):
        found, riding = passes(control, conditions, mode=mode, call=call)
        for given, out in found:
            near(out, dense(control.transformer, given, riding))


# Identity, effect, removal


def test_nothing_changes_without_conditions_and_after_removal(pipe, tmp_path):
    plain = make(pipe)
    control = loaded(pipe, tmp_path)
    assert torch.equal(make(pipe), plain)
    assert torch.equal(used(control, Condition(image(), "canny", strength=0.0)), plain)
    assert torch.equal(used(control, Condition(image(), "canny", end=0.0)), plain)
    one = used(control, Condition(image(), "canny"))
    differs(one, plain)
    differs(one, used(control, Condition(image(1), "canny")))
    differs(one, used(control, Condition(image(), "depth")))
    assert torch.equal(make(pipe), plain)
    control.remove()
    assert torch.equal(make(pipe), plain)


@torch.no_grad()
def test_blocks_without_condition_tokens_are_the_models(control):
    """The family's functions on the model's own rows alone."""
    given, out = passes(control)[0][0]
    hook = control.transformer._diffusers_hook.hooks[control._name]
    with control.use(Condition(image(), "canny")):
        alone = hook._pass(control.transformer, control.run, dict(given), (), empty=False)[0]
    near(alone, out, 1e-6)


def test_cached_keys_equal_computed_ones(control):
    conditions = [Condition(image(), "canny"), Condition(image(1), "depth", strength=0.5, end=0.6)]
    computed = used(control, *conditions, mode="independent", cache=False)
    near(used(control, *conditions, mode="independent"), computed)
    differs(used(control, *conditions), computed, 1e-4)


def test_both_guidance_calls_share_a_cache(tmp_path):
    control = loaded(flux2(Flux2KleinPipeline), tmp_path)
    with control.use(Condition(image(), "canny"), mode="independent"):
        make(control.pipe)
        assert len(control.run._kept.caches) == 1


def test_image_guidance_and_completion(control):
    condition, black = Condition(image(), "canny"), Condition(torch.zeros(3, 16, 16), "canny")
    call = {"steps": 1}
    a, b = (used(control, one, call=call) for one in (condition, black))
    near(used(control, condition, call=call, image_guidance_scale=2.0), b + 2.0 * (a - b), 1e-4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1:3, 1:4] = False
    with control.use(Condition(image(), "canny", mask=mask, complement=True)):
        known, got = control.run.known(), make(control.pipe)
    if got.ndim == 3:
        near(got[:, mask.flatten()], known[:, mask.flatten()], 1e-4)
    assert got.isfinite().all()
    with (
        pytest.raises(ValueError, match="no reference image"),
        control.use(Condition(image(), "canny", mask=mask, complement=True)),
    ):
        make(control.pipe, image=[reference()])


def test_a_style_lora_acts_on_text_and_image_alone(control, tmp_path):
    style = lora_file(tmp_path / "style.safetensors", control.transformer, STYLE, seed=4, std=0.2)
    plain = used(control, Condition(image(), "canny"))
    control.pipe.load_lora_weights(str(style), adapter_name="style")
    styled = used(control, Condition(image(), "canny"))
    differs(styled, plain)
    assert torch.equal(styled, used(control, Condition(image(), "canny"), main_adapter="style"))
    near(used(control, Condition(image(), "canny"), main_adapter=()), plain)


def test_conditions_have_the_pipelines_normalisation(pipe):
    pixels = image()[None] * 2 - 1
    latents = pipe._encode_vae_image(pixels, None)
    expected = pipe._pack_latents(latents)
    near(FAMILY.tokens.encode(pipe.transformer, pipe.vae, pixels, None), expected, 1e-6)
    drawn = [
        FAMILY.tokens.encode(pipe.transformer, pipe.vae, pixels, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    differs(drawn[0], drawn[2], 1e-6)


def test_bfloat16_is_near_float32(control):
    expected = used(control, *CASES["several"], mode="independent")
    control.pipe.to(torch.bfloat16)
    got = used(control, *CASES["several"], mode="independent")
    assert got.dtype == torch.bfloat16
    near(got.float(), expected, 0.06)


def test_gradients_under_checkpointing_are_those_without(control):
    given = passes(control)[0][0][0]
    weights = [p.requires_grad_() for name, p in control.transformer.named_parameters() if "lora_" in name]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            control.transformer.enable_gradient_checkpointing()
            control.transformer.train()
        with control.use(CASES["several"]):
            out = control.transformer(**given)[0]
            found.append(torch.autograd.grad(out.square().sum(), weights, allow_unused=True))
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sum(a is not None and bool(a.any()) for a in found[0]) > len(weights) / 2


def test_compiled_blocks(control):
    torch._dynamo.reset()  # its limit of recompilations counts all models of a process
    plain, expected = make(control.pipe), used(control, *CASES["several"])
    control.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    near(used(control, *CASES["several"]), expected)
    near(make(control.pipe), plain)
    torch._dynamo.reset()


def test_the_pipeline_that_keeps_keys_is_refused():
    pipe = flux2(Flux2KleinPipeline)
    with pytest.raises(ValueError, match="keeps the keys and values of its reference images itself"):
        OmniControl(Flux2KleinKVPipeline(**pipe.components))
    control = OmniControl(pipe)  # on the same transformer, whose processors the other pipeline changed
    with pytest.raises(ValueError, match="KVAttnProcessor: Flux2KleinKVPipeline keeps"), control.use([]):
        pass


# Activations


@pytest.mark.parametrize("place", ["transformer_blocks.1", "single_transformer_blocks.0"])
def test_activation_hooks_ride_with_conditions(control, place):
    name = f"transformer.{place}"
    for conditions in ((), (Condition(image(), "canny"),)):
        expected, seen = used(control, *conditions), []
        with control.use(conditions):
            with hooked(control.pipe, {name: seen.append}):
                assert torch.equal(make(control.pipe), expected)
            with hooked(control.pipe, {name: lambda tokens: tokens.values}):
                assert torch.equal(make(control.pipe), expected)
            with hooked(control.pipe, {name: lambda tokens: tokens.values * 2}):
                differs(make(control.pipe), expected)
        assert seen[0].values.shape == (1, 16, 32) and seen[0].grids == ((4, 4),)


# LoRA names and roles

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
    differs(used(control, Condition(image(), "one")), used(control, Condition(image(1), "one")), 1e-5)


def test_every_parameter_has_a_role():
    assert {rule.role for rule in mup_table(flux2().transformer)} >= {"input", "hidden", "output", "modulation"}
