"""Train a condition adapter on a folder of images, write it as a file, and use it in the pipeline.

python docs/examples/train_a_condition.py --images training_images --model black-forest-labs/FLUX.2-klein-4B

Captions lie beside the images (0001.txt beside 0001.png). The condition is the grey image, which is computed; edges
("canny") need OpenCV. The run resumes where it stopped.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

from imgdit import Condition, OmniControl
from imgdit.images.preprocess import find_preprocessor
from imgdit.lora.files import AdapterInfo, adapter_pairs, write_adapter
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.recipe import ADAPTER
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=Path, required=True)
parser.add_argument("--model", required=True, help="folder or Hub id of a pipeline")
parser.add_argument("--condition", default="grey", help="grey, canny, blur, mask, super_resolution")
parser.add_argument("--size", type=int, default=512)
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--out", type=Path, default=Path("outputs/train_a_condition"))
options = parser.parse_args()

own = {"path": str(options.images), "model": options.model, "base": options.size, "samples": 1, "mode": "independent"}
own |= {"condition": options.condition, "preprocessor": options.condition, "cache": str(options.out / "cache")}
gpu = torch.cuda.is_available()
# Without a scheduler in the recipe, noise levels are drawn as the model's own scheduler shifts its steps.
base = dataclasses.replace(load_recipe("own/condition_lora"), scheduler={})
recipe = base.replace(
    run={"folder": str(options.out / "run"), "steps": options.steps, "mixed_precision": "bf16" if gpu else "no"},
    model={
        "pretrained": options.model,
        "gradient_checkpointing": gpu,
        "dtype": "bfloat16" if gpu else "float32",
    },
    adapter={"rank": 16},
    data={"arguments": own},
    optimizer={"lr": 1e-4},
    schedule={"kind": "constant", "warmup": 0},
    ema={"decay": 0.0},
    objective={"arguments": {"text_dropout": 0.1, "condition_dropout": 0.1}},
)
result = train(
    recipe, model=build_model(recipe), batches=training_batches(recipe)[0], resume=(options.out / "run").is_dir()
)
print(f"step {result.step}: loss {result.metrics.get('loss', float('nan')):.4f}")

info = AdapterInfo(options.model, options.condition, "aligned", 1.0, "independent", options.size)
pairs = adapter_pairs(load_trained(result.checkpoint), ADAPTER)
file = write_adapter(options.out / "adapter.safetensors", pairs, info)

pipe = DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16 if gpu else torch.float32)
control = OmniControl(pipe.to("cuda" if gpu else "cpu"))
print(control.load(file, adapter_name=options.condition))
first = next(path for path in sorted(options.images.iterdir()) if path.suffix in (".png", ".jpg", ".webp"))
shown = find_preprocessor(options.condition)(load_image(str(first)))[0]
call = {"height": options.size, "width": options.size, "num_inference_steps": 4}
with control.use([Condition(shown, options.condition)], height=options.size, width=options.size):
    image = pipe(prompt="a photo", generator=torch.Generator().manual_seed(0), **call).images[0]
image.save(options.out / "controlled.png")
print(f"wrote {file} and {options.out / 'controlled.png'}")
