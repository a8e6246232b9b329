"""A part of a run, as one process or on two CPU ranks: it goes on where the part before it stopped."""

import sys
from pathlib import Path

import torch
from training.toy import recipe, toy_train
from training.two_ranks import fully_sharded

from imgdit.training import loop

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, accumulation, kind, stop_at = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if kind == "fsdp2":
        loop.Accelerator = fully_sharded
    made = recipe(
        folder,
        run={"accumulation": accumulation, "steps": 20},
        optimizer={"eps": 1e-4},  # Adam divides rounding by the size of the gradient; eps keeps it small
        objective={"arguments": {"text_dropout": 0.3}},
    )
    toy_train(made, resume=True, stop_at=stop_at)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
