"""The schedule of a run under any flow-matching scheduler, ours or diffusers'.

Schedulers differ in what `set_timesteps` and `step` take; a pipeline goes through these functions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from imgdit.schedulers.flow_match import calculate_shift, linear_sigmas

logger = logging.get_logger(__name__)

WORKING = (
    "MultiFrameFlowMatchScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, "
    "FlowMatchLCMScheduler, and with use_flow_sigmas=True and prediction_type='flow_prediction' "
    "UniPCMultistepScheduler, DPMSolverMultistepScheduler and DPMSolverSinglestepScheduler"
)
"""Schedulers that a test of ours runs."""


FEW_STEPS = "few_steps"
"""Entry of a scheduler's configuration: the steps that a few-step LoRA in use was trained for."""


def set_schedule(
    scheduler: Any,
    num_inference_steps: int,
    sigmas: Iterable[float] | None,
    num_tokens: float,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Set the steps of a run; the timesteps in [0, 1000], one per prediction.

    A scheduler that takes noise levels gets `linear_sigmas`, others choose their own. One of a higher order, as
    Heun's, has more timesteps than steps. diffusers' solvers call the shift `flow_shift` and leave out the `shift` of
    the configuration that they are made from; unless `flow_shift` was given, that `shift` is used.

    Args:
        scheduler: see `check_schedule`.
        num_inference_steps: steps of the sampler, where `sigmas` are not given.
        sigmas: noise levels before the scheduler's shift.
        num_tokens: those that are generated, for dynamic shifting.
        device: of the timesteps.
    """
    config = scheduler.config
    shift = config.get("shift")
    if shift is not None and "flow_shift" in config.get("_use_default_values", ()) and config["flow_shift"] != shift:
        logger.warning(f"{type(scheduler).__name__} has no flow_shift of its own: it takes shift={shift}, the model's")
        scheduler.register_to_config(flow_shift=shift)
    _set(scheduler, num_inference_steps, sigmas, num_tokens, device)
    return scheduler.timesteps


def _set(
    scheduler: Any,
    num_inference_steps: int,
    sigmas: Iterable[float] | None,
    num_tokens: float,
    device: torch.device | str | None,
) -> None:
    takes = inspect.signature(scheduler.set_timesteps).parameters
    levels: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    if "sigmas" in takes:
        levels = {"sigmas": np.array(linear_sigmas(num_inference_steps) if sigmas is None else list(sigmas))}
    mu = calculate_shift(scheduler.config, num_tokens)
    if mu is not None:
        levels["mu"] = mu
    scheduler.set_timesteps(**levels, device=device)
    scheduler.set_begin_index(0)


def step_options(scheduler: Any, generator: Any) -> dict[str, Any]:
    """The generator as an argument of `step`, for schedulers that may draw noise."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def check_schedule(scheduler: Any, num_inference_steps: Any, sigmas: Iterable[float] | None = None) -> None:
    """Refuse steps, noise levels and schedulers that do not lead from noise to data by flow matching.

    Raises:
        ValueError: what was got, and which schedulers work.
    """
    if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be a whole number and at least 1, got {num_inference_steps!r}")
    name = type(scheduler).__name__
    if sigmas is not None:
        levels = [float(level) for level in sigmas]
        if not levels or not all(0.0 < low <= high <= 1.0 for high, low in zip([1.0, *levels], levels)):
            raise ValueError(f"sigmas are noise levels that fall from at most 1 to more than 0, got {levels}")
        if len(set(levels)) < len(levels):
            raise ValueError(f"sigmas must fall at every step, got {levels}")
        if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{name} chooses its noise levels itself and takes no sigmas=; give num_inference_steps=, or use "
                "FlowMatchEulerDiscreteScheduler"
            )
        sigmas = levels
    fault = _fault(scheduler, int(num_inference_steps), sigmas)
    if fault is not None:
        raise ValueError(
            f"{name} as it is configured is no flow-matching schedule ({fault}). These work: {WORKING}. Make one "
            "with pipe.scheduler = …Scheduler.from_config(pipe.scheduler.config)"
        )


def check_few_steps(
    scheduler: Any, num_inference_steps: int, sigmas: Iterable[float] | None, guidance_scale: float
) -> None:
    """Refuse what a few-step LoRA was not trained for, while one is in use.

    Args:
        scheduler: its configuration says whether one is.
        num_inference_steps, sigmas: of the call.
        guidance_scale: of a second prediction; 1: there is none.

    Raises:
        ValueError: other steps, or guidance.
    """
    steps = scheduler.config.get(FEW_STEPS)
    if steps is None:
        return
    if sigmas is not None or num_inference_steps != steps or guidance_scale > 1.0:
        got = f"sigmas={list(sigmas)}" if sigmas is not None else f"num_inference_steps={num_inference_steps}"
        raise ValueError(
            f"the few-step LoRA in use is trained for num_inference_steps={steps} without sigmas and for "
            f"guidance_scale=1, as the guidance is in its weights; got {got}, guidance_scale={guidance_scale}. Give "
            "those, or leave the LoRA out"
        )


def _fault(scheduler: Any, num_inference_steps: int, sigmas: Iterable[float] | None) -> str | None:
    """Why a scheduler does not fit, found by setting a copy of it; `None` if it does."""
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        return f"prediction_type={prediction!r}"
    if (
        scheduler.config.get("use_dynamic_shifting")
        and "mu" not in inspect.signature(scheduler.set_timesteps).parameters
    ):
        return "its shift is one number, and the configuration that it is made from shifts by the number of tokens"
    trial = type(scheduler)(**{key: value for key, value in scheduler.config.items() if key in _arguments(scheduler)})
    try:
        _set(trial, num_inference_steps, sigmas, 256, "cpu")
        timesteps, levels = trial.timesteps.tolist(), trial.sigmas.tolist()
    except (AssertionError, AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    falls = all(math.isfinite(level) for level in levels) and levels == sorted(levels, reverse=True)
    if not falls or levels[0] > 1.0 or levels[-1] != 0.0:
        return f"its noise levels go from {levels[0]:.4g} to {levels[-1]:.4g}, expected from at most 1 down to 0"
    # Some schedulers cut their timesteps down to whole numbers.
    far = [t for t, level in zip(timesteps, levels) if abs(t - 1000 * level) > 1.01]
    if far or len(levels) != len(timesteps) + 1:
        return f"its timesteps {timesteps[:3]} are not 1000 times its noise levels {[round(x, 4) for x in levels[:3]]}"
    return None


def _arguments(scheduler: Any) -> set[str]:
    return set(inspect.signature(type(scheduler)).parameters)
