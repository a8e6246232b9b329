"""Noise schedules over frames."""
