"""What imports torch is imported where it is needed: the process that only deals tests out to others needs none."""

import gc
from functools import cache

import pytest
import typer.testing

# `imgdit` takes 0.1 s to be built from its 60 functions, and tests call it hundreds of times.
typer.testing._get_command = cache(typer.main.get_command)


def pytest_addoption(parser):
    parser.addoption("--load-seconds", type=float, default=20, help="how long the demo is kept busy by 32 people")


def pytest_collection_finish(session):
    """What was imported lives until the end: collections of garbage need not look through its two million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    """Two workers share two cores; torch's own threads would only compete."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps the first precision of a process and refuses another; fixtures of modules train too."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
