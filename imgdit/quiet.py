"""Messages of other libraries that say nothing to somebody who did nothing wrong: kept back, each by its own text.

The cause of each lies in what is installed or in how those libraries call each other; none says that a result differs.
"""

from __future__ import annotations

import logging
import sys
import warnings

UNASKED = (
    ("xformers", "xFormers can't load C++/CUDA extensions"),  # wanted on CUDA only, see `_wanted`
    # diffusers imports these processors by their old names; imgdit uses them nowhere.
    ("transformers.utils.import_utils", "requires torchvision (not installed)"),
    # Said when a tokenizer is read beside a model that transformers has no class for.
    ("transformers.configuration_utils", "You are using a model of type `mmada` to instantiate a model of type ``"),
)
"""Logger and a part of its message."""
UNWARNED = (
    # Under autocast the gains of norms stay float32, as they are trained; the other kernel gives the same numbers.
    ("Mismatch dtype between input and weight", UserWarning, r"torch\.nn\.functional"),
    # A second condition's adapter beside the first is what is asked for.
    ("Already found a `peft_config` attribute in the model", UserWarning, r"peft\.tuners\.tuners_utils"),
)
"""Beginning of a warning, its class, and the module it is laid to."""


class _KeepBack(logging.Filter):
    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage() or _wanted(record)


def _wanted(record: logging.LogRecord) -> bool:
    """Whether a message concerns this machine: xformers computes on CUDA only."""
    torch = sys.modules.get("torch")
    return record.name == "xformers" and torch is not None and torch.cuda.is_available()


def keep_back() -> None:
    """Keep the messages of `UNASKED` and `UNWARNED` back, from now on and once for all. Costs no import."""
    for text, category, module in UNWARNED:
        warnings.filterwarnings("ignore", text, category, module)
    for name, text in UNASKED:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _KeepBack) and one.text == text for one in logger.filters):
            logger.addFilter(_KeepBack(text))
