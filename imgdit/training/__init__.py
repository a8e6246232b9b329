"""Training: recipes, one loop, objectives, checkpoints that resume."""

from .config import Recipe, load_recipe
from .data import Batches
from .loop import train

__all__ = ["Batches", "Recipe", "load_recipe", "train"]
