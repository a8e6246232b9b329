"""Work of a rank: a few steps of an adapter of conditions on the stock transformer of a family, with one process or
several, whose gradients and weights the test compares."""

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny_families import random, trained_model

from imgdit import Frame, FrameLayout
from imgdit.family import find_family
from imgdit.training import Batches, load_recipe, loop, train
from imgdit.training.batches import Batch, Text
from imgdit.training.recipe import ADAPTER

GRID = (4, 4)


class Images:
    """Images with a condition each and texts of unequal lengths, whose noise and level are their own: batches may be
    cut in any way."""

    def __init__(self, model):
        family = find_family(model)
        self.channels, self.width = family.tokens.channels(model), family.training.text_width(model)
        frames = [Frame(GRID), Frame(GRID, sigma=0.0, adapter=ADAPTER, sees="joint")]
        self.layout = FrameLayout.build(frames, 6)

    def __len__(self):
        return 4

    def __getitem__(self, number):
        mask = torch.arange(6) < (6, 4, 5, 3)[number]
        level = torch.tensor([0.2 + 0.2 * number, 0.0])
        parts = [random(6, self.width, seed=10 + number), mask, level]
        return [random(32, self.channels, seed=20 + number), random(32, self.channels, seed=30 + number), *parts]

    def batch(self, samples):
        tokens, noise, text, mask, sigmas = (torch.stack(part) for part in zip(*samples, strict=True))
        text = Text(text, torch.empty(len(text), 0), mask)
        return Batch(tokens, self.layout, text, sigmas=sigmas, noise=noise)


def sharded(**options):
    """The accelerator of an FSDP2 launch, which accelerate offers on GPUs only, although torch shards on CPUs too."""
    accelerator = Accelerator(**options)
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
    )
    return accelerator


def steps(case, folder, checkpointing=False):
    """Two steps of four images."""
    model = trained_model(case)
    if checkpointing:
        model.enable_gradient_checkpointing()
    images = Images(model)
    recipe = load_recipe("own/condition_lora").replace(
        run={"folder": str(folder), "steps": 2, "batch_size": 4, "accumulation": 1, "mixed_precision": "no",
             "log_every": 1, "tracker": "none"},
        objective={"arguments": {"text_dropout": 0.0, "condition_dropout": 0.0}},
        optimizer={"lr": 0.05, "eps": 1e-3},  # Adam divides rounding by the size of the gradient
        schedule={"warmup": 0},
        ema={"decay": 0.0},
    )  # fmt: skip
    train(recipe, model=model, batches=Batches(images, images.batch, seed=0))


def rank(number, ranks, folder, kind, work, *args):
    """`work` as one of several processes on this machine."""
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": (folder / "port").read_text(),
        "ACCELERATE_USE_CPU": "true",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    if kind == "fsdp2":
        loop.Accelerator = sharded
    work(*args)
    torch.distributed.destroy_process_group()
