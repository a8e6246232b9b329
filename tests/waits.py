"""Counts what would make a CPU wait for a GPU: reads of a tensor's values, and copies from the host.

On a CPU nothing waits, but the same operations are called: `int(x)`, `if x.any()`, `x.tolist()`, `x[mask]`,
`torch.equal` read; `torch.tensor(list)` and `x[list]` copy.
"""

import traceback
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_dim", "_unique2"}
COPIES = {"lift_fresh"}
METHODS = {getattr(torch.Tensor, name): name for name in ("cpu", "numpy", "tolist")}


class Waits(TorchDispatchMode):
    """`with Waits() as waits: ...`; then `waits.count` operations waited, `waits.where` says which and how often."""

    def __init__(self):
        super().__init__()
        self.where = Counter()
        self._methods = _Methods(self)

    @property
    def count(self) -> int:
        return self.where.total()

    def note(self, name: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
        ours = [frame for frame in stack if "/tests/" not in frame.filename]
        self.where[f"{name} at {ours[-1].filename}:{ours[-1].lineno}" if ours else name] += 1

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        counted = name == "repeat_interleave" and len(args) == 1 and not (kwargs or {}).get("output_size")
        if name in READS | COPIES or masked or counted:
            self.note(name)
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Sees the methods that read without an operation where the tensor is on the CPU already."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in METHODS:
            self.waits.note(METHODS[function])
        return function(*args, **(kwargs or {}))
