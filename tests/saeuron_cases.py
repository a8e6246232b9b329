"""The recorded cases, by kind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imgdit.sae.model import SparseAutoencoder, load_sae

FOLDER = Path(__file__).parent / "parity" / "saeuron"
CASES = json.loads((FOLDER / "cases.json").read_text())


def cases(kind: str):
    """Parametrise a test with `name, case` over all cases of a kind."""
    return pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["kind"] == kind])


def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / CASES[name]["file"])


def sae_of(case: dict) -> SparseAutoencoder:
    return load_sae(FOLDER / case["sae"])


def close(got, expected, atol, rtol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float32), torch.as_tensor(expected, dtype=torch.float32), atol=atol, rtol=rtol
    )


def dense(acts, indices, latents):
    return torch.zeros(len(acts), latents).scatter(1, indices, acts)
