"""Conditions in stock pipelines: identity, effect and removal of each option, and all else that may be on."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxKontextPipeline
from diffusers.hooks import HookRegistry
from PIL import Image
from safetensors.torch import load_file
from tiny_control import SD3_TARGETS, SIZE, STYLE_TARGETS, flux, image, lora_file, make, sd3, text

from imgdit import Condition, FluxOmniControlPipeline, OmniControl, StableDiffusion3OmniControlPipeline
from imgdit.adapters import omni_control
from imgdit.lora.files import AdapterInfo

MAKERS = {"flux": (flux, {}), "sd3": (sd3, {"targets": SD3_TARGETS})}


@pytest.fixture(params=list(MAKERS))
def pipe(request):
    return MAKERS[request.param][0]()


@pytest.fixture
def control(pipe, tmp_path):
    targets = {} if hasattr(pipe.transformer, "x_embedder") else {"targets": SD3_TARGETS}
    made = OmniControl(pipe)
    for seed, name in enumerate(("canny", "depth")):
        made.load(lora_file(tmp_path / f"{name}.safetensors", pipe.transformer, seed=seed, **targets))
    return made


@pytest.fixture
def flux_control(tmp_path):
    made = OmniControl(flux(guidance_embeds=True))
    for seed, name in enumerate(("canny", "depth")):
        made.load(lora_file(tmp_path / f"{name}.safetensors", made.transformer, seed=seed))
    return made


def used(control, *conditions, seed=5, call=None, **options):
    with control.use(conditions, **options):
        return make(control.pipe, seed=seed, **(call or {}))


def differs(a, b, least=1e-3):
    assert a.shape == b.shape
    assert (a - b).abs().max() > least, (a - b).abs().max()


def same(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


# Identity, effect, removal


def test_nothing_changes_without_conditions_and_after_removal(pipe, tmp_path):
    before, state = make(pipe), set(pipe.transformer.state_dict())
    transformer, forward = pipe.transformer, type(pipe.transformer).forward
    control = OmniControl(pipe)
    assert torch.equal(make(pipe), before)
    targets = {} if hasattr(pipe.transformer, "x_embedder") else {"targets": SD3_TARGETS}
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer, **targets))
    assert torch.equal(make(pipe), before)
    with control.use([Condition(image(), "canny")]):
        differs(make(pipe), before)
    assert torch.equal(make(pipe), before)
    control.remove()
    assert torch.equal(make(pipe), before)
    assert pipe.transformer is transformer and transformer.forward.__func__ is forward
    assert set(transformer.state_dict()) == state
    assert not any(getattr(m, "_diffusers_hook", None) for m in transformer.modules() if m is not transformer)
    copy.deepcopy(transformer)


def test_one_condition_needs_no_list(control):
    condition = Condition(image(), "canny")
    with control.use(condition):
        got = make(control.pipe)
    assert torch.equal(got, used(control, condition))
    with pytest.raises(ValueError, match=r"Condition.* objects, one or a list; got Tensor"), control.use([image()]):
        pass


def test_the_adapter_and_the_image_matter(control):
    one = used(control, Condition(image(), "canny"))
    differs(one, used(control, Condition(image(), "depth")))
    differs(one, used(control, Condition(image(1), "canny")))
    assert torch.equal(one, used(control, Condition(image(), "canny")))


OPTIONS = {
    "subject": {"position": "subject"},
    "moved": {"position": (1, 2)},
    "weaker": {"strength": 0.4},
    "stronger": {"strength": 3.0},
    "late": {"start": 0.5},
    "early": {"end": 0.4},
    "masked": {"mask": torch.eye(4).bool()},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_an_effect(control, option):
    plain = make(control.pipe)
    got = used(control, Condition(image(), "canny", **OPTIONS[option]))
    differs(got, used(control, Condition(image(), "canny")), 1e-4)
    differs(got, plain, 1e-4)


def test_neutral_options_are_the_identity(control):
    plain, one = make(control.pipe), used(control, Condition(image(), "canny"))
    assert torch.equal(used(control, Condition(image(), "canny", strength=0.0)), plain)
    assert torch.equal(used(control, Condition(image(), "canny", end=0.0)), plain)
    assert torch.equal(used(control), plain)
    everything = torch.ones(SIZE, SIZE, dtype=torch.bool)
    same(used(control, Condition(image(), "canny", strength=1.0, mask=everything)), one)
    same(used(control, Condition(image(), "canny"), image_guidance_scale=1.0), one)
    weak = used(control, Condition(image(), "canny", strength=1e-6))
    assert (weak - plain).abs().max() < 1e-3


def test_a_compact_condition_covers_the_image_with_fewer_tokens(control):
    small = Condition(image(size=SIZE // 2), "canny", scale=2.0)
    with control.use([small]):
        frame = control.run.conditions[0].frame
    assert frame.length == 4
    assert frame.ids()[0].tolist() == [0.0, 0.5, 0.5]
    differs(used(control, small), used(control, Condition(image(size=SIZE // 2), "canny")), 1e-4)


def test_two_conditions_and_their_strengths(control):
    first, second = Condition(image(), "canny"), Condition(image(1), "depth", position="subject")
    both = used(control, first, second)
    differs(both, used(control, first))
    differs(both, used(control, second))
    off = Condition(image(1), "depth", position="subject", strength=0.0)
    assert torch.equal(used(control, first, off), used(control, first))


@pytest.mark.parametrize(
    "kind", ["PIL", "array", "tensor", "batch", "grey", "16 bit", "uint16", "float", "cut-out", "turned"]
)
def test_images_of_any_kind(control, kind):
    from imgdit.images import to_image

    pixels = (image() * 255).round() / 255
    if kind in ("grey", "16 bit", "uint16", "float"):
        pixels = pixels[:1].expand(3, -1, -1)
    if kind == "cut-out":
        pixels[:, :8] = 1.0
    turned = Image.Exif()
    turned[0x0112] = 3
    deep = (pixels[0] * 65535).round().numpy().astype(np.uint16)
    hidden, opacity = np.array(to_image(pixels)), np.full((SIZE, SIZE, 1), 255, np.uint8)
    hidden[:8], opacity[:8] = (0, 255, 0), 0  # green that nobody sees
    given = {
        "PIL": lambda: to_image(pixels),
        "array": lambda: (pixels * 255).round().byte().permute(1, 2, 0).numpy(),
        "tensor": lambda: pixels,
        "batch": lambda: pixels[None],
        "grey": lambda: to_image(pixels).convert("L"),
        "16 bit": lambda: Image.fromarray(deep),
        "uint16": lambda: deep,
        "float": lambda: Image.fromarray(pixels[0].numpy()),
        "cut-out": lambda: Image.fromarray(np.concatenate([hidden, opacity], -1)),
        "turned": lambda: with_exif(to_image(pixels.flip(1, 2)), turned),
    }[kind]()
    same(used(control, Condition(given, "canny")), used(control, Condition(pixels, "canny")))


def test_a_generator_draws_the_conditions_and_the_mode_is_the_default(control):
    condition = Condition(image(), "canny")
    torch.manual_seed(1)
    one = used(control, condition)
    torch.manual_seed(2)
    assert torch.equal(used(control, condition), one)
    drawn = [used(control, condition, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(drawn[0], drawn[1])
    differs(drawn[0], drawn[2], 1e-6)


def with_exif(image, exif):
    image.info["exif"] = exif.tobytes()
    return image


# Joint and independent


def test_cached_keys_equal_computed_ones(control):
    conditions = [Condition(image(), "canny"), Condition(image(1), "depth", strength=0.5)]
    computed = used(control, *conditions, mode="independent", cache=False)
    same(used(control, *conditions, mode="independent"), computed)
    differs(used(control, *conditions), computed)


def test_the_cache_follows_prompt_weights_and_step_range(control):
    condition = Condition(image(), "canny", end=0.7)
    other = text(control.pipe, seed=9)
    expected = [
        used(control, condition, mode="independent", cache=False, call=call, seed=seed)
        for call, seed in (({}, 5), ({}, 6), (other, 5))
    ]
    with control.use([condition], mode="independent"):
        same(make(control.pipe), expected[0])
        same(make(control.pipe, seed=6), expected[1])
        same(make(control.pipe, **other), expected[2])
        for module in control.run.lora_layers:
            module.set_scale("canny", 0.3)
        changed = make(control.pipe)
    differs(changed, expected[0])
    same(changed, used(control, condition, mode="independent", cache=False))


def test_the_cache_follows_the_size_of_the_image(control):
    """SD3's positions count from the middle of a table, so a condition's move with the image's size."""
    condition, wide = Condition(image(), "canny"), {"width": SIZE + 8}
    expected = used(control, condition, mode="independent", cache=False, call=wide)
    with control.use([condition], mode="independent"):
        make(control.pipe)
        same(make(control.pipe, **wide), expected)


def test_another_adapter_of_a_deleted_ones_name_has_its_own_settings(flux_control, tmp_path):
    file = lora_file(tmp_path / "own.safetensors", flux_control.transformer, info=AdapterInfo(mode="independent"))
    flux_control.load(file)
    other = load_file(lora_file(tmp_path / "other.safetensors", flux_control.transformer, seed=3))
    for _ in range(2):
        flux_control.transformer.delete_adapters("own")
        flux_control.transformer.load_lora_adapter(other, adapter_name="own")
        with flux_control.use([Condition(image(), "own")]):
            assert not flux_control.run.cached
        flux_control.transformer.delete_adapters("own")
        flux_control.load(file)
        with flux_control.use([Condition(image(), "own")]):
            assert flux_control.run.cached


def test_mode_is_the_adapters_own(flux_control, tmp_path):
    info = AdapterInfo(mode="independent")
    flux_control.load(lora_file(tmp_path / "own.safetensors", flux_control.transformer, info=info))
    with flux_control.use([Condition(image(), "own")]):
        assert flux_control.run.cached
    with flux_control.use([Condition(image(), "canny")]):
        assert not flux_control.run.cached
    mixed = [Condition(image(), "own"), Condition(image(1), "canny")]
    same(used(flux_control, *mixed), used(flux_control, *mixed, cache=False))
    with pytest.raises(ValueError, match="not trained independently"), flux_control.use(mixed[1:], cache=True):
        pass


# Image guidance, completion, main adapter


@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_image_guidance_extrapolates_from_black(control, mode):
    condition = Condition(image(), "canny")
    black = Condition(torch.zeros(3, SIZE, SIZE), "canny")
    call = {"num_inference_steps": 1}
    a, b = (used(control, one, mode=mode, call=call) for one in (condition, black))
    got = used(control, condition, mode=mode, call=call, image_guidance_scale=2.0)
    same(got, b + 2.0 * (a - b), 1e-4)


def known_mask():
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1:3, 1:4] = False
    return mask


def test_completion_keeps_what_is_known(control):
    condition = Condition(image(), "canny", mask=known_mask(), complement=True)
    with control.use([condition]):
        known = control.run.known()
        got = make(control.pipe)
    from imgdit.models.functional import pack

    tokens = pack(got, 2) if got.ndim == 4 else got
    keep = known_mask().flatten()
    same(tokens[:, keep], known[:, keep], 1e-4)
    differs(tokens[:, ~keep], used(control, Condition(image(1), "canny", mask=known_mask(), complement=True))[
        :, ~keep] if got.ndim == 3 else pack(make(control.pipe), 2)[:, ~keep])  # fmt: skip


def test_completion_in_a_stock_pipeline_is_the_pipeline_classes(tmp_path):
    """With a schedule that does not count tokens, sampling a part and filling in velocities are the same."""
    pipe = flux()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer))
    condition = Condition(image(), "canny", mask=known_mask(), complement=True)
    expected = used(control, condition)
    ours = FluxOmniControlPipeline.from_pipe(pipe)
    ours.set_progress_bar_config(disable=True)
    same(make(ours, conditions=[condition]), expected, 1e-4)


def test_a_style_lora_acts_beside_conditions_loaded_before_or_after(tmp_path):
    results = []
    for first in ("style", "canny"):
        pipe = flux()
        control = OmniControl(pipe)
        style = lora_file(tmp_path / "style.safetensors", pipe.transformer, STYLE_TARGETS, seed=4)
        canny = lora_file(tmp_path / "canny.safetensors", pipe.transformer)
        plain = make(pipe)
        load = {
            "style": lambda pipe=pipe, style=style: pipe.load_lora_weights(str(style), adapter_name="style"),
            "canny": lambda control=control, canny=canny: control.load(canny),
        }
        load[first]()
        load[{"style": "canny", "canny": "style"}[first]]()
        styled = make(pipe)
        differs(styled, plain)
        both = used(control, Condition(image(), "canny"))
        differs(both, styled)
        differs(both, used(control, Condition(image(), "canny"), main_adapter=()))
        assert torch.equal(both, used(control, Condition(image(), "canny"), main_adapter="style"))
        control.remove()
        assert torch.equal(make(pipe), styled)
        results.append(both)
    same(*results)


# With what else a pipeline may have on


def test_from_pipe_saving_and_other_pipelines(flux_control, tmp_path):
    pipe = flux_control.pipe
    condition = Condition(image(), "canny")
    for cls, extra in (
        (FluxImg2ImgPipeline, {"image": image(2)[None], "strength": 0.7}),
        (
            FluxInpaintPipeline,
            {"image": image(2)[None], "mask_image": torch.ones(1, 1, SIZE, SIZE), "strength": 0.8},
        ),
        (FluxKontextPipeline, {"image": image(2)[None], "_auto_resize": False, "max_area": SIZE**2}),
    ):
        other = cls.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        plain = make(other, **extra)
        with flux_control.use([condition]):
            differs(make(other, **extra), plain)
        own = OmniControl(other)
        with own.use([condition]):
            differs(make(other, **extra), plain)
        own.remove()
        assert torch.equal(make(other, **extra), plain)
    differs(used(flux_control, condition), make(pipe))
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "transformer" / "config.json").exists()


def test_controlnet_residuals_are_padded(flux_control):
    model, pipe = flux_control.transformer, flux_control.pipe
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        "txt_ids": torch.zeros(5, 3),
    }
    residuals = {
        "controlnet_block_samples": [torch.randn(1, 16, 32) for _ in range(2)],
        "controlnet_single_block_samples": [torch.randn(1, 16, 32)],
    }
    zeros = {name: [torch.zeros_like(x) for x in values] for name, values in residuals.items()}
    with torch.no_grad(), flux_control.use([Condition(image(), "canny")]):
        plain = model(**inputs).sample
        assert torch.equal(model(**inputs, **zeros).sample, plain)
        differs(model(**inputs, **residuals).sample, plain)


@pytest.mark.parametrize("when", ["before", "after"])
def test_first_block_cache(when, tmp_path):
    pipe = flux()
    if when == "before":
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer))
    if when == "after":
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    conditions = [Condition(image(), "canny", end=0.7)]
    cached = used(control, *conditions)
    independent = used(control, *conditions, mode="independent")
    with pytest.raises(ValueError, match="image guidance"):
        used(control, *conditions, image_guidance_scale=2.0)
    pipe.transformer._reset_stateful_cache()
    pipe.transformer.disable_cache()
    same(cached, used(control, *conditions))
    same(independent, used(control, *conditions, mode="independent"))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    differs(used(control, *conditions), cached, 1e-6)
    control.remove()
    pipe.transformer.disable_cache()
    assert torch.equal(make(pipe), make(flux()))


def test_removal_from_under_a_cache_leaves_the_cache(tmp_path):
    pipe, expected = flux(), flux()
    control = OmniControl(pipe)
    for one in (pipe, expected):
        one.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    control.remove()
    assert torch.equal(make(pipe), make(expected))
    differs(make(pipe), make(flux()), 1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(when, kind, tmp_path):
    expected = flux()
    reference = OmniControl(expected)
    file = lora_file(tmp_path / "canny.safetensors", expected.transformer)
    reference.load(file)
    pipe = flux()
    device = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def offload():
        pipe.transformer.enable_group_offload(device, device, offload_type=kind, **blocks)

    if when == "before":
        offload()
    control = OmniControl(pipe)
    control.load(file)
    if when == "after":
        offload()
    order = [list(HookRegistry.check_if_exists_or_initialize(b).hooks) for b in pipe.transformer.transformer_blocks]
    condition = Condition(image(), "canny")
    same(used(control, condition), used(reference, condition))
    hooks = pipe.transformer.transformer_blocks[0]._diffusers_hook._hook_order
    assert hooks[0] == "imgdit_condition", order


def test_compiled_blocks(flux_control):
    condition = Condition(image(), "canny")
    expected = used(flux_control, condition)
    flux_control.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    same(used(flux_control, condition), expected)
    plain = make(flux_control.pipe)
    differs(plain, expected)


def test_hot_swap_replaces_in_place(flux_control, tmp_path):
    condition = Condition(image(), "canny")
    other = lora_file(tmp_path / "other.safetensors", flux_control.transformer, seed=9)
    flux_control.load(other)
    expected = used(flux_control, Condition(image(), "other"))
    first = used(flux_control, condition)
    layers = [layer for layer in flux_control.transformer.modules() if hasattr(layer, "lora_A")]
    weights = [layer.lora_A["canny"].weight for layer in layers]
    with flux_control.use([condition], mode="independent"):
        make(flux_control.pipe)
        flux_control.load(other, adapter_name="canny", hotswap=True)
        swapped = make(flux_control.pipe)
    same(used(flux_control, condition), expected)
    same(swapped, used(flux_control, Condition(image(), "other"), mode="independent"))
    differs(first, expected)
    after = [layer.lora_A["canny"].weight for layer in layers]
    assert all(a is b for a, b in zip(weights, after))


def test_quantised_base_layers(flux_control):
    torchao = pytest.importorskip("torchao.quantization")
    expected = used(flux_control, Condition(image(), "canny"))
    torchao.quantize_(
        flux_control.transformer,
        torchao.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name.endswith("base_layer"),
    )
    got = used(flux_control, Condition(image(), "canny"))
    assert 0 < (got - expected).abs().max() < 0.2


def test_batches_and_several_images_per_prompt(flux_control):
    pipe = flux_control.pipe
    condition = Condition(image(), "canny")
    with flux_control.use([condition]):
        both = make(pipe, num_images_per_prompt=2)
        noise = pipe.prepare_latents(2, 4, SIZE, SIZE, torch.float32, "cpu", torch.Generator().manual_seed(5))[0]
        single = make(pipe, latents=noise[1:])
    same(both[1:], single)


@pytest.mark.parametrize("cls", [FluxOmniControlPipeline, StableDiffusion3OmniControlPipeline])
def test_pipeline_classes(cls, tmp_path):
    stock, targets = (flux(), {}) if cls is FluxOmniControlPipeline else (sd3(), {"targets": SD3_TARGETS})
    plain = make(stock)
    file = lora_file(tmp_path / "canny.safetensors", stock.transformer, **targets)
    stock.save_pretrained(tmp_path / "pipe")
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    names += () if cls is FluxOmniControlPipeline else ("text_encoder_3", "tokenizer_3")
    for pipe in (cls.from_pipe(stock), cls.from_pretrained(tmp_path / "pipe", **dict.fromkeys(names))):
        pipe.set_progress_bar_config(disable=True)
        same(make(pipe), plain)
        pipe.load_control(file)
        same(make(pipe), plain)
        got = make(pipe, conditions=[Condition(image(), "canny")])
        differs(got, plain)
        assert torch.equal(make(pipe, conditions=Condition(image(), "canny")), got)
        pipe.control.remove()


# Bad input


REFUSED = {
    "an adapter that is not loaded": ({"adapter": "cany"}, {}, "'cany' is not loaded; loaded are: canny, depth"),
    "a mask of another size": ({"mask": torch.ones(3, 5)}, {}, "4x4 tokens .* 16x16 pixels"),
    "a mask of nothing": ({"mask": torch.zeros(4, 4)}, {}, "leaves no token"),
    "a placed image of odd size": (
        {"image": torch.rand(3, 18, 16), "position": (0, 4)},
        {},
        "multiple of 4 pixels.*resize it to 16x16",
    ),
    "an image beyond its range": ({"image": torch.rand(3, 16, 16) * 255}, {}, r"values in \[0, 1\]"),
    "no image": ({"image": "edges.png"}, {}, "PIL image, an array or a tensor, got str"),
    "an unknown main adapter": ({}, {"main_adapter": "style"}, "'style' is not loaded"),
    "an unknown mode": ({}, {"mode": "alone"}, "mode must be one of 'joint', 'independent'"),
    "a cache in joint mode": ({}, {"cache": True}, "not trained independently"),
    "a region without complement": ({}, {"region": torch.ones(4, 4)}, "complement=True"),
    "nothing to generate": ({"mask": torch.ones(4, 4), "complement": True}, {}, "nothing to generate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_leaves_the_pipeline_as_it_was(flux_control, case):
    changes, options, message = REFUSED[case]
    before = make(flux_control.pipe)
    condition = Condition(**{"image": image(), "adapter": "canny", **changes})
    with pytest.raises(ValueError, match=message), flux_control.use([condition], **options):
        pytest.fail("use() began")
    assert torch.equal(make(flux_control.pipe), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 0.6, "end": 0.5}, "start <= end"),
        ({"strength": -0.1}, "strength must be 0 or more"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"position": "left"}, "'aligned', 'subject'"),
        ({"position": (1, 2, 3)}, "'aligned', 'subject'"),
        ({"adapter": ""}, "expected its name"),
        ({"complement": True}, "needs mask="),
        ({"complement": True, "mask": known_mask(), "position": "subject"}, "position='aligned'"),
        ({"complement": True, "mask": known_mask(), "strength": 0.0}, "strength=0"),
    ],
)
def test_a_condition_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Condition(**{"image": image(), "adapter": "canny", **changes})


def test_refused_combinations(flux_control):
    pipe, model = flux_control.pipe, flux_control.transformer
    condition = Condition(image(), "canny")
    with pytest.raises(ValueError, match="remove"):
        copy.deepcopy(model)
    with flux_control.use([condition]):
        with pytest.raises(ValueError, match="in use already"), flux_control.use([condition]):
            pass
        with pytest.raises(ValueError, match="IP-Adapter"):
            make(pipe, joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1)]})
        with pytest.raises(ValueError, match="leave the `with`"):
            flux_control.remove()
    model.set_adapters(["canny"])
    model.fuse_lora(adapter_names=["canny"])
    with pytest.raises(ValueError, match="'canny' is fused"), flux_control.use([condition]):
        pass
    model.unfuse_lora()
    model.disable_lora()
    with pytest.raises(ValueError, match="Call enable_lora"), flux_control.use([condition]):
        pass
    model.enable_lora()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv"), flux_control.use([condition]):
        pass
    model.unfuse_qkv_projections()
    model._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"), flux_control.use([condition]):
        pass
    model._parallel_config = None
    flux_control.remove()
    with pytest.raises(ValueError, match="was removed"), flux_control.use([]):
        pass


def test_only_flux_and_sd3_transformers():
    class Other:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"FluxTransformer2DModel or SD3Transformer2DModel.*, got Other with Linear"):
        omni_control.OmniControl(Other())
