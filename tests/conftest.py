import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Two workers share two cores; torch's own threads would only compete."""
    torch.set_num_threads(1)
