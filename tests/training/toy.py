"""A small world to train in: random tokens of two frames, a tiny model, a recipe."""

import random
from pathlib import Path

import numpy as np
import torch
from tiny import rope_config, tiny_mmdit

from imgdit import Frame, FrameLayout, MultiFrameFlowMatchScheduler
from imgdit.training import Batches, train
from imgdit.training.batches import Batch, Text
from imgdit.training.objectives.flow_matching import flow_matching
from imgdit.training.recipe import Recipe, parse_recipe

LAYOUT = FrameLayout.build([Frame((2, 2)), Frame((2, 2), index=1.0)], 4)


class Tokens:
    """Two frames of tokens and a text per sample, by their number."""

    def __init__(self, length: int = 11):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return [torch.randn(shape, generator=generator) for shape in ((8, 16), (4, 32), (32,))]


def collate(samples, layout=LAYOUT):
    tokens, embeddings, pooled = (torch.stack(part) for part in zip(*samples))
    empty = Text(torch.zeros(1, 4, 32), torch.zeros(1, 32))
    return Batch(tokens, layout, Text(embeddings, pooled), empty)


def fixed_noise(samples):
    """A batch whose levels and noise belong to its samples, so that it can be cut in any way."""
    batch = collate(samples)
    noise = batch.tokens.flip(1)
    sigmas = batch.tokens[:, :2, 0].sigmoid()
    return Batch(batch.tokens, batch.layout, batch.text, sigmas=sigmas, noise=noise)


def batch(size=3, layout=LAYOUT):
    dataset = Tokens()
    return collate([dataset[i] for i in range(size)], layout)


def recipe(folder: Path, **sections) -> Recipe:
    run = {"folder": str(folder), "steps": 4, "batch_size": 4, "log_every": 1, "tracker": "none"}
    objective = {"arguments": {"text_dropout": 0.0}}
    return parse_recipe({"objective": objective, **sections, "run": {**run, **sections.get("run", {})}}, "toy")


def global_noise(model, scheduler, batch, generator):
    """Flow matching whose loss also depends on every global random number generator."""
    output = flow_matching(model, scheduler, batch, generator)
    factor = 1 + torch.rand(()) + float(np.random.rand()) + random.gauss(0.0, 0.1)
    return output._replace(loss=output.loss * factor)


def toy_train(recipe, *, collate=collate, model=None, length=11, **options):
    """Train the tiny model; deterministic."""
    model = tiny_mmdit(rope_config(num_layers=1, num_single_layers=1)) if model is None else model
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    options.setdefault("batches", Batches(Tokens(length), collate, seed=3))
    result = train(recipe, model=model, scheduler=MultiFrameFlowMatchScheduler(), **options)
    return model, result
