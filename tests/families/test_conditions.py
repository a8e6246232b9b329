"""Conditions in the stock pipeline of every family: against a dense reference inside each pass, and with all that may
go along."""

import inspect

import pytest
import tiny_ernie_image
import tiny_flux2
import tiny_flux_kin
import tiny_ideogram4
import tiny_krea2
import tiny_qwen_image
import tiny_qwen_image21
import tiny_z_image
import torch
from safetensors.torch import load_file
from tiny_control import image, lora_file
from tiny_families import differs, loaded, make, near, passes, tensor, used

from imgdit import Condition, OmniControl
from imgdit.family import find_family
from imgdit.lora.files import read_adapter
from imgdit.mup import mup_table
from imgdit.sae.hooks import hooked

TINY = (tiny_flux2, tiny_flux_kin, tiny_qwen_image, tiny_z_image, tiny_krea2)
TINY += (tiny_qwen_image21, tiny_ideogram4, tiny_ernie_image)
CASES = {name: case for tiny in TINY for name, case in tiny.CASES.items()}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def control(case, tmp_path_factory):
    """For tests that leave the pipeline as it was."""
    return loaded(case, case.pipeline(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def fresh(case, tmp_path):
    """For tests that change it."""
    return loaded(case, case.pipeline(), tmp_path)


def test_the_reference_is_the_model(case, control):
    references = [] if case.references is None else [{"steps": 1, **case.references()}]
    for call in ({"steps": 1}, {"batch": 2, "steps": 1}, *references):
        for given, out in passes(case, control, call=call)[0]:
            near(case.dense(control.transformer, given), out)


ONE = [Condition(image(), "canny")]
SEVERAL = [Condition(image(), "canny"), Condition(image(1), "depth", position="subject")]
CONDITIONS = {
    "one": ONE,
    "several": SEVERAL,
    "weak, moved": [Condition(image(), "canny", strength=0.3, position=(1, 2))],
    "strong, compact": [Condition(image(size=8), "canny", scale=2.0, strength=3.0), Condition(image(1), "depth")],
    "part": [Condition(image(), "canny", mask=torch.eye(4).bool())],
}


@pytest.mark.parametrize("mode", ["joint", "independent"])
@pytest.mark.parametrize("conditions", CONDITIONS.values(), ids=CONDITIONS)
def test_conditions_equal_the_reference(case, control, conditions, mode):
    steps = 2 if mode == "independent" else 1  # in the second step keys come from the cache
    found, riding = passes(case, control, conditions, mode=mode, call={"steps": steps})
    assert len(found) == steps * case.calls
    for given, out in found:
        near(out, case.dense(control.transformer, given, riding))
    differs(out, case.dense(control.transformer, given))


@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_batches_and_the_pipelines_references(case, control, mode):
    calls = [([Condition([image(), image(1)], "canny")], {"batch": 2, "steps": 2})]
    if case.references is not None:
        calls.append((SEVERAL, {"steps": 2, **case.references()}))
    for conditions, call in calls:
        found, riding = passes(case, control, conditions, mode=mode, call=call)
        for given, out in found:
            near(out, case.dense(control.transformer, given, riding))


def test_start_and_end(case, control):
    found, riding = passes(case, control, [Condition(image(), "canny", start=0.3, end=0.7)])
    for number, (given, out) in enumerate(found):
        acts = number // case.calls == 1
        near(out, case.dense(control.transformer, given, riding if acts else ()))


# Identity, effect, removal


def test_nothing_changes_without_conditions_and_after_removal(case, tmp_path):
    pipe = case.pipeline()

    def run():
        return make(case, pipe, steps=1)

    plain = run()
    control = loaded(case, pipe, tmp_path)

    def under(*conditions):
        return used(case, control, *conditions, call={"steps": 1})

    assert torch.equal(run(), plain)
    assert torch.equal(under(Condition(image(), "canny", strength=0.0)), plain)
    assert torch.equal(under(Condition(image(), "canny", end=0.0)), plain)
    one = under(Condition(image(), "canny"))
    differs(one, plain)
    differs(one, under(Condition(image(1), "canny")))
    differs(one, under(Condition(image(), "depth")))
    assert torch.equal(run(), plain)
    control.remove()
    assert torch.equal(run(), plain)


@torch.no_grad()
def test_blocks_without_condition_tokens_are_the_models(case, control):
    """The family's functions on the model's own rows alone."""
    for given, out in passes(case, control, call={"batch": 2, "steps": 1})[0]:
        hook = control.transformer._diffusers_hook.hooks[control._name]
        with control.use(ONE):
            alone = hook._pass(control.transformer, control.run, dict(given), (), empty=False)[0]
        near(case.read(alone), out, 1e-6)


def test_cached_keys_equal_computed_ones(case, control):
    conditions = [Condition(image(), "canny"), Condition(image(1), "depth", strength=0.5, end=0.6)]
    computed = used(case, control, *conditions, mode="independent", cache=False)
    near(used(case, control, *conditions, mode="independent"), computed)
    differs(used(case, control, *conditions), computed, 1e-4)


def test_all_guidance_calls_share_a_cache(case, control):
    with control.use(Condition(image(), "canny"), mode="independent"):
        make(case, control.pipe, steps=2)
        assert len(control.run._kept.caches) == 1


def test_several_prompts_in_one_use(case, control):
    """In other numbers: each equals a use of its own."""
    calls = [{"steps": 1}, {"batch": 2, "steps": 1}]
    alone = [used(case, control, *ONE, call=call, mode="independent") for call in calls]
    with control.use(ONE, mode="independent"):
        for number in (0, 1, 0):
            near(make(case, control.pipe, **calls[number]), alone[number])


def test_image_guidance(case, control):
    condition, black = Condition(image(), "canny"), Condition(torch.zeros(3, 16, 16), "canny")
    runs = [
        passes(case, control, [one], call={"steps": 1}, **options)[0]
        for one, options in ((condition, {}), (black, {}), (condition, {"image_guidance_scale": 2.0}))
    ]
    for a, b, guided in ([tensor(out) for _, out in each] for each in zip(*runs, strict=True)):
        near(guided, b + 2.0 * (a - b), 1e-4)


def test_completion(case, control):
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1:3, 1:4] = False
    condition = Condition(image(), "canny", mask=mask, complement=True)
    for mode in ("joint", "independent") if case.completes else ():
        with control.use(condition, mode=mode):
            known, got = control.run.known(), make(case, control.pipe)
        if got.ndim == 3:
            near(got[:, mask.flatten()], known[:, mask.flatten()], 1e-4)
        assert got.isfinite().all()
    if case.references is not None or not case.completes:
        with pytest.raises(ValueError, match=r"no reference image|cannot complete"), control.use(condition):
            make(case, control.pipe, **(case.references() if case.references else {}))


def test_a_style_lora_acts_on_text_and_image_alone(case, fresh, tmp_path):
    style = lora_file(tmp_path / "style.safetensors", fresh.transformer, case.style, seed=4, std=0.2)

    def under(**options):
        return used(case, fresh, *ONE, call={"steps": 1}, **options)

    plain = under()
    fresh.transformer.load_lora_adapter(load_file(style), adapter_name="style")
    styled = under()
    differs(styled, plain)
    assert torch.equal(styled, under(main_adapter="style"))
    near(under(main_adapter=()), plain)


def test_the_calls_scale_of_adapters_is_a_weight_of_adapters(case, fresh, tmp_path):
    """Also in what blocks share, and for keys that are kept."""
    name = next(
        (one for one in inspect.signature(type(fresh.pipe).__call__).parameters if "attention_kw" in one), None
    )
    if name is None or "LongCat" in type(fresh.pipe).__name__:
        pytest.skip("the pipeline passes no scale on")
    style = lora_file(tmp_path / "style.safetensors", fresh.transformer, case.style, seed=4, std=0.2)
    fresh.transformer.load_lora_adapter(load_file(style), adapter_name="style")
    fresh.transformer.set_adapters(["style", "canny"], [0.8, 0.6])
    with fresh.use(ONE, mode="independent"):
        whole = make(case, fresh.pipe, steps=2)
        got = [make(case, fresh.pipe, steps=2, **{name: {"scale": scale}}) for scale in (0.5, 0.0)]
        near(make(case, fresh.pipe, steps=2), whole)
    for scale, one in zip((0.5, 0.0), got):
        fresh.transformer.set_adapters(["style", "canny"], [0.8 * scale, 0.6 * scale])
        near(one, used(case, fresh, *ONE, mode="independent", call={"steps": 2}))
        differs(one, whole)


def test_a_controlnets_residuals_are_added_to_the_image(case, control):
    if case.residuals is None:
        pytest.skip("the class takes no residuals")
    model = control.transformer
    given, _ = passes(case, control, call={"steps": 1})[0][0]
    added = given | case.residuals(model, given)
    with torch.no_grad(), control.use(SEVERAL):
        with_them, without = model(**added)[0], model(**given)[0]
        near(with_them, case.dense(model, added, control.run.conditions))
    differs(with_them, without)


# Precision, training, compilation


def test_bfloat16_is_near_float32(case, fresh):
    expected = used(case, fresh, *SEVERAL, mode="independent", call={"steps": 2})
    fresh.pipe.to(torch.bfloat16)
    got = used(case, fresh, *SEVERAL, mode="independent", call={"steps": 2})
    near(got.float(), expected, 0.06)


def test_gradients_under_checkpointing_are_those_without(case, fresh):
    """Also of two forward passes, at two noise levels, before one backward pass, beside the pipeline's references."""
    call = {} if case.references is None else case.references()
    (first, _), *_, (last, _) = passes(case, fresh, call={"steps": 2, **call})[0]
    weights = [p.requires_grad_() for name, p in fresh.transformer.named_parameters() if "lora_" in name]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            fresh.transformer.enable_gradient_checkpointing()
            fresh.transformer.train()
        with fresh.use(SEVERAL):
            loss = sum(tensor(fresh.transformer(**given)[0]).square().sum() for given in (first, last))
            found.append(torch.autograd.grad(loss, weights, allow_unused=True))
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sum(a is not None and bool(a.any()) for a in found[0]) > len(weights) / 2


def test_an_adapter_on_all_tokens_acts_as_if_it_were_in_the_weights(case, tmp_path):
    """In every layer, those that the model calls itself too."""
    pipe, merged = case.pipeline(), case.pipeline().transformer
    path = lora_file(tmp_path / "all.safetensors", pipe.transformer, ".*", std=0.05)
    for name, pair in read_adapter(path).pairs.items():
        weight = merged.get_submodule(name).weight
        weight.data += (pair.up.flatten(1) @ pair.down.flatten(1)).view_as(weight)
    control = OmniControl(pipe)
    control.load(path)
    found, riding = passes(case, control, [Condition(image(), "all", acts_on="all")], call={"steps": 1})
    for given, out in found:
        near(out, case.dense(merged, given, riding))
        differs(out, case.dense(merged, given))


QUICK = [name if case.compiled else pytest.param(name, marks=pytest.mark.slow) for name, case in CASES.items()]


@pytest.mark.parametrize("case", QUICK, indirect=True)
def test_compiled_blocks(case, tmp_path):
    torch._dynamo.reset()  # its limit of recompilations counts all models of a process
    control = OmniControl(case.pipeline())
    queries = rf"(?=.*(to_q|qkv))({case.targets})"  # tracing takes a second for a few layers with an adapter
    control.load(lora_file(tmp_path / "canny.safetensors", control.transformer, queries, std=0.2))
    expected = used(case, control, *ONE, call={"steps": 1})
    control.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    near(used(case, control, *ONE, call={"steps": 1}), expected)
    torch._dynamo.reset()


# Activations and roles


@pytest.mark.parametrize("conditions", [(), ONE], ids=["alone", "with a condition"])
def test_activation_hooks(case, control, conditions):
    call = {"steps": 1}
    expected = used(case, control, *conditions, call=call)
    for name in (f"transformer.{place}" for place in case.hookpoints):
        seen = []

        def same(tokens, seen=seen):
            seen.append(tokens)
            return tokens.values

        with control.use(conditions):
            with hooked(control.pipe, {name: same}):
                assert torch.equal(make(case, control.pipe, **call), expected)
            with hooked(control.pipe, {name: lambda tokens: tokens.values * 2}):
                differs(make(case, control.pipe, **call), expected)
        assert seen[0].values.shape[1] == 16 and seen[0].grids == ((4, 4),)


def test_every_parameter_has_a_role(case):
    assert {rule.role for rule in mup_table(case.pipeline().transformer)} >= {"input", "hidden", "output"}


def test_conditions_have_as_many_channels_as_the_image(control):
    pipe, tokens = control.pipe, find_family(control.transformer).tokens

    def encoded(generator=None):
        return tokens.encode(pipe.transformer, pipe.vae, image()[None] * 2 - 1, generator)

    assert encoded().shape == (1, 16, tokens.channels(pipe.transformer))
    drawn = [encoded(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    differs(drawn[0], drawn[2], 1e-6)
