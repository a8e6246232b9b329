"""Data: scenes with exact ground truth, their sentences, and the tasks made of them."""
