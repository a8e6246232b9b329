"""Control FLUX.2 by a depth map, and weaken a reference image: one pipeline of diffusers, no weight of it changes.

python docs/examples/control_flux2.py --adapter refcontrol.safetensors --depth depth.png --reference chair.png
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

from imgdit import Condition, OmniControl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="black-forest-labs/FLUX.2-klein-4B")
parser.add_argument("--adapter", required=True, help="condition adapter of this model: file, folder or Hub id")
parser.add_argument("--depth", required=True, help="depth map, near is white")
parser.add_argument("--reference", required=True, help="image of what should appear")
parser.add_argument("--prompt", default="the chair in a garden, morning light")
parser.add_argument("--size", type=int, default=1024)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--out", type=Path, default=Path("outputs/control_flux2"))
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = DiffusionPipeline.from_pretrained(options.model, dtype=dtype).to(device)
control = OmniControl(pipe)
print(control.load(options.adapter, adapter_name="depth"))
options.out.mkdir(parents=True, exist_ok=True)


def generate(name: str, **call) -> None:
    """One image with the same seed, so that the files differ by the control alone."""
    call |= {"height": options.size, "width": options.size, "num_inference_steps": options.steps}
    image = pipe(prompt=options.prompt, generator=torch.Generator().manual_seed(0), **call).images[0]
    image.save(options.out / f"{name}.png")


generate("plain")
depth = load_image(options.depth)
for strength in (0.5, 1.0):  # `end`: the last steps are free of it
    with control.use([Condition(depth, "depth", strength=strength, end=0.8)], height=options.size, width=options.size):
        generate(f"depth-{strength}")
reference = load_image(options.reference)
for strength in (0.3, 1.0):
    with control.references(strength=strength):
        generate(f"reference-{strength}", image=reference)
control.remove()  # the pipeline is bitwise what it was
print(f"wrote {len(list(options.out.glob('*.png')))} images to {options.out}")
