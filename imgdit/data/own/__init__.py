"""Data that people have: folders, shards and data sets of pictures with captions."""

from .rows import Blob, Problem, Row, Rows
from .sources import open_rows

__all__ = ["Blob", "Problem", "Row", "Rows", "open_rows"]
