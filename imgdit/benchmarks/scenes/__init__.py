"""Scores on scenes, whose truth is exact."""
