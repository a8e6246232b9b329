"""Run as a process of its own: trains by a recipe on random tokens and prints by how many bytes the process grew at
its peak, as the kernel counts them."""

import gc
import sys

import torch
from accelerate.state import AcceleratorState
from training.toy import Tokens
from training.toy import collate as plain

from imgdit import Frame, FrameLayout
from imgdit.training import Batches, train
from imgdit.training.batches import Batch, Text
from imgdit.training.build import build_model
from imgdit.training.recipe import load_recipe

SIDE, TEXT, SAMPLES = 24, 64, 2


def layout(condition):
    frames = [Frame((SIDE, SIDE))]
    if condition:
        frames.append(Frame((SIDE, SIDE), sigma=0.0, adapter="trained", sees="self"))
    return FrameLayout.build(frames, TEXT)


class Samples(Tokens):
    """`SAMPLES` samples at once, of the sizes of a model."""

    def __init__(self, model, condition):
        super().__init__(16)
        self.layout, self.config, self.channels = layout(condition), model.config, model.token_channels

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        tokens = torch.randn(SAMPLES, self.layout.image_length, self.channels, generator=g)
        text = torch.randn(SAMPLES, TEXT, self.config.joint_attention_dim, generator=g)
        return Batch(
            tokens, self.layout, Text(text, torch.randn(SAMPLES, self.config.pooled_projection_dim, generator=g))
        )


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def warm_up(folder):
    """Whatever is made once: imports, thread pools, the loop's own things."""
    from training.toy import recipe, toy_train

    toy_train(recipe(folder, run={"steps": 1}), collate=plain)
    AcceleratorState._reset_state()  # remembers the precision of the first run in a process


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = load_recipe(sys.argv[1])
    warm_up(sys.argv[2])
    gc.collect()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak begins anew
    before = resident("VmRSS")
    model = build_model(made)
    batches = Batches(Samples(model, made.objective.name == "condition_lora"), lambda batch: batch[0], seed=0)
    train(made, model=model, batches=batches, stop_at=3)
    print("grew by", resident("VmHWM") - before)
