"""How weights after recorded training steps of `mup` (tests/parity/mup) are compared."""

import torch


def assert_trained_alike(got: torch.Tensor, recorded: torch.Tensor, name: str) -> None:
    """All entries within the record's 1e-5 but one in a thousand, and those within a tenth of one update (0.008).

    Adam divides a gradient by its own size: where the exact one is nearly zero, the rounding of the processor decides
    how far the entry moves.
    """
    apart = (got - recorded).abs()
    far = int((apart > 1e-5).sum())
    assert far <= max(1, recorded.numel() // 1000), f"{name}: {far} of {recorded.numel()} entries differ by over 1e-5"
    assert apart.max() <= 8e-4, f"{name}: an entry differs by {float(apart.max()):.2g}"
