"""Data that people have: folders, shards and data sets of images with captions."""

from imgdit.data.rows import Blob, Problem, Row, Rows
from imgdit.data.sources import open_rows

__all__ = ["Blob", "Problem", "Row", "Rows", "open_rows"]
