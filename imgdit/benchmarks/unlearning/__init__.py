"""Concept unlearning: methods, scores, tables."""
