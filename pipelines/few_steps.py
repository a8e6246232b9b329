"""Few-step LoRAs: four steps without a second prediction for guidance.

Such a LoRA says in its header for how many steps it was trained (`AdapterInfo.num_inference_steps`). It predicts the
mean velocity from each noise level of those steps to the next one, with the guidance of its training in it, so it goes
with a scheduler that draws no noise and with no other levels; pipelines refuse others while it is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from imgdit import compat
from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.lora.files import activate, active_adapters, load_adapter, read_info
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.schedulers.schedule import FEW_STEPS

TURBO = "turbo.safetensors"
"""The few-step LoRA in a pipeline's folder."""


class FewSteps(NamedTuple):
    """A few-step LoRA that a pipeline has."""

    adapter: str
    """Its name."""
    num_inference_steps: int
    """The steps it is for. Its guidance scale is 1: the guidance is in its weights."""


def turbo_file(source: str | Path) -> Path | None:
    """The few-step LoRA of a pipeline's folder, "embedded" for the one that comes along; `None`: it has none, or is on
    the Hub."""
    path = (SCENES if source == EMBEDDED else Path(source).expanduser()) / TURBO
    return path if path.is_file() else None


def steps_of(file: str | Path) -> int:
    """For how many steps a LoRA file was trained.

    Raises:
        ValueError: it is no few-step LoRA.
    """
    steps = read_info(file).num_inference_steps
    if steps is None:
        raise ValueError(
            f"{file} is no few-step LoRA: its header names no num_inference_steps. Load it with load_lora_weights "
            "or --lora"
        )
    return steps


def load_few_steps(pipe: Any, source: str | Path = EMBEDDED, adapter_name: str = "turbo") -> FewSteps:
    """Load a few-step LoRA without using it yet, see `few_steps`.

    Args:
        pipe: a pipeline of ours or of diffusers, with a transformer.
        source: a LoRA file, or the folder of a pipeline that has one; "embedded" for the one that comes along.
        adapter_name: what to call it.

    Raises:
        ValueError: there is no such file, it is no few-step LoRA, or it does not fit the transformer.
    """
    file = Path(source) if str(source).endswith(".safetensors") else turbo_file(source)
    if file is None or not file.is_file():
        raise ValueError(
            f"there is no few-step LoRA: expected a .safetensors file or a folder with {TURBO}, got {source!r}"
        )
    steps = steps_of(file)
    return FewSteps(load_adapter(pipe, file, adapter_name=adapter_name).adapter, steps)


@contextmanager
def few_steps(pipe: Any, turbo: FewSteps) -> Iterator[dict[str, Any]]:
    """Use a few-step LoRA while the context is open; yields the arguments of the pipeline's call that go with it.

        turbo = load_few_steps(pipe)
        with few_steps(pipe, turbo) as call:
            image = pipe("a red cube", **call).images[0]

    Adapters of conditions go along, and so do LoRAs that were in use before. Afterwards the pipeline generates bitwise
    what it did.

    Args:
        pipe: the pipeline that `load_few_steps` gave it to.
        turbo: what that returned.
    """
    model = compat.unwrapped(pipe.transformer)
    scheduler, before = pipe.scheduler, active_adapters(model)
    own = MultiFrameFlowMatchScheduler.from_config(scheduler.config, stochastic_sampling=False)
    own.register_to_config(**{FEW_STEPS: turbo.num_inference_steps})
    pipe.scheduler = own
    activate(model, [*before, turbo.adapter])
    try:
        yield {"num_inference_steps": turbo.num_inference_steps, "guidance_scale": 1.0}
    finally:
        pipe.scheduler = scheduler
        activate(model, before)
