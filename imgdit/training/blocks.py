"""Where the blocks of a transformer are."""

from __future__ import annotations

import re
from typing import Any

from imgdit.adapters.prepare import blocks_of


def block_paths(model: Any) -> list[str]:
    """Paths of a transformer's blocks, in the order in which they run."""
    found = [block.name for block in blocks_of(model)]
    return found or [name for name, _ in model.named_modules() if re.search(r"_blocks\.\d+$", name)]
