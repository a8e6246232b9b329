import pytest
import torch
from accelerate.state import AcceleratorState


def pytest_addoption(parser):
    parser.addoption("--load-seconds", type=float, default=20, help="how long the demo is kept busy by 32 people")


@pytest.fixture(autouse=True)
def _one_thread():
    """Two workers share two cores; torch's own threads would only compete."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps the first precision of a process and refuses another; fixtures of modules train too."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
