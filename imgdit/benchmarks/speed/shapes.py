"""Transformers of published shapes with random weights on a GPU: forward, training and compiled steps with conditions,
and offloaded pipelines, each against the stock model of the same weights in the same run.

Everything but the clock and the kernels runs on a CPU too, with `TINY`.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler

from imgdit.adapters.condition import Condition
from imgdit.adapters.omni_control import OmniControl
from imgdit.benchmarks.speed.families import CASES, Case, Size, add_adapter, step_of, stock_pipeline
from imgdit.benchmarks.speed.timing import Comparison, compare, flops_of, gemm_peak, peak_memory, timed
from imgdit.lora.files import activate
from imgdit.sae.config import SAEConfig
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import steer

FLUX1 = Size(heads=24, head_dim=128, double=19, single=38, side=64, text=512, text_width=4096)
"""FLUX.1 at 1024 x 1024 pixels: 11.9 B parameters."""
KLEIN = Size(heads=24, head_dim=128, double=5, single=20, side=64, text=512, text_width=7680)
"""FLUX.2 klein at 1024 x 1024 pixels: 4 B parameters."""
OFFLOADED = FLUX1._replace(double=5, single=10)
"""What is moved between CPU and GPU in every step: a quarter of FLUX.1."""

FORWARD = {"FLUX.1": 0.240}
"""Seconds of a stock step that an H100 must reach, eager."""
COMPILED = {"FLUX.1": 0.154}
"""The same, compiled."""
LOADED_BAR, CACHED_BAR, COMPILED_BAR = 1.02, 1 / 1.40, 1 / 1.80
"""Most time of a step with a loaded LoRA over the stock model's; of one cached condition over the same in joint mode;
of a compiled step with a LoRA over the eager one."""


class Row(NamedTuple):
    """One line of the table."""

    work: str
    against: str
    """What it is compared with; "" where the number stands for itself."""
    seconds: float
    """Median."""
    ratio: float | None = None
    """Median of the pairwise ratios to `against`."""
    low: float | None = None
    high: float | None = None
    fraction: float | None = None
    """Floating-point operations per second over those of a square matrix product in the same piece and dtype."""
    memory: int | None = None
    """Most bytes held at once: on a GPU with the weights, on a CPU without."""
    bar: float | None = None
    """What the ratio, or without one the seconds, must not exceed."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; `None` without one."""
        measured = self.seconds if self.ratio is None else self.ratio
        return None if self.bar is None else measured <= self.bar


class Machine(NamedTuple):
    """Where and how exactly it runs."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    compiler: str = "inductor"
    """Backend of `torch.compile`."""

    def peak(self) -> float:
        """Floating-point operations per second of a large matrix product."""
        size = 8192 if self.device.type == "cuda" else 128
        return gemm_peak(size=size, device=self.device, dtype=self.dtype)

    def memory(self, call: Callable[[], Any]) -> int:
        """See `Row.memory`."""
        held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        return held + peak_memory(call, self.device)

    def room(self) -> int | None:
        """Free bytes of a GPU; `None` on a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    @contextmanager
    def made_here(self) -> Iterator[None]:
        """Modules and tensors are made on the device and in the dtype: the weights of 12 B parameters in seconds."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                yield
        finally:
            torch.set_default_dtype(before)


class Shape:
    """A stock transformer and a second one of the same weights, which has a LoRA and takes conditions."""

    def __init__(self, name: str, size: Size, machine: Machine, plain: Any = None) -> None:
        """
        Args:
            name: of `CASES`.
            size: of the model, if the GPU has room for it.
            machine: where it runs.
            plain: the stock model; `None`: a new one.
        """
        self.machine, case = machine, CASES[name]
        self.size = size if plain is not None else fitting(case, size, machine.dtype, machine.room())
        self.published = self.size in (FLUX1, KLEIN)
        """Whether bars hold for it."""
        self.name = name if self.size == size else f"{name} with {self.size.double} + {self.size.single} blocks"
        torch.manual_seed(0)
        with machine.made_here():
            self.plain = case.model(self.size).eval().requires_grad_(False) if plain is None else plain
            inputs = case.inputs(self.size)
            self.inputs = {
                key: value.to(machine.device) if torch.is_tensor(value) else value for key, value in inputs.items()
            }
            self.model = _shared(self.plain)
            add_adapter(self.model)
            self.model.to(machine.device, machine.dtype)
            vae = case.vae().to(machine.device, machine.dtype)
        parts = {"transformer": self.model, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler()}
        self.pipe = stock_pipeline(getattr(diffusers, case.pipeline), parts)
        self.pipe.set_progress_bar_config(disable=True)
        self.control = OmniControl(self.pipe)

    def conditions(self, count: int, independent: bool = False) -> AbstractContextManager[Any]:
        """`count` condition images, each with as many tokens as the image."""
        if not count:
            return nullcontext()
        image = torch.rand(3, 4 * self.size.side, 4 * self.size.side)
        given = [Condition(image, "adapter", position=(0, self.size.side * i)) for i in range(count)]
        return self.control.use(given, mode="independent" if independent else "joint")

    def plain_step(self) -> torch.Tensor:
        """Of the stock model."""
        return step_of(self.plain, self.inputs)

    def step(self) -> torch.Tensor:
        """Of the model with the LoRA."""
        return step_of(self.model, self.inputs)

    def training_step(self) -> torch.Tensor:
        """Forward and backward over the LoRA's weights."""
        for name, weight in self.model.named_parameters():
            weight.requires_grad_("lora_" in name)  # PEFT freezes what is not active
        with torch.enable_grad():
            loss = self.step().float().square().mean()
            loss.backward()
        self.model.zero_grad()
        return loss.detach()[None]

    def row(
        self,
        work: str,
        ours: Callable[[], torch.Tensor],
        other: Callable[[], torch.Tensor],
        against: str,
        peak: float,
        bar: float | None = None,
        flops: int | None = None,
    ) -> Row:
        """Time two calls in turn."""
        flops = flops_of(ours) if flops is None else flops
        found = compare(work, against, ours, other, rounds=self.machine.rounds, device=self.machine.device)
        bar = bar if self.published else None
        with torch.no_grad():
            return _row(f"{self.name}: {work}", found, flops / found.ours / peak, self.machine.memory(ours), bar)


def _row(work: str, found: Comparison, fraction: float, memory: int, bar: float | None) -> Row:
    return Row(work, found.against, found.ours, found.ratio, found.low, found.high, fraction, memory, bar)


def fitting(case: Case, size: Size, dtype: torch.dtype, room: int | None) -> Size:
    """The size, or with so many of its blocks as a GPU with `room` free bytes holds beside the activations."""
    with torch.device("meta"):
        whole = sum(weight.numel() for weight in case.model(size).parameters()) * dtype.itemsize
    if room is None or 1.2 * whole + (8 << 30) <= room:
        return size
    part = max(0.0, room - (8 << 30)) / (1.2 * whole)
    return size._replace(double=max(1, int(size.double * part)), single=max(1, int(size.single * part)))


def eager_rows(name: str, size: Size, machine: Machine) -> Iterator[Row]:
    """Forward and training steps with 0, 1 and 2 conditions, joint and cached, and with a LoRA loaded only.

    The training step is that of the LoRA, with gradient checkpointing.
    """
    shape, peak = Shape(name, size, machine), machine.peak()
    stock = type(shape.plain).__name__
    flops = flops_of(shape.plain_step)
    found = compare("", "", shape.plain_step, shape.plain_step, rounds=machine.rounds, device=machine.device)
    with torch.no_grad():
        memory = machine.memory(shape.plain_step)
    bar = FORWARD.get(name) if shape.published else None
    yield Row(
        f"{shape.name}: forward, {stock}", "", found.ours, fraction=flops / found.ours / peak, memory=memory, bar=bar
    )
    yield shape.row("forward, LoRA loaded", shape.step, shape.plain_step, stock, peak, LOADED_BAR)
    joint = {}
    for count in (1, 2):
        with shape.conditions(count):
            row = shape.row(f"forward, {count} condition(s), joint", shape.step, shape.plain_step, stock, peak)
        joint[count] = row
        yield row
        with shape.conditions(count, independent=True):
            with torch.no_grad():
                shape.step()  # writes the cache
            row = shape.row(f"forward, {count} condition(s), cached", shape.step, shape.plain_step, stock, peak)
        yield row
        ratio = row.seconds / joint[count].seconds
        bar = CACHED_BAR if count == 1 and shape.published else None
        yield Row(
            f"{shape.name}: {count} condition(s), cached over joint", joint[count].work, row.seconds, ratio, bar=bar
        )
    yield from _training_rows(shape, stock, peak, 3 * flops)


def _training_rows(shape: Shape, stock: str, peak: float, flops: int) -> Iterator[Row]:
    shape.model.enable_gradient_checkpointing()
    shape.model.train()
    activate(shape.model, ["adapter"])
    work = "LoRA training step, no condition"
    alone = shape.row(work, shape.training_step, shape.plain_step, f"forward, {stock}", peak, flops=flops)
    yield alone
    activate(shape.model, [])
    for count in (1, 2):
        with shape.conditions(count):
            row = shape.row(
                f"LoRA training step, {count} condition(s)",
                shape.training_step, shape.plain_step, f"forward, {stock}", peak, flops=flops,
            )  # fmt: skip
        yield row._replace(fraction=None, note=f"{row.seconds / alone.seconds:.2f} of the step without")


def compiled_rows(name: str, size: Size, machine: Machine) -> Iterator[Row]:
    """Blocks compiled one by one with `fullgraph=True`: the stock model, and ours with a LoRA and with conditions,
    each against the same uncompiled."""
    eager, peak = Shape(name, size, machine), machine.peak()
    torch.compiler.reset()
    compiled = Shape(name, eager.size, machine, plain=_shared(eager.plain))
    for model in (compiled.plain, compiled.model):
        model.compile_repeated_blocks(fullgraph=True, backend=machine.compiler)
    flops = flops_of(eager.plain_step)  # before attention is somebody else's kernel
    row = eager.row("forward, stock, compiled", compiled.plain_step, eager.plain_step, "eager", peak, flops=flops)
    yield row
    if name in COMPILED and eager.published:
        yield Row(f"{row.work}, seconds", "", row.seconds, bar=COMPILED[name])
    for one in (eager, compiled):
        activate(one.model, ["adapter"])
    yield eager.row("forward, LoRA, compiled", compiled.step, eager.step, "eager", peak, COMPILED_BAR, flops)
    for one in (eager, compiled):
        activate(one.model, [])
    for independent in (False, True):
        with eager.conditions(1, independent), compiled.conditions(1, independent):
            with torch.no_grad():
                flops = flops_of(eager.step)  # and writes the cache
                flops = flops_of(eager.step) if independent else flops
                compiled.step()
            work = f"forward, 1 condition(s), {'cached' if independent else 'joint'}, compiled"
            yield eager.row(work, compiled.step, eager.step, "eager", peak, flops=flops)


def _shared(model: Any) -> Any:
    """A second model of the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def _whole(pipe: Any, device: torch.device) -> None:
    pipe.to(device)


def _grouped(pipe: Any, device: torch.device) -> None:
    pipe.vae.to(device)
    pipe.transformer.enable_group_offload(
        device,
        torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )


def _sequential(pipe: Any, device: torch.device) -> None:
    if device.type == "cuda":
        pipe.enable_sequential_cpu_offload(device=device)
        return
    for part in (pipe.transformer, pipe.vae):  # what that does; it refuses a CPU
        cpu_offload(part, execution_device=device)


OFFLOADS: dict[str, Callable[[Any, torch.device], None]] = {
    "none": _whole,
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "groups": _grouped,
    "sequential": _sequential,
}
"""Ways to keep weights on the CPU."""


def offload_rows(name: str, size: Size, machine: Machine) -> Iterator[Row]:
    """Two steps of a pipeline for each kind of offloading, with and without an SAE and a cached condition."""
    plain = 0.0
    for kind, apply in OFFLOADS.items():
        shape = Shape(name, size, machine)
        shape.pipe.to("cpu")
        apply(shape.pipe, machine.device)
        width = size.heads * size.head_dim
        sae = SparseAutoencoder(SAEConfig(width, 4 * width)).to(machine.device, machine.dtype)
        for with_sae in (False, True):
            for conditions in (0, 1):
                with ExitStack() as using:
                    using.enter_context(torch.no_grad())
                    using.enter_context(shape.conditions(conditions, independent=True))
                    if with_sae:
                        place = "transformer.transformer_blocks.0"
                        using.enter_context(steer(shape.pipe, sae, {0: 0.0, 1: 2.0}, hookpoint=place))
                    call = partial(_image, shape)
                    call()
                    seconds = statistics.median(timed(call, machine.device) for _ in range(machine.rounds))
                    memory = machine.memory(call)
                plain = plain or seconds
                work = f"{shape.name}: 2 steps, offload {kind}, {conditions} condition(s)" + ", SAE" * with_sae
                yield Row(work, "offload none, alone", seconds, seconds / plain, memory=memory)
        del shape, call
        gc.collect()


def _image(shape: Shape) -> torch.Tensor:
    """Latents after two steps."""
    to: dict[str, Any] = {"device": shape.machine.device, "dtype": shape.machine.dtype}
    side = 4 * shape.size.side
    return shape.pipe(
        prompt_embeds=torch.zeros(1, shape.size.text, shape.size.text_width, **to),
        pooled_prompt_embeds=torch.zeros(1, 256, **to),
        height=side,
        width=side,
        num_inference_steps=2,
        output_type="latent",
    ).images
