"""`Studio`, as version 0.1 called a session; it goes with version 0.3."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from imgdit.apps.jobs.request import Request
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Generated, Session, Watch
from imgdit.pipelines.load_options import AUTO, LoadOptions


class Studio(Session):
    """A session that opens its pipeline's folder itself; see `Session`.

    Args:
        source: folder or Hub repository of a pipeline.
        adapters: folder of condition adapters; the pipeline folder's own by default.
        sae: folder of sparse autoencoders; the pipeline folder's own by default.
        loading: precision, device, offloading and bits.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        adapters: Path | None = None,
        sae: Path | None = None,
        loading: LoadOptions = AUTO,
    ):
        warnings.warn("Studio(folder) is now Session(Shelf(folder))", DeprecationWarning, stacklevel=2)
        super().__init__(Shelf(source, adapters, sae), loading)

    def make(self, request: Request, watch: Watch | None = None) -> Generated:
        """`Session.generate`."""
        return self.generate(request, watch)

    def __getattr__(self, name: str) -> Any:
        """What the shelf has was the studio's."""
        return getattr(super().__getattribute__("shelf"), name)
