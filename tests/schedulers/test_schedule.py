"""Which schedulers of diffusers lead from noise to data in a pipeline of ours, and what is refused."""

import inspect

import diffusers
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift as flux_shift

from imgdit import MultiFrameFlowMatchScheduler
from imgdit.schedulers.flow_match import calculate_shift, linear_sigmas
from imgdit.schedulers.schedule import WORKING, check_schedule, set_schedule, step_options

# diffusers' schedulers hand tensors to NumPy in a way that NumPy 2 no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CASES = {
    "ours": (MultiFrameFlowMatchScheduler, {"shift": 3.0}),
    "euler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "euler, dynamic": (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
    "euler, stochastic": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    "heun": (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    "lcm": (FlowMatchLCMScheduler, {}),
    "lcm, dynamic": (FlowMatchLCMScheduler, {"use_dynamic_shifting": True}),
    "unipc": (UniPCMultistepScheduler, FLOW),
    "unipc, shifted": (UniPCMultistepScheduler, {**FLOW, "flow_shift": 3.0}),
    "unipc, dynamic": (UniPCMultistepScheduler, {**FLOW, "use_dynamic_shifting": True}),
    "dpm++": (DPMSolverMultistepScheduler, FLOW),
    "dpm++, dynamic": (DPMSolverMultistepScheduler, {**FLOW, "use_dynamic_shifting": True}),
    "dpm++, stochastic": (DPMSolverMultistepScheduler, {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++ single": (DPMSolverSinglestepScheduler, {**FLOW, "flow_shift": 3.0}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (2, 3, 4, 6, 6)], ids=["images", "frames"])
@pytest.mark.parametrize("steps", [1, 6])
def test_the_true_velocity_leads_to_the_data(name, shape, steps):
    """With as many steps as asked for, twice in a row, whatever the solver."""
    kind, options = CASES[name]
    scheduler = kind(**options)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(shape, generator=generator)
    for _ in range(2):
        check_schedule(scheduler, steps)
        timesteps = set_schedule(scheduler, steps, None, 64)
        assert len(timesteps) == (2 * steps - 1 if scheduler.order == 2 else steps) == len(scheduler.sigmas) - 1
        x = torch.randn(shape, generator=generator)
        for i, t in enumerate(timesteps):
            velocity = (x - data) / scheduler.sigmas[i]
            x = scheduler.step(velocity, t, x, **step_options(scheduler, generator), return_dict=False)[0]
        torch.testing.assert_close(x, data, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["euler", "lcm", "unipc, shifted"])
def test_who_takes_noise_levels_gets_the_same_ones(name):
    kind, options = CASES[name]
    scheduler, expected = kind(**{**options, "flow_shift" if "unipc" in name else "shift": 3.0}), None
    set_schedule(scheduler, 5, None, 64)
    expected = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected.set_timesteps(sigmas=linear_sigmas(5))
    torch.testing.assert_close(scheduler.sigmas, expected.sigmas, atol=2e-6, rtol=0)
    set_schedule(scheduler, 28, [1.0, 0.4], 64)
    assert len(scheduler.timesteps) == 2


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_solver_takes_over_the_shift_of_the_model(kind):
    """diffusers drops `shift` when it makes a solver from the configuration of a flow-matching scheduler."""
    model = MultiFrameFlowMatchScheduler(shift=3.0).config
    scheduler, told = kind.from_config(model, **FLOW), kind.from_config(model, **FLOW, flow_shift=2.0)
    for one, shift in ((scheduler, 3.0), (told, 2.0)):
        set_schedule(one, 4, None, 64)
        expected = kind(**FLOW, flow_shift=shift)
        set_schedule(expected, 4, None, 64)
        assert torch.equal(one.sigmas, expected.sigmas)


def test_the_shift_counts_tokens_as_flux_does():
    for tokens in (64, 256, 1000, 4096):
        assert calculate_shift({"use_dynamic_shifting": True}, tokens) == pytest.approx(flux_shift(tokens))
    config = {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 1.2, "max_image_seq_len": 1256}
    assert calculate_shift(config, 756) == pytest.approx(0.7)
    assert calculate_shift({"shift": 3.0}, 256) is None


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (DPMSolverMultistepScheduler(), "prediction_type='epsilon'"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "prediction_type='epsilon'"),
        (DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True), "noise levels go from 157"),
        (DEISMultistepScheduler(**FLOW), "noise levels go from 0.999 to"),
        (UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"), "expected from at most 1 down to 0"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "noise levels go from 0 to 1"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), "not 1000 times its noise levels"),
        (
            FlowMatchHeunDiscreteScheduler.from_config(MultiFrameFlowMatchScheduler(use_dynamic_shifting=True).config),
            "its shift is one number",
        ),
    ],
)
def test_others_are_refused_with_the_names_of_those_that_work(scheduler, reason):
    with pytest.raises(ValueError, match="is no flow-matching schedule") as caught:
        check_schedule(scheduler, 4)
    assert reason in str(caught.value) and WORKING in str(caught.value)


def _schedulers_of_diffusers():
    for name in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, name)
        if inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin) and hasattr(kind, "set_timesteps"):
            required = [p for p in inspect.signature(kind).parameters.values() if p.default is inspect.Parameter.empty]
            if not required:
                yield kind


@pytest.mark.parametrize("kind", list(_schedulers_of_diffusers()), ids=lambda kind: kind.__name__)
def test_every_scheduler_of_diffusers_works_or_is_refused(kind):
    """With its defaults; nothing but a ValueError escapes."""
    scheduler = kind()
    try:
        check_schedule(scheduler, 4)
    except ValueError as error:
        assert WORKING in str(error)
        return
    data, x = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for i, t in enumerate(set_schedule(scheduler, 4, None, 64)):
        velocity = (x - data) / scheduler.sigmas[i]
        x = scheduler.step(velocity, t, x, **step_options(scheduler, None), return_dict=False)[0]
    torch.testing.assert_close(x, data, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("steps", "sigmas", "message"),
    [
        (0, None, "whole number and at least 1, got 0"),
        (2.5, None, r"at least 1, got 2\.5"),
        (4, [0.2, 0.5, 1.0], "fall from at most 1"),
        (4, [1.0, 0.5, 0.5], "must fall at every step"),
        (4, [1.5, 0.5], "fall from at most 1"),
        (4, [1.0, 0.0], "to more than 0"),
        (4, [1.0, float("nan")], "fall from at most 1"),
        (4, [], "fall from at most 1"),
    ],
)
def test_steps_and_noise_levels(steps, sigmas, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(MultiFrameFlowMatchScheduler(), steps, sigmas)


def test_noise_levels_for_a_scheduler_that_takes_none():
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler chooses its noise levels itself"):
        check_schedule(FlowMatchHeunDiscreteScheduler(), 4, [1.0, 0.5])
