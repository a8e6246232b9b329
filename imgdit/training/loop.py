"""One plain training loop on accelerate.

Mixed precision, gradient accumulation and clipping, DDP and FSDP2 are accelerate's: start the process with
`accelerate launch` and nothing here changes. What is ours is that every draw of a step is a function of the seed and
the micro-batch's number, so that a run that was interrupted goes on bitwise (on a CPU) as if it had not been, and two
ranks see what one rank with twice the micro-batches sees.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from imgdit.io.checkpoints import rng_state, set_rng_state
from imgdit.io.lock import only_writer
from imgdit.io.order import Batches, Fingerprinted, lost_worker, mixed_seed
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.build import build_scheduler
from imgdit.training.optimizers import build_optimizer, optimizer_groups
from imgdit.training.progress import Progress
from imgdit.training.recipe import Recipe
from imgdit.training.run_checkpoint import RunCheckpoint, RunPosition, copy_shared, writes_shards
from imgdit.training.run_folder import RunFolder, is_due

logger = logging.getLogger(__name__)

Objective = Callable[[torch.nn.Module, Any, Any, torch.Generator | None], ObjectiveOutput]

# What a stream of random numbers is for; part of its seed.
_TRAINING, _HELD_OUT = 1, 2


class TrainingResult(NamedTuple):
    """Where a run stands when `train` returns."""

    step: int
    """Optimiser steps done."""
    checkpoint: Path
    """The latest checkpoint."""
    metrics: dict[str, float]
    """The last line of the training metrics."""


class NonFiniteLoss(ArithmeticError):
    """The loss or its gradient became NaN or infinite."""


def train(
    recipe: Recipe,
    *,
    model: torch.nn.Module,
    batches: Batches,
    objective: Objective | None = None,
    scheduler: Any = None,
    held_out: Sequence[Any] = (),
    on_sample: Callable[[int], Any] | None = None,
    resume: bool = False,
    stop_at: int | None = None,
    accept_data: bool = False,
) -> TrainingResult:
    """Train until `recipe.run.steps`.

    Args:
        recipe: everything the run depends on.
        model: with the weights to start from; parameters that are frozen stay so. Holds the trained weights
            afterwards (the average is in the checkpoint, see `load_weights`).
        batches: the data and its order; each batch has `to(device)`.
        objective: `(model, scheduler, batch, generator) -> ObjectiveOutput`; `None`: the recipe's.
        scheduler: passed to the objective; `None`: the recipe's.
        held_out: batches never trained on, for the loss at fixed noise. Those with `at(sigma)` are measured at each of
            `run.evaluate_sigmas`.
        on_sample: called on every rank after step number `step`, while the model holds the average weights and is in
            evaluation mode. It may draw random numbers: the training's are put back. A PIL image that it returns
            goes to the trackers.
        resume: go on from the folder's latest checkpoint, if there is one.
        stop_at: stop after this step with a checkpoint, as if the time had run out; the schedule stays the recipe's.
        accept_data: resume although the data has other rows than the checkpoint was trained on.

    Raises:
        ValueError: the folder holds a run and `resume` is false, another process writes it, the batch does not divide,
            the data's rows are others than before, or a checkpoint does not fit (`CheckpointError`).
        NonFiniteLoss: with the name of the file that holds the batch.
        RuntimeError: a data worker was killed.
    """
    first = os.environ.get("RANK", "0") == "0"  # the only rank that writes
    with only_writer(recipe.run.folder) if first else nullcontext(), lost_worker():
        run = TrainingRun(recipe, model, batches, objective, scheduler, held_out, on_sample, resume, accept_data)
        return run.train(stop_at)


class TrainingRun:
    """The state of a run; `train` is the loop."""

    def __init__(
        self,
        recipe: Recipe,
        model: torch.nn.Module,
        batches: Batches,
        objective: Objective | None,
        scheduler: Any,
        held_out: Sequence[Any],
        on_sample: Callable[[int], Any] | None,
        resume: bool,
        accept_data: bool,
    ) -> None:
        run = recipe.run
        dataset = batches.dataset
        rows = dataset.fingerprint() if isinstance(dataset, Fingerprinted) else None
        self.recipe, self.batches = recipe, batches
        self.scheduler = build_scheduler(recipe) if scheduler is None else scheduler
        self.held_out, self.on_sample = held_out, on_sample
        self.objective = objective or functools.partial(recipe.objective.function, **recipe.objective.arguments)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model has requires_grad=True: there is nothing to train")
        self.folder = RunFolder(run.folder, run.keep)
        checkpoint = self.folder.resumed_checkpoint(resume)
        self.accelerator = Accelerator(
            mixed_precision=run.mixed_precision,
            gradient_accumulation_steps=run.accumulation,
            log_with=_trackers(run.tracker) or None,
            project_dir=run.folder,
        )
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.ranks:
            raise ValueError(
                f"{launched} processes were started, but accelerate sees {self.ranks}; start them with "
                "`accelerate launch` (on CPUs with --cpu), which tells accelerate what they are"
            )
        if run.batch_size % (run.accumulation * self.ranks):
            raise ValueError(
                f"run.batch_size={run.batch_size} must divide by run.accumulation={run.accumulation} times "
                f"{self.ranks} rank(s)"
            )
        self.size = run.batch_size // (run.accumulation * self.ranks)
        sharded = writes_shards(self.accelerator)
        self.model = model.train()
        config = recipe.optimizer
        self._check_sharding()
        optimizer = build_optimizer(optimizer_groups(model, config), config)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            # accelerate makes the last child with "Norm" in its class name a shard of its own, which is gathered when
            # that child is called. MMDiT uses the child's parts instead, so it has to stay with the root; accelerate
            # looks for no such child where this attribute names something that is no module.
            model.base_model_prefix = "config"  # type: ignore[assignment]
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.ema = None
        if recipe.ema.decay:
            foreach = not any(isinstance(p, DTensor) for p in self.trained.values())  # sharded ones have no such copy
            self.ema = EMAModel(self.trained.values(), decay=recipe.ema.decay, foreach=foreach)
        if objective is None and "teacher" in inspect.signature(recipe.objective.function).parameters:
            if self.ema is None:
                raise ValueError(f"objective {recipe.objective.name!r} learns from the average weights; set ema.decay")
            arguments = {**recipe.objective.arguments, "teacher": self._averaged_weights}
            self.objective = functools.partial(recipe.objective.function, **arguments)
        self.generator = torch.Generator(self.accelerator.device)
        frozen = frozenset(n for n, p in self.model.named_parameters() if not p.requires_grad)
        self.checkpoint = RunCheckpoint(
            recipe, self.accelerator, self.wrapped, self.trained, frozen, self.optimizer.optimizer, self.ema, rows,
            sharded,
        )  # fmt: skip
        self.at = RunPosition()
        if checkpoint is not None:
            self.at = self.checkpoint.load(checkpoint, accept_data=accept_data)
        # The rate is a pure function of the step: LambdaLR multiplies each group's own rate, and starts where we are.
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group.get("initial_lr", group["lr"])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer.optimizer, lambda step: recipe.schedule.factor(step, run.steps), last_epoch=self.at.step - 1
        )

    def _check_sharding(self) -> None:
        """Refuse what FSDP2 cannot shard."""
        recipe = self.recipe
        odd = {"model.quantize": recipe.model.quantize, "optimizer.kind": recipe.optimizer.kind}
        for name, value in odd.items():
            if self.accelerator.distributed_type == DistributedType.FSDP and value not in ("none", "adamw"):
                raise ValueError(
                    f"{name}={value!r} does not go with FSDP2, whose shards need weights and moments of "
                    "one type; start with configs/accelerate/ddp.json"
                )

    def train(self, stop_at: int | None) -> TrainingResult:
        run, accelerator = self.recipe.run, self.accelerator
        last = run.steps if stop_at is None else min(stop_at, run.steps)
        self._begin_logs()
        stream = self.batches.stream(self.at.samples, self.size, self.rank, self.ranks)
        progress = Progress(self.folder.path.name, run.steps, self.at.step, silent=not accelerator.is_main_process)
        window = _Mean()
        metrics: dict[str, float] = {}
        try:
            while self.at.step < last:
                started = time.perf_counter()
                rates = self.schedule.get_last_lr()
                values = self._update(stream)
                values["seconds"] = time.perf_counter() - started
                window.add(values)
                progress.update()
                if is_due(self.at.step, run.log_every, last):
                    metrics = {**window.take(), "lr": float(rates[0]), "samples": float(self.at.seen)}
                    self._log(metrics)
                    progress.note(self.at.step, f"loss {metrics['loss']:.4f}", last=self.at.step == last)
                if self.held_out and is_due(self.at.step, run.evaluate_every, last):
                    self._log(self._evaluate())
                if self.on_sample is not None and is_due(self.at.step, run.sample_every, last):
                    with self._averaged_weights():
                        sheet = self.on_sample(self.at.step)
                    self._log_image(sheet)
                # Last, so that a run which goes on from here repeats nothing that was written above.
                if is_due(self.at.step, run.checkpoint_every, last):
                    self.checkpoint.save(self.folder, self.at, self.schedule)
        finally:
            progress.close()
            for tracker in accelerator.trackers:  # end_training would take the caller's process group along
                tracker.finish()
            # accelerate's autocast sits on the model's forward, which is the caller's again.
            self.model = accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        checkpoint = self.folder.latest_checkpoint()
        assert checkpoint is not None
        return TrainingResult(self.at.step, checkpoint, metrics)

    def _update(self, stream: Iterator[Any]) -> dict[str, float]:
        """One optimiser step; the means over ranks and micro-batches of what the objective reports."""
        run, accelerator = self.recipe.run, self.accelerator
        outputs, seen = [], []
        for i in range(run.accumulation):
            micro = next(stream)
            seen.append(micro)
            batch = micro.batch.to(accelerator.device, non_blocking=True)
            position = self.at.samples + (i * self.ranks + self.rank) * self.size  # of the micro-batch's first sample
            self.generator.manual_seed(mixed_seed(run.seed, _TRAINING, position))
            with accelerator.accumulate(self.wrapped):
                output = self.objective(self.wrapped, self.scheduler, batch, self.generator)
                accelerator.backward(output.loss)
            count = len(micro.batch.tokens) if self.batches.whole else self.size
            seen_here = output.loss.new_full((), count, dtype=torch.float32)
            outputs.append({**output.metrics, "loss": output.loss.detach(), "samples": seen_here})
        parameters = self.trained.values()
        clip = self.recipe.optimizer.clip_norm
        norm = accelerator.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        names = list(outputs[0])
        means = torch.stack([torch.stack([o[name].float() for o in outputs]).mean() for name in names])
        means = accelerator.reduce(means, reduction="mean")
        values: dict[str, float] = {**dict(zip(names, means.tolist())), "grad_norm": float(norm)}
        # Float16's loss scale makes gradients overflow now and then; the scaler skips such a step.
        checked = ("loss",) if run.mixed_precision == "fp16" else ("loss", "grad_norm")
        if not all(math.isfinite(values[name]) for name in checked):
            self._raise_nonfinite(values, outputs, seen)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(parameters)
        self.at.step += 1
        self.at.samples += run.batch_size
        self.at.seen += round(values.pop("samples") * run.accumulation * self.ranks)
        return values

    def _raise_nonfinite(
        self, values: Mapping[str, float], outputs: list[dict[str, torch.Tensor]], seen: list[Any]
    ) -> NoReturn:
        """Save the micro-batches whose loss is not finite (all, if only the gradient is not), and raise."""
        bad = [m for m, o in zip(seen, outputs) if not math.isfinite(float(o["loss"]))] or seen
        path = self.folder.path / f"bad-batch-step-{self.at.step + 1:08d}-rank-{self.rank}.safetensors"
        tensors = {f"{i}.{k}": t.cpu() for i, m in enumerate(bad) for k, t in _batch_tensors(m.batch)}
        indices = [m.indices for m in bad]
        save_file(copy_shared(tensors), path, metadata={"indices": json.dumps(indices)})
        kept = self.folder.latest_checkpoint()
        raise NonFiniteLoss(
            f"step {self.at.step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}; the weights were "
            f"not changed. The batch (samples {indices}) is in {path}. "
            + (f"The last checkpoint is {kept}. " if kept else "There is no checkpoint yet. ")
            + "Look at the batch; if it is sound, lower optimizer.lr or optimizer.clip_norm, or lengthen "
            "schedule.warmup"
        )

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The model with its average weights, in evaluation mode; afterwards everything is as before."""
        states = rng_state()
        self.wrapped.eval()
        if self.ema is not None:
            self.ema.store(self.trained.values())
            self.ema.copy_to(self.trained.values())
        try:
            with torch.no_grad():
                yield
        finally:
            for module in self.wrapped.modules():
                # FSDP2 keeps the root's gathered weights until a backward pass, which does not come here.
                if isinstance(module, FSDPModule):
                    module.reshard()
            if self.ema is not None:
                self.ema.restore(self.trained.values())
            self.wrapped.train()
            set_rng_state(states)

    def _evaluate(self) -> dict[str, float]:
        """Held-out loss, at fixed noise and each fixed level. Every rank computes all of it: sharded weights need
        equally many passes everywhere."""
        sums: dict[str, list[float]] = {}
        with self._averaged_weights():
            for i, batch in enumerate(self.held_out):
                batch = batch.to(self.accelerator.device)
                levels = self.recipe.run.evaluate_sigmas if hasattr(batch, "at") else ()
                cases = {f"held_out_{sigma:g}": batch.at(sigma) for sigma in levels} or {"held_out": batch}
                for name, case in cases.items():
                    self.generator.manual_seed(mixed_seed(self.recipe.run.seed, _HELD_OUT, i))
                    output = self.objective(self.wrapped, self.scheduler, case, self.generator)
                    sums.setdefault(name, []).append(float(output.loss))
        means = {name: math.fsum(losses) / len(losses) for name, losses in sums.items()}
        return {**means, "held_out": math.fsum(means.values()) / len(means)}

    def _begin_logs(self) -> None:
        """Metrics file and trackers, without the lines of steps that will be done again."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.folder.begin_log(self.at.step)
        accelerator.wait_for_everyone()
        if accelerator.log_with:
            name = self.folder.path.name
            accelerator.init_trackers(
                "logs" if self.recipe.run.tracker in ("auto", "tensorboard") else "imgdit",  # a folder, or a project
                init_kwargs={
                    "tensorboard": {"purge_step": self.at.step + 1},
                    "wandb": {"name": name, "dir": str(self.folder.path), "resume": "allow"},
                    "trackio": {"name": name, "resume": "allow"},
                },
            )

    def _log(self, values: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.folder.log(self.at.step, values)
        self.accelerator.log(dict(values), step=self.at.step)

    def _log_image(self, image: Any) -> None:
        """A PIL image to the trackers that take images; `None`: nothing."""
        for tracker in self.accelerator.trackers if image is not None else ():
            if tracker.name == "trackio":  # accelerate's has no call for images
                import trackio

                tracker.log({"samples": trackio.Image(image)}, step=self.at.step)
            elif hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(image)[None]}, step=self.at.step, **layout)


class _Mean:
    """Means of scalars over a window of steps."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        means = {name: math.fsum(values) / len(values) for name, values in self.values.items()}
        self.values = {}
        return means


def _trackers(tracker: str) -> list[str]:
    if tracker == "none":
        return []
    name = "tensorboard" if tracker == "auto" else tracker
    if find_spec(name) is None:
        install = 'pip install "imgdit[tensorboard]"' if name == "tensorboard" else f"pip install {name}"
        if tracker != "auto":
            raise ImportError(f"run.tracker is {tracker!r}, which is not installed: {install}")
        logger.info("no curves: tensorboard is not installed (%s)", install)
        return []
    return [name]


def _batch_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a batch with their places in it."""
    if isinstance(value, torch.Tensor):
        yield prefix or "tensor", value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _batch_tensors(getattr(value, field.name), f"{prefix}.{field.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _batch_tensors(inner, f"{prefix}.{key}".lstrip("."))
