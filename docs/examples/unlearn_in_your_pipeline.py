"""Remove a concept from your own pipeline: train sparse autoencoders on it once, then generate with and without.

python docs/examples/unlearn_in_your_pipeline.py --recipe own/sae_flux2 --concept cartoon --prompt "a cartoon of a cat"

The recipe names the pipeline, the hookpoints and the prompts of the concepts. Training resumes where it stopped; when
it is done, further runs of this script only generate.
"""

import argparse
from pathlib import Path

import torch

from imgdit import ConceptUnlearner
from imgdit.training.sae_recipe import load_sae_recipe
from imgdit.training.sae_run import load_pipeline, train_saes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--recipe", default="own/sae_flux2", help="packaged recipe or YAML file")
parser.add_argument("--concept", required=True)
parser.add_argument("--prompt", required=True, help="names the concept")
parser.add_argument("--out", type=Path, default=Path("outputs/unlearn"))
options = parser.parse_args()

recipe = load_sae_recipe(options.recipe)
pipe = load_pipeline(recipe)
saes = Path(recipe.run.folder) / "saes"
if not saes.is_dir():
    saes = Path(train_saes(recipe, pipe=pipe, resume=True).folder)
unlearner = ConceptUnlearner.from_pretrained(saes)
print(f"known concepts: {', '.join(unlearner.concepts)}")
options.out.mkdir(parents=True, exist_ok=True)


def generate(name: str) -> None:
    """One image with the same seed and the recipe's settings."""
    call = {**recipe.pipeline.call, "generator": torch.Generator().manual_seed(0)}
    pipe(prompt=options.prompt, **call).images[0].save(options.out / f"{name}.png")


generate("with")
for mode in ("scale", "remove"):
    with unlearner.attach(pipe, [options.concept], mode=mode):
        generate(f"without-{mode}")
print(f"wrote with.png, without-scale.png and without-remove.png to {options.out}")
