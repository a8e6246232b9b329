"""Attach trained adapters to diffusers pipelines and to ours."""
