"""Metrics, probes and benchmarks."""
