"""Few-step students: the teacher's path, the line over a part of it, and the objective."""

import dataclasses

import pytest
import torch
from peft import LoraConfig
from tiny import rope_config, sincos_config, tiny_mmdit
from training.toy import batch

from imgdit import Frame, FrameLayout, MultiFrameFlowMatchScheduler
from imgdit.schedulers.flow_match import mix, velocity
from imgdit.training.batches import Batch
from imgdit.training.few_steps import guided_velocity, ode_path, path_levels, straight_line
from imgdit.training.objectives.few_steps import few_steps
from imgdit.training.recipe import load_recipe

SCHEDULER = MultiFrameFlowMatchScheduler(shift=2.0)
ONE = FrameLayout.build([Frame((2, 2))], 4)


def data(size=4, **changes) -> Batch:
    whole = batch(size)
    return dataclasses.replace(whole, tokens=whole.tokens[:, :4], layout=ONE, **changes)


def with_lora(model, std=0.0):
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["proj_out", "to_q"]), "trained")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std)
    return model.train()


def test_levels_of_the_path_are_those_of_a_pipeline():
    SCHEDULER.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    levels = path_levels(SCHEDULER, 12, 4)
    assert levels[::3] == pytest.approx(SCHEDULER.sigmas.tolist())
    assert levels[::3] == pytest.approx([1.0, 6 / 7, 2 / 3, 0.4, 0.0])


@pytest.mark.parametrize(("steps", "error"), [(8, 3e-2), (32, 2e-3)])
def test_the_path_is_of_second_order(steps, error):
    """dx/ds = x: the solution at 0 is x(1) / e."""
    levels = torch.linspace(1, 0, steps + 1).expand(2, -1)
    path = ode_path(lambda x, s: x, torch.ones(2, 3, 1), levels)
    assert path.shape == (2, steps + 1, 3, 1)
    assert (path[:, -1] - torch.tensor(-1.0).exp()).abs().max() < error * 0.37


def test_flow_matching_on_the_line_is_one_euler_step():
    before, after = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    level, then = torch.tensor([[0.9], [0.5]]), torch.tensor([[0.4], [0.0]])
    clean, noise = straight_line(before, after, level, then)
    torch.testing.assert_close(mix(clean, noise, level, (4,)), before)
    torch.testing.assert_close(before + (then - level)[..., None] * velocity(clean, noise), after)


def test_guidance_extrapolates_from_the_empty_text():
    model, one = tiny_mmdit(), data()
    sigmas = torch.full((4, 1), 0.5)

    def found(scale, text=one.text):
        return guided_velocity(model, one.tokens, sigmas, text, one.empty, ONE, scale)

    empty = dataclasses.replace(
        one.text, embeddings=one.empty.embeddings.expand(4, -1, -1), pooled=one.empty.pooled.expand(4, -1)
    )
    with torch.no_grad():
        without, plain = found(1.0, empty), found(1.0)
        torch.testing.assert_close(found(3.0), without + 3 * (plain - without), atol=1e-5, rtol=1e-4)


def test_a_new_lora_has_nothing_to_learn_from_one_step_without_guidance():
    model = with_lora(tiny_mmdit())
    output = few_steps(model, SCHEDULER, data(), torch.Generator().manual_seed(0), substeps=1, guidance_scale=1.0)
    assert output.loss < 1e-10
    guided = few_steps(model, SCHEDULER, data(), torch.Generator().manual_seed(0), substeps=1)
    assert guided.loss > 1e-6


@pytest.mark.parametrize("config", [rope_config(), rope_config(guidance_embeds=True), sincos_config()])
def test_the_lora_learns_what_the_model_under_it_does(config):
    """In the shapes of FLUX.1, FLUX.1-dev and SD3; the teacher is the model without the LoRA, whatever that does."""
    model = with_lora(tiny_mmdit(config), std=0.3)
    found = few_steps(model, SCHEDULER, data(), torch.Generator().manual_seed(0))
    found.loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 2
    assert all(grad is not None and grad.abs().sum() > 0 for grad in trained.values())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    same_target = few_steps(model, SCHEDULER, data(), torch.Generator().manual_seed(0))
    assert same_target.loss < found.loss


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"steps": 0}, "at least 1, got 0"),
        ({"empty": None}, {}, "needs the empty text"),
    ],
)
def test_what_does_not_fit_is_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        few_steps(with_lora(tiny_mmdit()), SCHEDULER, data(**change), None, **options)


def test_a_model_without_lora_and_several_frames_are_refused():
    with pytest.raises(ValueError, match="set adapter"):
        few_steps(tiny_mmdit(), SCHEDULER, data(), None)
    with pytest.raises(ValueError, match="got 2 frames"):
        few_steps(with_lora(tiny_mmdit()), SCHEDULER, batch(2), None)


@pytest.mark.parametrize("name", ["scenes/few_steps", "own/few_steps"])
def test_the_packaged_recipes(name):
    assert load_recipe(name).adapter.rank == 12
