"""Run commands of `imgdit`, one after another in one fresh process: a JSON array of them on the standard input. The
modules of the demo are imported too.

What other libraries say at import is said here, and a warning that is laid to a module of ours is an error.
"""

import importlib
import json
import sys
import warnings

import torch

warnings.filterwarnings("error", module=r"imgdit(\.|$)")
app = importlib.import_module("imgdit.apps.cli").app
for name in ("imgdit.apps.demo", "imgdit.adapters.omni_control"):
    importlib.import_module(name)
torch.set_num_threads(1)
for words in json.load(sys.stdin):
    try:
        app(words)
    except SystemExit as end:
        if end.code:
            sys.exit(f"imgdit {' '.join(words)} ended with {end.code}")
