"""What a checkpoint holds of a training run, and how it is put back, on any number of processes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from imgdit.io.checkpoints import (
    CheckpointError,
    begin_checkpoint,
    check_architecture,
    read_files,
    read_shapes,
    read_state,
    read_tensors,
    rng_state,
    save_sharded,
    set_rng_state,
    shards_of,
)
from imgdit.io.order import compare_rows, mixed_seed
from imgdit.io.sharded import ShardError, load_shards, require_shards
from imgdit.training.recipe import Recipe, parse_recipe
from imgdit.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass
class RunPosition:
    """How far a run is."""

    step: int = 0
    """Optimiser steps done."""
    samples: int = 0
    """Positions of the data that were trained on, each of which may be a whole batch."""
    seen: int = 0
    """Samples trained on."""


@dataclass(frozen=True)
class RunCheckpoint:
    """The state of a run that goes into its checkpoints. Every process makes one and calls it with the others."""

    recipe: Recipe
    accelerator: Accelerator
    model: torch.nn.Module
    """As accelerate wrapped it."""
    trained: Mapping[str, torch.nn.Parameter]
    """Parameters that are trained, by the model's own names."""
    frozen: frozenset[str]
    """Names of those that are not; a checkpoint leaves them out."""
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None
    rows: torch.Tensor | None
    """Fingerprint (N, 2) of the data, see `imgdit.io.order.Fingerprinted`."""
    sharded: bool
    """Whether each process writes its own part of sharded tensors, see `writes_shards`."""

    def save(self, folder: RunFolder, position: RunPosition, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Write a checkpoint: each process its part of sharded tensors, the first one the rest.

        Raises:
            CheckpointError: the disk is full or refuses.
        """
        parts = {"model": self._weights(), "optimizer": self._moments()}
        if self.ema is not None:
            averages = zip(self.trained, self.ema.shadow_params)
            parts["ema"] = {n: p if self.sharded else _full_on_cpu(p) for n, p in averages}
        shards = {part: {n: t for n, t in found.items() if isinstance(t, DTensor)} for part, found in parts.items()}
        # Tied weights are in the file under each of their names.
        tensors = {
            part: copy_shared({n: t for n, t in found.items() if n not in shards[part]})
            for part, found in parts.items()
        }
        rank = self.accelerator.process_index
        states = gather_object([rng_state(f"rank{rank}/")])
        tensors["rng"] = {name: state for part in states for name, state in part.items()}
        if self.rows is not None:
            tensors["rows"] = {"rows": self.rows}
        scaler = self.accelerator.scaler
        state = {
            "samples": position.samples,
            "seen": position.seen,
            "ranks": self.accelerator.num_processes,
            "partial": bool(self.frozen),
            "schedule": {"step": schedule.last_epoch, "lr": schedule.get_last_lr()},
            "ema_updates": None if self.ema is None else self.ema.optimization_step,
            "scaler": None if scaler is None else scaler.state_dict(),
            "recipe": self.recipe.to_dict(),
        }
        begun = None
        if self.sharded:
            paths = [begin_checkpoint(folder.checkpoints, position.step, tuple(shards)) if rank == 0 else None]
            (begun,) = broadcast_object_list(paths)
            assert begun is not None
            save_sharded(begun, shards)
        if self.accelerator.is_main_process:
            folder.save(position.step, tensors, state, begun)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path, *, accept_data: bool = False) -> RunPosition:
        """Put back everything that `save` wrote; each process reads the files.

        Args:
            accept_data: take a checkpoint that was trained on other rows.

        Raises:
            CheckpointError: it is damaged, or of another model.
            ValueError: the data has other rows.
        """
        state = read_state(checkpoint, ("samples", "recipe", "ema_updates", "scaler"))
        weights: dict[str, Any] = get_model_state_dict(self.model)
        own = {name: tensor for name, tensor in weights.items() if name not in self.frozen}
        check_architecture(checkpoint / "model.safetensors", own)
        for name in _changed_values(self.recipe.to_dict(), _with_new_names(state["recipe"])):
            if name.startswith("run.folder "):  # the folder may have moved
                continue
            logger.warning("%s: the recipe differs from the checkpoint's in %s", checkpoint, name)
        self._check_rows(checkpoint, state, accept_data)
        self._load_moments(checkpoint / "optimizer.safetensors")
        set_model_state_dict(
            self.model, _read_placed(checkpoint / "model.safetensors", own), options=StateDictOptions(strict=False)
        )
        if self.ema is not None:
            self._load_average(self.ema, checkpoint, state)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        rank = self.accelerator.process_index
        states = read_tensors(checkpoint / "rng.safetensors")
        if any(name.startswith(f"rank{rank}/") for name in states):
            set_rng_state(states, f"rank{rank}/")
        else:  # more ranks than before
            torch.manual_seed(mixed_seed(self.recipe.run.seed, rank, state["step"]))
        # earlier versions counted positions
        return RunPosition(state["step"], state["samples"], state.get("seen", state["samples"]))

    def _options(self) -> StateDictOptions:
        return StateDictOptions(full_state_dict=not self.sharded, cpu_offload=not self.sharded)

    def _weights(self) -> dict[str, Any]:
        """What was trained, and buffers, by the model's own names; each rank's part, or all on the first rank."""
        weights = get_model_state_dict(self.model, options=self._options())
        return {name: tensor for name, tensor in weights.items() if name not in self.frozen}

    def _moments(self) -> dict[str, torch.Tensor]:
        """State of the optimiser as "<parameter>/<moment>"; each rank's part, or all on the first rank."""
        found: Any = get_optimizer_state_dict(self.model, self.optimizer, options=self._options())
        # An optimiser may count its steps by a number.
        return {
            f"{name}/{kind}": torch.as_tensor(value)
            for name, values in found.get("state", {}).items()
            for kind, value in values.items()
        }

    def _check_rows(self, checkpoint: Path, state: Mapping[str, Any], accept_data: bool) -> None:
        """Refuse other data than before; a checkpoint that tells nothing of its rows is taken."""
        if self.rows is None or "rows.safetensors" not in state["files"]:
            return
        before = read_files(checkpoint / "rows.safetensors").get("rows")
        if before is None or before.shape[1:] != (2,) or before.dtype != torch.int64:
            raise CheckpointError(f"{checkpoint / 'rows.safetensors'} is damaged: it holds no (N, 2) int64 'rows'")
        differ = compare_rows(before, self.rows)
        if differ is not None and not accept_data:
            raise ValueError(
                f"{checkpoint} was trained on other rows: {differ}. Their order is another one, so the run would not "
                "go on as it was: put the data back, or pass accept_data=True to go on with the data that is there now"
            )
        if differ is not None:
            logger.warning("%s: going on with other rows: %s", checkpoint, differ)

    def _load_moments(self, path: Path) -> None:
        """Put the optimiser's state back, sharded as the weights are now."""
        created: Any = get_optimizer_state_dict(self.model, self.optimizer)  # brings the state into being
        held = {key.rpartition("/")[0] for key in read_shapes(path)}
        # A parameter without a gradient so far has no state yet, in a run that was not interrupted either.
        fresh = [name for name in created["state"] if name not in held] if held else []
        values = {
            f"{name}/{kind}": value
            for name, kinds in created["state"].items()
            for kind, value in kinds.items()
            if name not in fresh
        }
        like = {key: torch.as_tensor(value) for key, value in values.items()}
        check_architecture(path, like)
        moments: dict[str, Any] = {name: created["state"][name] for name in fresh}
        for key, tensor in _read_placed(path, like).items():
            name, _, kind = key.rpartition("/")
            moments.setdefault(name, {})[kind] = tensor if torch.is_tensor(values[key]) else tensor.item()
        loaded: dict[str, Any] = {"state": moments, "param_groups": created["param_groups"]}
        set_optimizer_state_dict(self.model, self.optimizer, loaded)
        for name in fresh:
            del self.optimizer.state[self.trained[name]]

    def _load_average(self, ema: EMAModel, checkpoint: Path, state: Mapping[str, Any]) -> None:
        if "ema.safetensors" not in state["files"]:
            raise CheckpointError(f"{checkpoint} was made without an average; set ema.decay: 0 or start anew")
        check_architecture(checkpoint / "ema.safetensors", self.trained)
        averages = _read_placed(checkpoint / "ema.safetensors", self.trained)
        for name, shadow in zip(self.trained, ema.shadow_params):
            shadow.copy_(averages[name])
        if state["ema_updates"] is None:
            raise CheckpointError(f"{checkpoint / 'state.json'} is damaged: 'ema_updates' is null beside an average")
        ema.optimization_step = state["ema_updates"]


def writes_shards(accelerator: Accelerator) -> bool:
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


def copy_shared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def _with_new_names(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint's recipe with what an earlier version called otherwise; as it is, where it is none of this one."""
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return parse_recipe(recipe, "the checkpoint").to_dict()
    except ValueError:
        return recipe


def _changed_values(new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of values that differ between two recipes."""
    names = []
    for key in sorted(new.keys() | old.keys()):
        a, b = new.get(key), old.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += _changed_values(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key} (now {a!r}, was {b!r})")
    return names


def _full_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, gathered if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _read_placed(path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors of a part of a checkpoint, sharded and placed as those of the same names in `like`."""
    tensors = {name: _place(tensor, like[name]) for name, tensor in read_files(path).items()}
    shards = {name: torch.empty_like(like[name]) for name in like.keys() - tensors.keys()}
    if shards:
        try:
            load_shards(shards_of(path), shards)
        except ShardError as error:
            raise CheckpointError(f"{shards_of(path)} cannot be read: {error}") from error
    return tensors | shards


def _place(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor sharded and placed as another is."""
    tensor = tensor.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor
