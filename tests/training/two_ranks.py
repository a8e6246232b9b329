"""Run by torchrun on two CPU ranks, or as one process: a few steps, stopped and resumed half-way, whose metrics and
weights the test compares."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from training.toy import collate, recipe, toy_train

from imgdit.training import loop


def fully_sharded(**options):
    """The accelerator of an FSDP2 launch. accelerate offers it on GPUs only, although torch shards on CPUs too."""
    accelerator = Accelerator(**options)
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # `accelerate launch` said how
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    else:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            state_dict_type="FULL_STATE_DICT",
        )
    return accelerator


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, accumulation, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if kind == "fsdp2":
        loop.Accelerator = fully_sharded
    made = recipe(
        folder,
        run={"accumulation": accumulation, "steps": 4, "evaluate_every": 1},
        optimizer={"eps": 1e-4},  # Adam divides rounding by the size of the gradient; eps keeps it small
        objective={"arguments": {"text_dropout": 0.3}},
    )
    held_out = [collate([[torch.ones(8, 16), torch.ones(4, 32), torch.ones(32)]])]
    toy_train(made, held_out=held_out, stop_at=2)
    toy_train(made, held_out=held_out, resume=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
