"""Loading adapters: their strength is PEFT's, their names are legal, and what fails leaves everything as it was."""

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import rope_config, tiny_mmdit, tiny_pipeline
from tiny_control import ONE_LAYER as NAME
from tiny_control import SD3_TARGETS, flux, image, lora_file, make, one_layer, sd3, strangers

from imgdit import Condition, FluxOmniControlPipeline, OmniControl, StableDiffusion3OmniControlPipeline
from imgdit.lora.files import (
    active_adapters,
    adapter_pairs,
    attach_adapter,
    find_adapters,
    legal_name,
    loaded_adapters,
    read_adapter,
    read_info,
    write_adapter,
)
from imgdit.models.quantized import quantize_rows


def forward(model):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    inputs = {"hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 5, 32), "timestep": torch.ones(1)}
    with torch.no_grad():
        return model(
            **inputs, pooled_projections=noise(1, 32), img_ids=ids, txt_ids=torch.zeros(5, 3), return_dict=False
        )[0]


# Strength

CONFIGS = {
    "alpha": {"lora_alpha": 16},
    "rank-stabilised": {"lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "lora_alpha": 3,
        "rank_pattern": {"to_k": 2, "^transformer_blocks.0.attn.to_q": 6},
        "alpha_pattern": {"to_k": 8, r"single_transformer_blocks\.\d+\.attn\.to_q": 1},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("saved", ["PEFT", "PEFT, named", "save_lora_adapter", "renamed"])
def test_an_adapter_of_peft_acts_as_in_peft(tmp_path, config, saved):
    """The alpha stands beside the weights, or in the header; the file and its folder are the same source."""
    torch.manual_seed(0)
    name = "style" if saved == "PEFT, named" else "default"
    settings = LoraConfig(r=4, target_modules=["to_q", "to_k", "proj_mlp"], init_lora_weights=False, **CONFIGS[config])
    if saved == "save_lora_adapter":
        model = flux().transformer
        model.add_adapter(settings)
        expected = forward(model)
        model.save_lora_adapter(tmp_path)
        live = model
    else:
        model = get_peft_model(flux().transformer, settings, adapter_name=name)
        expected = forward(model)
        model.save_pretrained(tmp_path)
        live = model.base_model.model
    (file,) = tmp_path.rglob("*.safetensors")
    if saved == "renamed":
        file = file.rename(tmp_path / "edges.safetensors")
    written = write_adapter(tmp_path.with_suffix(".safetensors"), adapter_pairs(live, name))
    for source in (tmp_path, file, file.parent, written):
        fresh = flux().transformer
        attach_adapter(fresh, read_adapter(source), "x")
        fresh.set_adapters("x")
        torch.testing.assert_close(forward(fresh), expected, atol=1e-5, rtol=1e-5)


def test_a_configuration_belongs_to_pefts_weights_and_to_no_other_file_beside(tmp_path):
    one_layer(tmp_path / "adapter_model.safetensors")
    other = one_layer(tmp_path / "other.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    plain = load_file(other)[f"{NAME}.lora_B.weight"]
    assert torch.equal(read_adapter(other).pairs[NAME.removeprefix("transformer.")].up, plain)
    scaled = read_adapter(tmp_path, "adapter_model.safetensors").pairs[NAME.removeprefix("transformer.")].up
    assert torch.equal(scaled, plain * 4)


def test_a_downloaded_repository_has_its_strength_without_a_network(tmp_path):
    """As the Hub's cache keeps PEFT's files; without the configuration the strength is unknown."""
    snapshot = tmp_path / "models--imgdit-tests--no-such-lora/snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    plain = load_file(one_layer(snapshot / "adapter_model.safetensors"))[f"{NAME}.lora_B.weight"]
    source = ("imgdit-tests/no-such-lora", "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"whose strength stands in adapter_config\.json, which could not be read"):
        read_adapter(*source, cache_dir=str(tmp_path))
    (snapshot / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))
    (pair,) = read_adapter(*source, cache_dir=str(tmp_path)).pairs.values()
    assert torch.equal(pair.up, plain * 3)


def test_a_path_is_never_a_repository_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    for source in ("adapters/depth", Path("someone/depth"), "./depth", "depth"):
        with pytest.raises(ValueError, match="there is no file"):
            read_adapter(source)


WRONG = {
    "LoKr": ({"peft_type": "LOKR"}, "is a LOKR, as its PEFT configuration says"),
    "DoRA": ({"lora_alpha": 2, "use_dora": True}, "is a DoRA, as its PEFT configuration says"),
    "biases": ({"lora_alpha": 2, "lora_bias": True}, "lora_bias=True"),
    "PiSSA": ({"lora_alpha": 2, "init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight"),
    "no number": ({"lora_alpha": "8"}, "the alpha '8' of 'lora_alpha'; expected a number"),
    "a list": ([1], "must hold an object, got list"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_configurations_that_are_refused(tmp_path, kind):
    config, message = WRONG[kind]
    one_layer(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for read in (read_adapter, read_info):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_what_is_no_plain_lora_on_a_model_is_not_written():
    model = flux().transformer
    model.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["to_q"]), "dora")
    with pytest.raises(ValueError, match="'dora' is no plain LoRA"):
        adapter_pairs(model, "dora")


# Files with keys of text encoders


def test_keys_of_text_encoders_cost_a_line_and_no_time(tmp_path, caplog):
    pipe = flux(num_layers=8, num_single_layers=12)
    path = one_layer(tmp_path / "style.safetensors")
    te = [
        f"lora_te1_text_model_encoder_layers_{n}_mlp_{p}.lora_down.weight" for n in range(300) for p in ("fc1", "fc2")
    ]
    lost = [f"transformer.transformer_blocks.{n}.attn.to_qq.lora_A.weight" for n in range(300)]
    save_file(load_file(path) | {key: torch.ones(1, 1) for key in te + lost}, path)
    started = time.process_time()
    report = OmniControl(pipe).load(path)
    assert time.process_time() - started < 2
    text = str(report)
    assert "600 keys of a text encoder" in text and len(text.splitlines()) == 13
    assert report.used == 2 and len(report.aside) == 600 and len(report.unused) == 300
    assert report.unused[0] == (lost[0], "transformer_blocks.0.attn.to_q")


# Names


def test_file_names_become_legal_names(tmp_path):
    pipe = flux()
    control = OmniControl(pipe)
    report = control.load(one_layer(tmp_path / "edges-v1.1.safetensors"))
    assert report.adapter == "edges-v1_1"
    with control.use([Condition(image(), report.adapter)]):
        make(pipe)
    with pytest.raises(ValueError, match=r"'edges-v1_1' is loaded already; .*adapter_name="):
        control.load(one_layer(tmp_path / "edges-v1_1.safetensors"))
    with pytest.raises(ValueError, match=r"cannot be called 'v1\.1' in torch; take 'v1_1'"):
        control.load(tmp_path / "edges-v1_1.safetensors", adapter_name="v1.1")
    assert loaded_adapters(pipe.transformer) == ["edges-v1_1"]
    for name in ("train", "keys", "type"):  # methods of what PEFT keeps adapters in
        assert control.load(one_layer(tmp_path / f"{name}.safetensors")).adapter == f"{name}_adapter"
    assert legal_name("a.b", ["a_b", "a_b_2"]) == "a_b_3"


# Other models


def test_another_base_model_is_named_with_its_shapes_and_family(tmp_path):
    model = flux().transformer
    before = model.state_dict().keys()
    control = one_layer(tmp_path / "depth.safetensors", columns=32, name="transformer.x_embedder")
    with pytest.raises(ValueError, match=r"is a FLUX Control LoRA.*FluxControlPipeline.*reads 32 channels.*16"):
        attach_adapter(model, read_adapter(control), "a")
    of_sd3 = lora_file(tmp_path / "sd3.safetensors", sd3().transformer, SD3_TARGETS)
    with pytest.raises(ValueError, match=r"192x32.*names of SD3; the model is a FluxTransformer2DModel \(FLUX\.1\)"):
        attach_adapter(model, read_adapter(of_sd3), "a")
    xl = one_layer(
        tmp_path / "xl.safetensors", name="lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q"
    )
    with pytest.raises(ValueError, match=r"holds no LoRA of a transformer.*names of Stable Diffusion 1, 2 or XL"):
        read_adapter(xl)
    qwen = one_layer(tmp_path / "qwen.safetensors", name="transformer.transformer_blocks.0.img_mlp.net.2")
    with pytest.raises(
        ValueError, match=r"has no module .*names of Qwen-Image; the model is a FluxTransformer2DModel"
    ):
        attach_adapter(model, read_adapter(qwen), "a")
    assert model.state_dict().keys() == before and not loaded_adapters(model)


# Folders


def test_a_folder_of_adapters_with_strangers(tmp_path, caplog):
    folder = strangers(tmp_path / "adapters")
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        found = find_adapters(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert set(found) == {"edges-v1.1", "style"} and found["edges-v1.1"].info.task == "canny"
    (record,) = caplog.records
    told = record.getMessage()
    for part in ("._edges-v1.1.safetensors: a hidden file", "half.safetensors: cannot be read", "incomplete file",
                 "old.ckpt: a .ckpt file", "words.safetensors: holds no LoRA of a transformer", "of a text encoder",
                 "model.safetensors: holds no LoRA", "of whole weights", "lokr.safetensors: is a LoKr",
                 "empty.safetensors"):  # fmt: skip
        assert part in told, part
    assert "DS_Store" not in told and "notes.txt" not in told
    assert find_adapters(tmp_path / "none") == {}


def test_only_headers_of_a_folder_are_read(tmp_path):
    """A tensor's data is not looked at: its length is right and its numbers are no LoRA's."""
    path = one_layer(tmp_path / "a.safetensors", columns=64)
    tensors = load_file(path)
    tensors[f"{NAME}.lora_B.weight"] = torch.ones(3, 3)
    save_file(tensors, path)
    assert list(find_adapters(tmp_path)) == ["a"]
    with pytest.raises(ValueError, match="damaged or no plain LoRA"):
        read_adapter(path)


# Failures


class Odd(torch.nn.Module):
    """A layer of a library that PEFT does not know."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("others", [False, True], ids=["first", "beside another"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
def test_a_load_that_fails_halfway_leaves_everything(tmp_path, others, offload):
    """PEFT refuses a layer after it wrapped those before."""
    pipe = flux()
    model = pipe.transformer
    model.transformer_blocks[1].attn.to_q = Odd(model.transformer_blocks[1].attn.to_q)
    if others:
        pipe.load_lora_weights(one_layer(tmp_path / "first.safetensors"), adapter_name="first")
    if offload:
        pipe.enable_model_cpu_offload(device="cpu")
    before, acts, state = make(pipe), active_adapters(model), dict(model.state_dict())
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    file = lora_file(tmp_path / "late.safetensors", model, r"(single_)?transformer_blocks\.0\.attn\.to_k")
    tensors = load_file(file) | load_file(one_layer(tmp_path / "b.safetensors", name=NAME.replace("0", "1")))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="not supported"):
        OmniControl(pipe).load(file)
    assert active_adapters(model) == acts and loaded_adapters(model) == (["first"] if others else [])
    now = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert now.keys() == {name.replace(".base_layer", "") for name in state}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == trained[name if name in trained else name.replace(".base_layer", "")]
    assert hasattr(model, "_hf_hook") == offload
    assert torch.equal(make(pipe), before)
    if not offload:  # diffusers itself cannot offload again without an accelerator
        model.transformer_blocks[1].attn.to_q = torch.nn.Linear(32, 32)
        assert "transformer_blocks.1.attn.to_q" in OmniControl(pipe).load(file).matched


def test_hot_swapping_leaves_adapters_whose_names_hold_the_swapped_ones(tmp_path):
    """PEFT looks for the name anywhere in a parameter's, and empties what it finds."""
    pipe = flux()
    control = OmniControl(pipe)
    for seed, name in enumerate(("a", "canny", "lora_A", "canny_2")):
        control.load(lora_file(tmp_path / f"{name}.safetensors", pipe.transformer, seed=seed))
    names = loaded_adapters(pipe.transformer)
    weights = {
        name: {
            module: [part.clone() for part in pair] for module, pair in adapter_pairs(pipe.transformer, name).items()
        }
        for name in names
    }
    for swapped in ("a", "canny"):
        control.load(
            lora_file(tmp_path / "new.safetensors", pipe.transformer, seed=9), adapter_name=swapped, hotswap=True
        )
    new = read_adapter(tmp_path / "new.safetensors").pairs
    for name in names:
        for module, pair in adapter_pairs(pipe.transformer, name).items():
            right = new[module] if name in ("a", "canny") else weights[name][module]
            assert torch.equal(pair.down, right[0]) and torch.equal(pair.up, right[1]), (name, module)
    with pytest.raises(ValueError, match="fills the layers of 'a' anew, and 'context_embedder' is none"):
        control.load(lora_file(tmp_path / "more.safetensors", pipe.transformer, "context_embedder"), adapter_name="a",
                     hotswap=True)  # fmt: skip


# Weights in 8 bits


@pytest.mark.parametrize("style", [False, True], ids=["condition", "beside a style"])
def test_eight_bit_storage_before_or_after_an_adapter(tmp_path, style):
    """Casting first keeps the adapter in the type that is computed in; it is not rounded to 8 bits."""
    results = {}
    for first in ("casting", "adapter"):
        pipe = flux()
        control = OmniControl(pipe)
        file = lora_file(tmp_path / "canny.safetensors", pipe.transformer)

        def cast(model=pipe.transformer):
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

        if first == "casting":
            cast()
        control.load(file)
        control.load(lora_file(tmp_path / "style.safetensors", pipe.transformer, seed=3))
        if first == "casting":
            exact = read_adapter(file).pairs
            assert all(
                torch.equal(one.up, exact[name].up) for name, one in adapter_pairs(pipe.transformer, "canny").items()
            )
        else:
            cast()
        assert control.save(tmp_path / "again.safetensors", "canny").exists()
        plain = make(pipe)
        with control.use([Condition(image(), "canny")], main_adapter="style" if style else None):
            results[first] = make(pipe)
        assert (results[first] - plain).abs().max() > 1e-2
        assert torch.equal(make(pipe), plain)
    assert (results["casting"] - results["adapter"]).abs().max() < 0.1 * results["casting"].abs().max()


def test_an_adapter_on_a_quantised_base(tmp_path):
    """Its own numbers stay as the file has them, whatever the base's are stored in."""
    pipe = flux()
    quantize_rows(pipe.transformer)
    control, plain = OmniControl(pipe), make(pipe)
    file = lora_file(tmp_path / "canny.safetensors", pipe.transformer)
    control.load(file)
    exact = read_adapter(file).pairs
    for name, pair in adapter_pairs(pipe.transformer, "canny").items():
        assert torch.equal(pair.down, exact[name].down) and torch.equal(pair.up, exact[name].up)
    assert torch.equal(make(pipe), plain)
    with control.use([Condition(image(), "canny")]):
        assert (make(pipe) - plain).abs().max() > 1e-2


# An adapter that is a condition's and a main one


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_an_adapter_that_is_main_too_acts_once_on_the_conditions_rows(tmp_path, model):
    """Outside OminiControl's list of modules main adapters act on all rows, and the condition's is not added again."""
    from imgdit.lora.rows import AdapterRows, linear

    pipe = {"flux": flux, "sd3": sd3}[model]()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer, r".*ff\.net\.0\.proj"))
    layer = pipe.transformer.transformer_blocks[0].ff.net[0].proj
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    rows = AdapterRows(((slice(0, 4), None), (slice(4, 6), "canny")), frozenset({"canny"}), ("canny",))
    layer.set_adapter("canny")
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x, rows, shared=True), layer(x))
    only = rows._replace(main=())
    with torch.no_grad():
        got = linear(layer, x, only, shared=True)
        assert torch.equal(got[:, :4], layer.base_layer(x)[:, :4])
        torch.testing.assert_close(got[:, 4:], layer(x)[:, 4:])
    layer.set_adapter([])
    condition = Condition(image(), "canny")
    with control.use([condition], main_adapter="canny"):
        both = make(pipe)
    with control.use([condition]):
        assert (make(pipe) - both).abs().max() > 1e-4


# diffusers' own loading into our pipelines


def test_load_lora_weights_of_our_pipelines_reads_every_dialect(tmp_path):
    pipe = tiny_pipeline()
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(96, 2, generator=generator)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    kohya = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0),
             "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}  # fmt: skip
    save_file(kohya, tmp_path / "kohya.safetensors")
    (tmp_path / "peft").mkdir()
    peft = {f"base_model.model.transformer_blocks.0.attn.{part}": up[i * 32 : i * 32 + 32] for i, part in
            enumerate(("to_q", "to_k", "to_v"))}  # fmt: skip
    tensors = {}
    for module, rows in peft.items():
        tensors |= {f"{module}.lora_A.weight": down.clone(), f"{module}.lora_B.weight": rows.clone()}
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    sources = [
        (tmp_path / "kohya.safetensors", {}),
        (tmp_path, {"weight_name": "kohya.safetensors"}),
        (kohya, {}),
        (tmp_path / "peft", {}),
        (tmp_path, {"subfolder": "peft", "weight_name": "adapter_model.safetensors"}),
    ]
    for source, options in sources:
        pipe.load_lora_weights(source, **options)
        delta = pipe.transformer.transformer_blocks[0].attn.to_k.get_delta_weight("default_0")
        torch.testing.assert_close(delta, up[32:64] @ down / 2)
        pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="holds no LoRA of a transformer"):
        pipe.load_lora_weights({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)})


def test_load_lora_weights_of_our_pipelines_leaves_what_it_cannot_change(tmp_path):
    pipe = tiny_pipeline()
    model = pipe.transformer
    good = one_layer(tmp_path / "good.safetensors")
    keys, trained = set(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    for name, message in (("v1.1", "cannot be called 'v1.1' in torch"), ("train", "take 'train_adapter'")):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(good, adapter_name=name)
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipe.load_lora_weights(one_layer(tmp_path / "wide.safetensors", 64, 64))
    assert set(model.state_dict()) == keys and not loaded_adapters(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.load_lora_weights(good, adapter_name="good")
    (pair,) = adapter_pairs(model, "good").values()
    (expected,) = read_adapter(good).pairs.values()
    assert torch.equal(pair.up, expected.up)


def test_adapters_of_our_own_model(tmp_path):
    model = tiny_mmdit(rope_config())
    file = one_layer(tmp_path / "a.safetensors", name="lora_transformer_transformer_blocks_0_attn_to_q")
    tensors = {
        key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in load_file(file).items()
    }
    save_file(tensors, file)
    report = attach_adapter(model, read_adapter(file), "a")
    assert report.dialect == "onetrainer" and report.matched == ("transformer_blocks.0.attn.to_q",)


# A second adapter


def test_several_adapters_are_nothing_to_warn_of(tmp_path, recwarn):
    """PEFT warns where a model already has one, which is what several conditions and a style need."""
    for build, targets in ((flux, {}), (sd3, {"targets": SD3_TARGETS})):
        pipe = build()
        kind = FluxOmniControlPipeline if build is flux else StableDiffusion3OmniControlPipeline
        ours = kind.from_pipe(pipe)
        files = [lora_file(tmp_path / f"{build.__name__}{n}.safetensors", pipe.transformer, **targets) for n in "abcd"]
        for file in files[:3]:
            ours.load_control(file)
        ours.load_lora_weights(str(files[3]), adapter_name="style")
        assert len(loaded_adapters(pipe.transformer)) == 4
    pipe = tiny_pipeline()
    files = [lora_file(tmp_path / f"own{n}.safetensors", pipe.transformer) for n in "abcd"]
    for file in files[:2]:
        pipe.load_control(file)
    pipe.load_lora_weights(str(files[2]), adapter_name="style")
    pipe.transformer.load_lora_adapter(str(files[3]), prefix="transformer", adapter_name="direct")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "fresh")
    assert len(loaded_adapters(pipe.transformer)) == 5
    assert not [str(one.message) for one in recwarn if "peft" in str(one.message)]
