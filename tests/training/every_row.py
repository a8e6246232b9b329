"""A run on people's own images that writes down the number and the rows of every batch it takes; as one process or
by torchrun on two CPU ranks, killed at a batch or (-1) whole.

    python every_row.py RECIPE FOLDER BATCH
"""

import os
import signal
import sys
from pathlib import Path

import torch

from imgdit.training import Batches, load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches


class Watched(Batches):
    def watch(self, path, killed_at):
        self.path, self.killed_at = path, killed_at
        return self

    def stream(self, *places):
        with open(self.path, "a") as file:
            for micro in super().stream(*places):
                (number,) = micro.indices  # endless data: its place in the run
                if number == self.killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                file.write(" ".join(map(str, [number, *self.dataset.index.rows_of(number)])) + "\n")
                file.flush()
                yield micro


if __name__ == "__main__":
    torch.set_num_threads(1)
    made, folder, killed_at = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    batches = training_batches(made)[0]
    watched = Watched(batches.dataset, batches.collate, seed=made.run.seed)
    watched.watch(folder / f"rows-{os.environ.get('RANK', '0')}.txt", killed_at)
    train(made, model=build_model(made), batches=watched, resume=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
