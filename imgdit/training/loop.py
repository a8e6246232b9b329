"""One plain training loop on accelerate.

Mixed precision, gradient accumulation and clipping, DDP and FSDP2 are accelerate's: start the process with
`accelerate launch` and nothing here changes. What is ours is that every draw of a step is a function of the seed and
the micro-batch's number, so that a run that was interrupted goes on bitwise (on a CPU) as if it had not been, and two
ranks see what one rank with twice the micro-batches sees.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from imgdit.io.atomic import write_text
from imgdit.io.checkpoints import (
    CheckpointError,
    begin_checkpoint,
    check_architecture,
    latest_checkpoint,
    read_files,
    read_state,
    read_tensors,
    rng_state,
    save_checkpoint,
    save_sharded,
    set_rng_state,
    shards_of,
)
from imgdit.io.lock import only_writer
from imgdit.io.order import Batches, Fingerprinted, compare_rows, lost_worker, mixed_seed
from imgdit.io.sharded import ShardError, load_shards, require_shards
from imgdit.io.text import lines_or_errors
from imgdit.mup import MupMixin, param_groups
from imgdit.training.batches import ObjectiveOutput
from imgdit.training.build import build_scheduler
from imgdit.training.optimizers import build_optimizer
from imgdit.training.progress import Progress
from imgdit.training.recipe import OptimizerConfig, Recipe

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
    on_sample: Callable[[int], None] | None = None,
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
            evaluation mode. It may draw random numbers: the training's are put back.
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
        run = _Run(recipe, model, batches, objective, scheduler, held_out, on_sample, resume, accept_data)
        return run.train(stop_at)


def optimizer_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups: μP's for a model that knows its roles, otherwise weights with and the rest without decay.

    Adapters on a frozen base are not μP-scaled: their width is the rank, which does not grow with the model.
    """
    if isinstance(model, MupMixin) and not getattr(model, "peft_config", None):
        return param_groups(model, config.lr, config.weight_decay, eps=config.eps)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [{**group, "lr": config.lr, "eps": config.eps} for group in groups if group["params"]]


class _Run:
    """The state of a run; `train` is the loop."""

    def __init__(
        self,
        recipe: Recipe,
        model: torch.nn.Module,
        batches: Batches,
        objective: Objective | None,
        scheduler: Any,
        held_out: Sequence[Any],
        on_sample: Callable[[int], None] | None,
        resume: bool,
        accept_data: bool,
    ) -> None:
        run = recipe.run
        dataset = batches.dataset
        self.rows = dataset.fingerprint() if isinstance(dataset, Fingerprinted) else None
        self.accept_data = accept_data
        self.recipe, self.batches = recipe, batches
        self.scheduler = build_scheduler(recipe) if scheduler is None else scheduler
        self.held_out, self.on_sample = held_out, on_sample
        self.objective = objective or functools.partial(recipe.objective.function, **recipe.objective.arguments)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model has requires_grad=True: there is nothing to train")
        self.folder = Path(run.folder)
        self.checkpoints = self.folder / "checkpoints"
        found = latest_checkpoint(self.checkpoints)
        if found is not None and not resume:
            raise ValueError(
                f"{self.folder} holds a run ({found.name}); pass resume=True or choose another run.folder"
            )
        self.accelerator = Accelerator(
            mixed_precision=run.mixed_precision,
            gradient_accumulation_steps=run.accumulation,
            log_with=_trackers(run.tracker) or None,
            project_dir=str(self.folder),
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
        self.sharded = _writes_shards(self.accelerator)
        self.step, self.samples = 0, 0
        self.seen = 0
        """Samples trained on. `samples` counts positions in the data, each of which may be a whole batch."""
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
        self.frozen = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        self.ema = None
        if recipe.ema.decay:
            sharded = any(isinstance(p, DTensor) for p in self.trained.values())  # have no foreach copy
            self.ema = EMAModel(self.trained.values(), decay=recipe.ema.decay, foreach=not sharded)
        self.generator = torch.Generator(self.accelerator.device)
        if found is not None:
            self._load(found)
        # The rate is a pure function of the step: LambdaLR multiplies each group's own rate, and starts where we are.
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group.get("initial_lr", group["lr"])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer.optimizer, lambda step: recipe.schedule.factor(step, run.steps), last_epoch=self.step - 1
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
        self._open_logs()
        stream = self.batches.stream(self.samples, self.size, self.rank, self.ranks)
        progress = Progress(self.folder.name, run.steps, self.step, silent=not accelerator.is_main_process)
        window = _Mean()
        metrics: dict[str, float] = {}
        try:
            while self.step < last:
                started = time.perf_counter()
                rates = self.schedule.get_last_lr()
                values = self._update(stream)
                values["seconds"] = time.perf_counter() - started
                window.add(values)
                progress.update()
                if self.step % run.log_every == 0 or self.step == last:
                    metrics = {**window.take(), "lr": float(rates[0]), "samples": float(self.seen)}
                    self._log(metrics)
                    progress.note(self.step, f"loss {metrics['loss']:.4f}", last=self.step == last)
                if self.held_out and _due(self.step, run.evaluate_every, last):
                    self._log(self._evaluate())
                if self.on_sample is not None and _due(self.step, run.sample_every, last):
                    with self._looking():
                        self.on_sample(self.step)
                # Last, so that a run which goes on from here repeats nothing that was written above.
                if _due(self.step, run.checkpoint_every, last):
                    self._save()
        finally:
            progress.close()
            for tracker in accelerator.trackers:  # end_training would take the caller's process group along
                tracker.finish()
            # accelerate's autocast sits on the model's forward, which is the caller's again.
            self.model = accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        checkpoint = latest_checkpoint(self.checkpoints)
        assert checkpoint is not None
        return TrainingResult(self.step, checkpoint, metrics)

    def _update(self, stream: Iterator[Any]) -> dict[str, float]:
        """One optimiser step; the means over ranks and micro-batches of what the objective reports."""
        run, accelerator = self.recipe.run, self.accelerator
        outputs, seen = [], []
        for i in range(run.accumulation):
            micro = next(stream)
            seen.append(micro)
            batch = micro.batch.to(accelerator.device, non_blocking=True)
            position = self.samples + (i * self.ranks + self.rank) * self.size  # of the micro-batch's first sample
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
            self._refuse(values, outputs, seen)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(parameters)
        self.step += 1
        self.samples += run.batch_size
        self.seen += round(values.pop("samples") * run.accumulation * self.ranks)
        return values

    def _refuse(self, values: Mapping[str, float], outputs: list[dict[str, torch.Tensor]], seen: list[Any]) -> None:
        """Save the micro-batches whose loss is not finite (all, if only the gradient is not), and raise."""
        bad = [m for m, o in zip(seen, outputs) if not math.isfinite(float(o["loss"]))] or seen
        path = self.folder / f"bad-batch-step-{self.step + 1:08d}-rank-{self.rank}.safetensors"
        tensors = {f"{i}.{k}": t.cpu() for i, m in enumerate(bad) for k, t in _tensors(m.batch)}
        indices = [m.indices for m in bad]
        save_file(_unshared(tensors), path, metadata={"indices": json.dumps(indices)})
        kept = latest_checkpoint(self.checkpoints)
        raise NonFiniteLoss(
            f"step {self.step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}; the weights were not "
            f"changed. The batch (samples {indices}) is in {path}. "
            + (f"The last checkpoint is {kept}. " if kept else "There is no checkpoint yet. ")
            + "Look at the batch; if it is sound, lower optimizer.lr or optimizer.clip_norm, or lengthen "
            "schedule.warmup"
        )

    # Looking at the model

    @contextmanager
    def _looking(self) -> Iterator[None]:
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
        with self._looking():
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

    # What is written

    def _open_logs(self) -> None:
        """Metrics file and trackers, without the lines of steps that will be done again."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "metrics.jsonl"
            lines = lines_or_errors(path.read_bytes(), str(path)) if path.exists() else []
            kept = [line for line in lines if isinstance(line, str) and _step_of(line) <= self.step]
            write_text(path, "".join(f"{line}\n" for line in kept))
        accelerator.wait_for_everyone()
        if accelerator.log_with:
            accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})

    def _log(self, values: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.accelerator.log(dict(values), step=self.step)

    def _save(self) -> None:
        """Each rank writes what it holds of sharded tensors; the rest is gathered and written by the first."""
        parts = {"model": self._weights(), "optimizer": self._moments()}
        if self.ema is not None:
            averages = zip(self.trained, self.ema.shadow_params)
            parts["ema"] = {n: p if self.sharded else _whole(p) for n, p in averages}
        shards = {part: {n: t for n, t in found.items() if isinstance(t, DTensor)} for part, found in parts.items()}
        # Tied weights are in the file under each of their names.
        tensors = {
            part: _unshared({n: t for n, t in found.items() if n not in shards[part]}) for part, found in parts.items()
        }
        states = gather_object([rng_state(f"rank{self.rank}/")])
        tensors["rng"] = {name: state for part in states for name, state in part.items()}
        if self.rows is not None:
            tensors["rows"] = {"rows": self.rows}
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "samples": self.samples,
            "seen": self.seen,
            "ranks": self.ranks,
            "partial": bool(self.frozen),
            "schedule": {"step": self.schedule.last_epoch, "lr": self.schedule.get_last_lr()},
            "ema_updates": None if self.ema is None else self.ema.optimization_step,
            "scaler": None if scaler is None else scaler.state_dict(),
            "recipe": self.recipe.to_dict(),
        }
        begun = None
        if self.sharded:
            paths = [begin_checkpoint(self.checkpoints, self.step, tuple(shards)) if self.rank == 0 else None]
            (begun,) = broadcast_object_list(paths)
            assert begun is not None
            save_sharded(begun, shards)
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoints, self.step, tensors, state, self.recipe.run.keep, begun=begun)
        self.accelerator.wait_for_everyone()

    def _options(self) -> StateDictOptions:
        return StateDictOptions(full_state_dict=not self.sharded, cpu_offload=not self.sharded)

    def _weights(self) -> dict[str, Any]:
        """What was trained, and buffers, by the model's own names; each rank's part, or all on the first rank."""
        weights = get_model_state_dict(self.wrapped, options=self._options())
        return {name: tensor for name, tensor in weights.items() if name not in self.frozen}

    def _moments(self) -> dict[str, torch.Tensor]:
        """State of the optimiser as "<parameter>/<moment>"; each rank's part, or all on the first rank."""
        found: Any = get_optimizer_state_dict(self.wrapped, self.optimizer.optimizer, options=self._options())
        # An optimiser may count its steps by a number.
        return {
            f"{name}/{kind}": torch.as_tensor(value)
            for name, values in found.get("state", {}).items()
            for kind, value in values.items()
        }

    def _load(self, checkpoint: Path) -> None:
        """Everything `_save` wrote; each rank reads the files."""
        state = read_state(checkpoint, ("samples", "recipe", "ema_updates", "scaler"))
        weights: dict[str, Any] = get_model_state_dict(self.wrapped)
        own = {name: tensor for name, tensor in weights.items() if name not in self.frozen}
        check_architecture(checkpoint / "model.safetensors", own)
        for name in _changed(self.recipe.to_dict(), state["recipe"]):
            if name.startswith("run.folder "):  # the folder may have moved
                continue
            logger.warning("%s: the recipe differs from the checkpoint's in %s", checkpoint, name)
        self._check_rows(checkpoint, state)
        self._load_moments(checkpoint / "optimizer.safetensors")
        set_model_state_dict(
            self.wrapped, _fitted(checkpoint / "model.safetensors", own), options=StateDictOptions(strict=False)
        )
        if self.ema is not None:
            if "ema.safetensors" not in state["files"]:
                raise CheckpointError(f"{checkpoint} was made without an average; set ema.decay: 0 or start anew")
            check_architecture(checkpoint / "ema.safetensors", self.trained)
            averages = _fitted(checkpoint / "ema.safetensors", self.trained)
            for name, shadow in zip(self.trained, self.ema.shadow_params):
                shadow.copy_(averages[name])
            if state["ema_updates"] is None:
                raise CheckpointError(
                    f"{checkpoint / 'state.json'} is damaged: 'ema_updates' is null beside an average"
                )
            self.ema.optimization_step = state["ema_updates"]
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        states = read_tensors(checkpoint / "rng.safetensors")
        prefix = f"rank{self.rank}/"
        if any(name.startswith(prefix) for name in states):
            set_rng_state(states, prefix)
        else:  # more ranks than before
            torch.manual_seed(mixed_seed(self.recipe.run.seed, self.rank, state["step"]))
        self.step, self.samples = state["step"], state["samples"]
        self.seen = state.get("seen", self.samples)  # earlier versions counted positions

    def _check_rows(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Refuse other data than before; a checkpoint that tells nothing of its rows is taken."""
        if self.rows is None or "rows.safetensors" not in state["files"]:
            return
        before = read_files(checkpoint / "rows.safetensors").get("rows")
        if before is None or before.shape[1:] != (2,) or before.dtype != torch.int64:
            raise CheckpointError(f"{checkpoint / 'rows.safetensors'} is damaged: it holds no (N, 2) int64 'rows'")
        differ = compare_rows(before, self.rows)
        if differ is not None and not self.accept_data:
            raise ValueError(
                f"{checkpoint} was trained on other rows: {differ}. Their order is another one, so the run would not "
                "go on as it was: put the data back, or pass accept_data=True to go on with the data that is there now"
            )
        if differ is not None:
            logger.warning("%s: going on with other rows: %s", checkpoint, differ)

    def _load_moments(self, path: Path) -> None:
        """Put the optimiser's state back, sharded as the weights are now."""
        optimizer = self.optimizer.optimizer
        made: Any = get_optimizer_state_dict(self.wrapped, optimizer)  # brings the state into being
        values = {f"{name}/{kind}": value for name, kinds in made["state"].items() for kind, value in kinds.items()}
        like = {key: torch.as_tensor(value) for key, value in values.items()}
        check_architecture(path, like)
        moments: dict[str, Any] = {}
        for key, tensor in _fitted(path, like).items():
            name, _, kind = key.rpartition("/")
            moments.setdefault(name, {})[kind] = tensor if torch.is_tensor(values[key]) else tensor.item()
        loaded: dict[str, Any] = {"state": moments, "param_groups": made["param_groups"]}
        set_optimizer_state_dict(self.wrapped, optimizer, loaded)


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


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _writes_shards(accelerator: Accelerator) -> bool:
    """Whether the launch asks that each rank writes its own part of the checkpoints.

    Raises:
        ImportError: PyTorch is too old for that.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type != DistributedType.FSDP or plugin is None:
        return False
    kind = plugin.state_dict_type
    if getattr(kind, "name", kind) != "SHARDED_STATE_DICT":
        return False
    require_shards()
    return True


def _fitted(path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors of a part of a checkpoint, sharded and placed as those of the same names in `like`."""
    tensors = {name: _like(tensor, like[name]) for name, tensor in read_files(path).items()}
    shards = {name: torch.empty_like(like[name]) for name in like.keys() - tensors.keys()}
    if shards:
        try:
            load_shards(shards_of(path), shards)
        except ShardError as error:
            raise CheckpointError(f"{shards_of(path)} cannot be read: {error}") from error
    return tensors | shards


def _trackers(tracker: str) -> list[str]:
    if tracker == "none":
        return []
    if find_spec("tensorboard") is None:
        if tracker == "tensorboard":
            raise ImportError(
                'run.tracker is "tensorboard", which is not installed: pip install "imgdit[tensorboard]"'
            )
        logger.info('no curves: tensorboard is not installed (pip install "imgdit[tensorboard]")')
        return []
    return ["tensorboard"]


def _step_of(line: str) -> float:
    """Step of a line of metrics; a line that a kill cut short counts as later than all."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _changed(new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of values that differ between two recipes."""
    names = []
    for key in sorted(new.keys() | old.keys()):
        a, b = new.get(key), old.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += _changed(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key} (now {a!r}, was {b!r})")
    return names


def _tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a batch with their places in it."""
    if isinstance(value, torch.Tensor):
        yield prefix or "tensor", value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), f"{prefix}.{field.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{prefix}.{key}".lstrip("."))


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Own memory for each: safetensors refuses tensors that share theirs. Those that do not are not copied."""
    owned: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage)
        owned[name] = tensor
    return owned


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, put together if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor sharded and placed as a parameter is."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
