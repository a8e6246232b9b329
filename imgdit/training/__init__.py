"""Training: recipes, one loop, objectives, checkpoints that resume."""

from imgdit.io.order import Batches
from imgdit.training.loop import train
from imgdit.training.recipe import Recipe, load_recipe

__all__ = ["Batches", "Recipe", "load_recipe", "train"]
