"""What the pipelines, the command line and the demo do where nobody says otherwise."""

STEPS = 28
"""Of a sampler."""
GUIDANCE = 3.0
"""Scale of classifier-free guidance."""
STRENGTH = 0.6
"""Fraction of the steps that run from a starting image."""
