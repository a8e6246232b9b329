"""The references of stock models as conditions: the same image as the stock pipeline on joined tokens."""

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from PIL import Image
from tiny_control import image, lora_file, sd3
from tiny_flux2 import flux2

from imgdit import Condition, Frame, OmniControl, References
from imgdit.lora.files import AdapterInfo

KINDS = {"dev": Flux2Pipeline, "klein": Flux2KleinPipeline}
EVERY_LAYER = (
    r"x_embedder|context_embedder|proj_out|norm_out\.linear|.*_modulation(_img|_txt)?\.linear|.*linear_(in|out|1|2)"
    r"|.*attn\.(to_[qkv]|to_out(\.0)?|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)"
)
NATIVE = {"position": (0, 0), "level": "image", "acts_on": "all"}


def photo(seed, size=64):
    return Image.fromarray((image(seed, size).permute(1, 2, 0) * 255).byte().numpy())


@pytest.fixture(params=KINDS)
def control(request, tmp_path):
    return loaded(KINDS[request.param], tmp_path)


@pytest.fixture
def klein(tmp_path):
    return loaded(Flux2KleinPipeline, tmp_path)


def loaded(kind, tmp_path):
    pipe = flux2(kind)
    control = OmniControl(pipe)
    for seed, name in enumerate(("reference", "other")):
        path = lora_file(tmp_path / f"{name}.safetensors", pipe.transformer, EVERY_LAYER, seed=seed, std=0.1)
        control.load(path)
    return control


def make(pipe, **changes):
    generator = torch.Generator().manual_seed(3)
    names = ["prompt_embeds"] + (["negative_prompt_embeds"] if isinstance(pipe, Flux2KleinPipeline) else [])
    embeds = {name: torch.randn(1, 5, 24, generator=generator) for name in names}
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(5)
    return pipe(**embeds, **(options | changes), generator=generator, return_dict=False)[0]


def stock(control, *adapters, **call):
    """The plain pipeline with adapters active."""
    model = control.transformer
    model.set_adapters(list(adapters)) if adapters else model.disable_adapters()
    try:
        return make(control.pipe, **call)
    finally:
        model.enable_adapters()
        for module in model.modules():
            if hasattr(module, "set_adapter") and hasattr(module, "lora_A"):
                module.set_adapter([])


def used(control, *conditions, **options):
    with control.use(conditions, **options):
        return make(control.pipe)


def near(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


def differs(a, b, least=1e-3):
    assert (a - b).abs().max() > least


def test_references_as_conditions_are_the_stock_models(control):
    photos = [photo(1), photo(2, 80)]
    plain = make(control.pipe)
    expected = stock(control, "reference", image=photos)
    conditions = [Condition(one, "reference", index=10.0 + 10 * i, **NATIVE) for i, one in enumerate(photos)]
    got = used(control, *conditions)
    near(got, expected)
    differs(got, plain)
    near(used(control, *conditions, main_adapter="reference"), expected)  # which acts once all the same
    assert torch.equal(make(control.pipe), plain)


def test_adapters_of_several_references_act_on_all_tokens(control):
    photos = [photo(1), photo(2)]
    conditions = [
        Condition(one, name, index=10.0 + 10 * i, **NATIVE)
        for i, (one, name) in enumerate(zip(photos, ("reference", "other"), strict=True))
    ]
    near(used(control, *conditions), stock(control, "reference", "other", image=photos))


def test_a_style_lora_acts_on_references_too(klein):
    condition = Condition(photo(1), "reference", index=10.0, **NATIVE)
    got = used(klein, condition, main_adapter="other")
    near(got, stock(klein, "reference", "other", image=[photo(1)]))
    differs(got, used(klein, condition))


def test_settings_come_from_the_file(klein, tmp_path):
    info = AdapterInfo(index=10.0, level="image", acts_on="all", prompt_prefix="Depth. ")
    path = lora_file(tmp_path / "kept.safetensors", klein.transformer, EVERY_LAYER, seed=0, std=0.1, info=info)
    assert klein.load(path).info == info
    got = used(klein, Condition(photo(1), "kept"))  # fitted to the image, which is of its size
    near(got, stock(klein, "kept", image=[photo(1)]))
    differs(got, used(klein, Condition(photo(1), "kept", index=0.0)))
    differs(got, used(klein, Condition(photo(1), "kept", level="clean")))
    differs(got, used(klein, Condition(photo(1), "kept", acts_on="condition")))
    klein.save(tmp_path / "again.safetensors", "kept")
    assert klein.load(tmp_path / "again.safetensors").info == info


def test_its_adapter_acts_while_the_condition_does(klein):
    plain = make(klein.pipe)
    settings = NATIVE | {"index": 10.0}
    for change in ({"strength": 0.0}, {"end": 0.0}):
        assert torch.equal(used(klein, Condition(photo(1), "reference", **(settings | change))), plain)
    half = used(klein, Condition(photo(1), "reference", **settings, end=0.5))
    differs(half, plain)
    differs(half, used(klein, Condition(photo(1), "reference", **settings)))
    klein.remove()
    assert torch.equal(make(klein.pipe), plain)


def test_keys_of_clean_references_that_see_themselves_are_cached(klein):
    conditions = [Condition(photo(1), "reference", index=10.0, acts_on="all")]
    conditions += [Condition(photo(2), "other", level="image")]
    computed = used(klein, *conditions, mode="independent", cache=False)
    near(used(klein, *conditions, mode="independent"), computed)
    with pytest.raises(ValueError, match="at its noise level on the step"):
        used(klein, conditions[1], mode="independent", cache=True)
    alone = conditions[0]
    klein.transformer.set_adapters(["other"])  # reads the first condition as well, so its keys are other ones
    with klein.use(alone, mode="independent"):
        styled = make(klein.pipe)
        for layer in klein.transformer.modules():
            if "other" in getattr(layer, "scaling", {}):
                layer.scaling["other"] = 0.0
        plain = make(klein.pipe)
    near(plain, used(klein, alone, mode="independent", cache=False))
    differs(styled, plain)


def test_centred_conditions_have_their_middle_over_the_images(klein):
    def placed(position, size=32):
        return used(klein, Condition(photo(1, size), "other", position=position))

    assert torch.equal(placed("centred"), placed((4, 4)))  # 16 tokens a side, and 8
    assert torch.equal(placed("centred", 96), placed((-4, -4), 96))
    differs(placed("centred"), placed((3, 4)))


BAD = [
    ({"index": float("nan")}, "index is the first position coordinate"),
    ({"level": "noisy"}, "level"),
    ({"acts_on": "text"}, "acts_on"),
    ({"level": "image", "complement": True, "mask": torch.eye(4).bool()}, "level='image'"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Condition(photo(1), "reference", **wrong)


def test_one_adapter_acts_in_one_way(klein):
    conditions = [Condition(photo(1), "other", acts_on=one) for one in ("all", "condition")]
    with pytest.raises(ValueError, match="give its conditions the same acts_on"), klein.use(conditions):
        pass


# The pipelines' own references


def biased(control, bias, **call):
    """The plain pipeline with something added to the logits of every attention, by diffusers' own mask."""

    def add(module, args, kwargs):
        return args, kwargs | {"joint_attention_kwargs": {"attention_mask": bias}}

    handle = control.transformer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        return make(control.pipe, **call)
    finally:
        handle.remove()


def bias_of(*lengths, logs):
    """(S, S): the sum of the logarithms of two segments, nothing within one; text and image have 0."""
    rows = torch.tensor([0.0, 0.0, *logs])
    table = rows[:, None] + rows[None, :]
    table.fill_diagonal_(0.0)
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return table[segment][:, segment]


def referenced(control, call, *args, **settings):
    with control.references(*args, **settings):
        return make(control.pipe, **call)


TWO = {"image": [photo(1), photo(2, 80)]}  # 256 tokens of text 5 + image 256, references 256 and 400


def test_strength_of_references_is_a_bias(control):
    plain = make(control.pipe, **TWO)
    for strength in (0.3, 2.0, [0.5, 3.0]):
        each = strength if isinstance(strength, list) else [strength] * 2
        expected = biased(control, bias_of(5, 256, 256, 400, logs=torch.tensor(each).log()), **TWO)
        got = referenced(control, TWO, strength)
        near(got, expected)
        differs(got, plain)


def test_references_of_strength_1_are_the_stock_models_and_of_0_left_out(klein):
    plain = make(klein.pipe, **TWO)
    assert torch.equal(referenced(klein, TWO), plain)
    near(referenced(klein, TWO, 0.0), make(klein.pipe))
    near(referenced(klein, TWO, [1.0, 0.0]), make(klein.pipe, image=TWO["image"][:1]))
    differs(referenced(klein, TWO, [0.0, 1.0]), make(klein.pipe, image=TWO["image"][1:]))  # the second stays it
    assert torch.equal(make(klein.pipe, **TWO), plain)
    klein.remove()
    assert torch.equal(make(klein.pipe, **TWO), plain)


def test_masked_tokens_of_references_are_left_out(klein):
    mask = torch.zeros(64, 64)
    mask[:24, 8:] = 1.0
    one = {"image": [photo(1)]}
    absent = torch.zeros(256 + 261, dtype=torch.bool)
    absent[261:] = ~(mask[::4, ::4] > 0).flatten()
    bias = torch.zeros(517, 517).masked_fill(absent[None, :], -1e9)
    near(referenced(klein, one, mask=mask), biased(klein, bias, **one))
    near(referenced(klein, TWO, mask=[mask, None]), referenced(klein, TWO, [1.0, 1.0], mask=[mask[::4, ::4], None]))


def test_references_act_between_start_and_end(klein):
    plain, without = make(klein.pipe, **TWO), make(klein.pipe)
    half = referenced(klein, TWO, end=0.5)
    differs(half, plain)
    differs(half, without)
    near(referenced(klein, TWO, end=0.0), without)

    def first(settings):
        seen = []
        call = TWO | {"callback_on_step_end": lambda pipe, step, t, tensors: seen.append(tensors["latents"]) or {}}
        referenced(klein, call, **settings)
        return seen[0]

    assert torch.equal(first({"end": 0.5}), first({}))  # the stock model's step
    near(first({"start": 0.5}), first({"strength": 0.0}))


def test_references_beside_conditions(klein):
    condition = Condition(photo(3), "other")
    one = {"image": [photo(1)]}
    with klein.use(condition, references=References(0.0)):
        left_out = make(klein.pipe, **one)
    near(left_out, used(klein, condition))
    with klein.use(condition, references=References(0.4)):
        weak = make(klein.pipe, **one)
    with klein.use(condition):
        full = make(klein.pipe, **one)
    differs(weak, full)
    differs(weak, left_out)


def test_a_step_cache_keeps_references_in_the_sequence(klein):
    one = {"image": [photo(1)], "num_inference_steps": 4}
    expected = referenced(klein, one, 0.5, end=0.5)
    settings = References(0.5, end=0.5)
    kept = settings.seen([Frame((16, 16))], 4, acting=False, keep=True)
    assert kept.hidden and kept.present.all() and kept.changes
    hook = klein.transformer._diffusers_hook.hooks[klein._name]
    hook._step_cache = lambda module: True
    near(referenced(klein, one, 0.5, end=0.5), expected)


WRONG = [
    ({"strength": -1.0}, "strength must be 0 or more"),
    ({"start": 0.7, "end": 0.2}, "0 <= start <= end <= 1"),
    ({"strength": [1.0, 0.5, 0.2]}, "3 values for the 2 reference image"),
    ({"mask": [None, None, None]}, "3 values for the 2 reference image"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_of_references_are_checked(klein, settings, message):
    with pytest.raises(ValueError, match=message):
        referenced(klein, TWO, **settings)


def test_a_call_without_references_is_told(klein):
    with pytest.raises(ValueError, match="this call has none"):
        referenced(klein, {}, 0.5)
    with pytest.raises(ValueError, match="takes no reference images"), OmniControl(sd3()).references(0.5):
        pass
