"""FLUX.3: conditions as the model's own reference images, against the stock call and a dense attention."""

import pytest
import torch
from tiny_control import image, lora_file
from tiny_families import differs, near, random
from tiny_flux3 import TARGETS, arguments, behind, dense, flux3

from imgdit import Condition, OmniControl
from imgdit.lora.files import activate


@pytest.fixture
def control(tmp_path):
    control = OmniControl(flux3())
    for seed, name in enumerate(("canny", "depth")):
        control.load(lora_file(tmp_path / f"{name}.safetensors", control.transformer, TARGETS, seed=seed, std=0.2))
    return control


@torch.no_grad()
def run(control, given=None):
    return control.transformer(**(given or arguments()))[0]


def under(control, *conditions, given=None, **options):
    """The result under conditions, and the conditions as they were encoded."""
    with control.use(conditions, **options):
        return run(control, given), control.run.conditions


def test_a_condition_is_a_reference_image_of_the_stock_call(control):
    """With an adapter that acts on all tokens; `index` counts the references."""
    given = arguments(references=1)
    conditions = [
        Condition(image(), "canny", acts_on="all", index=1),
        Condition(image(2), "canny", acts_on="all", index=2),
    ]
    got, riding = under(control, *conditions, given=given)
    activate(control.transformer, ["canny"])
    stock = given | {
        "image_cond_hidden_states": torch.cat(
            [given["image_cond_hidden_states"], *(item.tokens for item in riding)], 1
        ),
        "image_cond_ids": torch.cat([behind(0), behind(1), behind(2)]),
    }
    near(got, run(control, stock))
    activate(control.transformer, [])
    differs(got, run(control, given))


@pytest.mark.parametrize("references", [0, 1])
@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_conditions_equal_a_dense_attention(control, references, mode):
    conditions = [Condition(image(), "canny", strength=0.6), Condition(image(2), "depth", index=1)]
    given = arguments(references=references)
    plain = run(control, given)
    with control.use(conditions, mode=mode):
        got = [run(control, given), run(control, given)]  # the second reads the cache in independent mode
        expected = dense(control.transformer, given, control.run.conditions)
    for one in got:
        near(one, expected)
    differs(got[0], plain)
    assert torch.equal(run(control, given), plain)
    near(plain, dense(control.transformer, given, ()))
    with control.use([Condition(image(), "canny", strength=0.0)]):
        assert torch.equal(run(control, given), plain)
    control.remove()
    assert torch.equal(run(control, given), plain)


def test_a_mask_and_the_references_settings(control):
    """What is left out of a reference is left out of the stock call; a strength is a bias."""
    given, mask = arguments(references=2), torch.ones(4, 4, dtype=torch.bool)
    mask[:, 2:] = False
    kept = torch.cat([mask.flatten(), torch.ones(16, dtype=torch.bool)])
    cut = given | {name: given[name][..., kept, :] for name in ("image_cond_hidden_states", "image_cond_ids")}
    none = arguments()
    for settings, stock in (({"mask": [mask, None]}, cut), ({"strength": 0.0}, none)):
        with control.references(**settings):
            near(run(control, given), run_plain(stock))
    with control.references(strength=[0.3, 1.5]):
        near(run(control, given), dense(control.transformer, given, (), strengths=(0.3, 1.5)))
    with control.references():
        assert torch.equal(run(control, given), run_plain(given))
    masked, riding = under(control, Condition(image(), "canny", acts_on="all", mask=mask))
    activate(control.transformer, ["canny"])
    assert riding[0].tokens.shape[1] == 8
    stock = none | {"image_cond_hidden_states": riding[0].tokens, "image_cond_ids": behind(0)[mask.flatten()]}
    near(masked, run(control, stock))


@torch.no_grad()
def run_plain(given):
    """By a plain model of the same weights."""
    return flux3().transformer(**given)[0]


def test_blocks_of_text_and_references_are_computed_once(control):
    """Of a run, until its prompt, its references or an adapter change; the result is that of computing them."""
    calls = []
    for name in ("txt_mode_blocks.0", "mode_blocks.image_cond.1"):
        layer = control.transformer.get_submodule(f"{name}.ff.linear_in")
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    given = arguments(references=1)
    other = given | {"encoder_hidden_states": random(1, 5, 24, seed=9)}

    def fresh(given):
        return {name: value.clone() if torch.is_tensor(value) else value for name, value in given.items()}

    expected = [run(control, one) for one in (given, given | {"timestep": torch.tensor([0.3])}, other)]
    calls.clear()
    with control.references(cached=True):
        near(run(control, given), expected[0])
        near(run(control, fresh(given) | {"timestep": torch.tensor([0.3])}), expected[1])
        assert len(calls) == 2
        near(run(control, other), expected[2])
        assert len(calls) == 4
        activate(control.transformer, ["canny"])
        changed = run(control, given)
        assert len(calls) == 6
        activate(control.transformer, [])
        near(run(control, given), expected[0])
        assert len(calls) == 6
    activate(control.transformer, ["canny"])
    near(changed, run(control, given))
    with pytest.raises(ValueError, match="in this Flux3Transformer2DModel every block of the references does"):
        with OmniControl(flux3(flow_map=True)).references(cached=True):
            pass


def test_steps_are_counted(control):
    scheduler = control.pipe.scheduler
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    for step, time in enumerate(scheduler.timesteps.tolist()):
        scheduler._step_index = step
        given = arguments(timestep=time / 1000)
        plain = run(control, given)
        with control.use([Condition(image(), "canny", start=0.3, end=0.7)]):
            got = run(control, given)
        assert torch.equal(got, plain) == (step != 1)


def test_flow_maps_modulate_references_by_the_next_timestep(tmp_path):
    """Cached keys and values belong to one step then."""
    control = OmniControl(flux3(flow_map=True))
    control.load(lora_file(tmp_path / "canny.safetensors", control.transformer, TARGETS, std=0.2))
    with control.use([Condition(image(), "canny")], mode="independent"):
        got = [run(control, arguments() | {"target_timestep": torch.tensor([time])}) for time in (0.4, 0.2)]
    with control.use([Condition(image(), "canny")], mode="independent", cache=False):
        near(got[1], run(control, arguments() | {"target_timestep": torch.tensor([0.2])}))
    differs(*got)


def test_training_and_half_precision(control):
    weights = [p.requires_grad_() for name, p in control.transformer.named_parameters() if "lora_" in name]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            control.transformer.enable_gradient_checkpointing()
        with control.use([Condition(image(), "canny")]):
            loss = sum(control.transformer(**arguments(timestep=time))[0].square().sum() for time in (0.6, 0.3))
        found.append(torch.autograd.grad(loss, weights, allow_unused=True))
    assert all((a is b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sum(a is not None and bool(a.any()) for a in found[0]) > len(weights) / 4
    expected, _ = under(control, Condition(image(), "canny"), mode="independent")
    control.pipe.to(torch.bfloat16)
    given = {k: v.bfloat16() if torch.is_tensor(v) and "ids" not in k else v for k, v in arguments().items()}
    got, _ = under(control, Condition(image(), "canny"), given=given, mode="independent")
    near(got.float(), expected, 0.06)


@pytest.mark.slow
def test_compiled_blocks(control):
    torch._dynamo.reset()
    expected, _ = under(control, Condition(image(), "canny"))
    control.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    near(under(control, Condition(image(), "canny"))[0], expected)
    torch._dynamo.reset()


def test_what_is_refused(control):
    with pytest.raises(
        ValueError, match=r"level='image' cannot be had with a Flux3Transformer2DModel, whose reference"
    ):
        under(control, Condition(image(), "canny", level="image"))
    with pytest.raises(ValueError, match="complement=True cannot complete an image with a Flux3Transformer2DModel"):
        under(control, Condition(image(), "canny", complement=True, mask=torch.eye(4, dtype=torch.bool)))
    with pytest.raises(ValueError, match="references"), control.references(strength=0.5):
        run(control)
