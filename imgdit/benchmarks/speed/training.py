"""What the training loop costs over a plain one: the same model, batches, noise and optimiser."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imgdit.benchmarks.speed.timing import Comparison, peak_memory
from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.models.mmdit import MMDiT
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training import Batches, train
from imgdit.training.batches import Batch, ObjectiveOutput, Text
from imgdit.training.objectives.flow_matching import flow_matching
from imgdit.training.optimizers import optimizer_groups
from imgdit.training.recipe import Recipe, parse_recipe

TEXT, GRID = 20, (8, 8)


class TrainingCost(NamedTuple):
    """A step of the training loop against one of a plain loop."""

    time: Comparison
    """`difference` is that of the losses."""
    memory: float
    """Peak bytes of a run over the plain loop's."""


def training_cost(model: MMDiT, *, batch_size: int = 8, rounds: int = 9) -> TrainingCost:
    """Forward, backward, clipping and AdamW of one step, ours inside `imgdit.training.train`, without an average.

    Both loops run in turn, step by step; the first step of each is not counted.

    Args:
        model: neither it nor its gradients change.
        batch_size: scenes of one frame of 64 tokens with 20 of text.
    """
    plain = _PlainLoop(copy.deepcopy(model), batch_size)
    ours: list[float] = []
    other: list[float] = []
    losses: list[float] = []
    ended = math.nan

    def objective(trained: Any, scheduler: Any, batch: Batch, generator: torch.Generator | None) -> ObjectiveOutput:
        """Called once per step: what passed since the last call is the rest of the step before."""
        nonlocal ended
        if not math.isnan(ended):
            ours.append(time.process_time() - ended)
        started = time.process_time()
        loss = plain.step(batch, _again(generator))
        other.append(time.process_time() - started)
        ended = time.process_time()
        output = _loss(trained, scheduler, batch, generator)
        losses.append(abs(loss - float(output.loss.detach())))
        return output

    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder) / "time", batch_size, rounds + 2)
        batches = Batches(_Scenes(model), _collate, seed=0)
        scheduler = MultiFrameFlowMatchScheduler()
        train(recipe, model=copy.deepcopy(model), batches=batches, objective=objective, scheduler=scheduler)
        pairs = list(zip(ours[1:], other[1:]))

        recipe = _recipe(Path(folder) / "memory", batch_size, 2)
        run = copy.deepcopy(model)
        most = peak_memory(lambda: train(recipe, model=run, batches=batches, objective=_loss, scheduler=scheduler))
        plain = _PlainLoop(copy.deepcopy(model), batch_size)
        stream = batches.stream(0, batch_size, 0, 1)  # its batches count, as they do in the other loop
        least = peak_memory(
            lambda: [plain.step(next(stream).batch, torch.Generator().manual_seed(i)) for i in range(2)]
        )
    ratios = [a / b for a, b in pairs]
    row = Comparison(
        f"training step, {batch_size} scenes",
        "the same model in a plain loop",
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        max(losses),
    )
    return TrainingCost(row, most / least)


_loss = functools.partial(flow_matching, text_dropout=0.0)


def training_seconds(
    model: MMDiT, *, batch_size: int, rounds: int, precision: str, device: torch.device
) -> tuple[float, int]:
    """Median seconds of a step of `imgdit.training.train`, by the clock, and most bytes held during the run.

    Args:
        model: changes in training.
        batch_size: scenes of one frame of 64 tokens with 20 of text.
        rounds: counted steps; three more come before.
        precision: accelerate's `mixed_precision`.
        device: on which the training runs, the one that accelerate finds.
    """
    began: list[float] = []

    def objective(trained: Any, scheduler: Any, batch: Batch, generator: torch.Generator | None) -> ObjectiveOutput:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began.append(time.perf_counter())
        return _loss(trained, scheduler, batch, generator)

    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder) / "run", batch_size, rounds + 4, precision)
        batches = Batches(_Scenes(model), _collate, seed=0)
        scheduler = MultiFrameFlowMatchScheduler()
        memory = peak_memory(
            lambda: train(recipe, model=model, batches=batches, objective=objective, scheduler=scheduler), device
        )
    return statistics.median(b - a for a, b in pairwise(began[3:])), memory


def _again(generator: torch.Generator | None) -> torch.Generator:
    assert generator is not None
    return generator.clone_state()


class _PlainLoop:
    """The step that one would write without a library."""

    def __init__(self, model: MMDiT, batch_size: int) -> None:
        self.model = model.train()
        self.scheduler = MultiFrameFlowMatchScheduler()
        config = _recipe(Path("unused"), batch_size, 1).optimizer
        groups = optimizer_groups(model, config)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        self.clip = config.clip_norm

    def step(self, batch: Batch, generator: torch.Generator) -> float:
        loss = _loss(self.model, self.scheduler, batch, generator).loss
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class _Scenes(torch.utils.data.Dataset):
    """Random tokens and text of scenes, by their number."""

    def __init__(self, model: MMDiT) -> None:
        config = model.config
        tokens = (GRID[0] * GRID[1], model.token_channels)
        self.shapes = (tokens, (TEXT, config.joint_attention_dim), (config.pooled_projection_dim,))

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return [torch.randn(shape, generator=generator) for shape in self.shapes]


def _collate(samples: list[list[torch.Tensor]]) -> Batch:
    tokens, embeddings, pooled = (torch.stack(part) for part in zip(*samples))
    return Batch(tokens, FrameLayout.build([Frame(GRID)], TEXT), Text(embeddings, pooled))


def _recipe(folder: Path, batch_size: int, steps: int, precision: str = "no") -> Recipe:
    run = {"folder": str(folder), "steps": steps, "batch_size": batch_size, "log_every": 100, "tracker": "none"}
    sections = {"ema": {"decay": 0.0}, "schedule": {"kind": "constant"}}
    return parse_recipe({"run": {**run, "mixed_precision": precision}, **sections}, "speed")
