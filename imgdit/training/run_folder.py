"""The folder of a run, of a model's or of sparse autoencoders'.

<folder>/metrics.jsonl         a line per logged step
<folder>/checkpoints/          see `imgdit.io.checkpoints`
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from imgdit.io.atomic import write_text
from imgdit.io.checkpoints import latest_checkpoint, save_checkpoint
from imgdit.io.text import lines_or_errors


class RunFolder:
    """Metrics and checkpoints of a run. One process writes them.

    Args:
        path: the folder.
        keep: checkpoints that stay; older ones are deleted.
    """

    def __init__(self, path: str | Path, keep: int):
        self.path, self.keep = Path(path), keep
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; `None`: there is none yet."""
        return latest_checkpoint(self.checkpoints)

    def resumed_checkpoint(self, resume: bool) -> Path | None:
        """The checkpoint that a run goes on from; `None`: it begins anew.

        Raises:
            ValueError: there is one and `resume` is false.
        """
        found = self.latest_checkpoint()
        if found is not None and not resume:
            raise ValueError(f"{self.path} holds a run ({found.name}); pass resume=True or choose another run.folder")
        return found

    def begin_log(self, step: int) -> None:
        """Drop the lines of steps after `step`: they will be done again."""
        self.path.mkdir(parents=True, exist_ok=True)
        lines = lines_or_errors(self.metrics.read_bytes(), str(self.metrics)) if self.metrics.exists() else []
        kept = [line for line in lines if isinstance(line, str) and _step_of(line) <= step]
        write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        state: Mapping[str, Any],
        begun: Path | None = None,
    ) -> None:
        """Write a checkpoint, see `save_checkpoint`."""
        save_checkpoint(self.checkpoints, step, tensors, {"step": step, **state}, self.keep, begun=begun)


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps (0: never), and at the last, happens at this one."""
    return every > 0 and (step % every == 0 or step == last)


def _step_of(line: str) -> float:
    """Step of a line of metrics; a line that a kill cut short counts as later than all."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
