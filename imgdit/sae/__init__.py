"""Sparse autoencoders: find the features of a concept, show them, steer them, unlearn the concept at inference."""
