"""The demo with a tiny model, in a process of its own, whose memory test_load.py looks at. Prints its address."""

import sys
import threading
from pathlib import Path

import torch
from tiny import tiny_pipeline

from imgdit.apps.demo import app
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    tiny_pipeline().save_pretrained(folder / "model")
    _, address, holder = app.serve(Session(Shelf(folder / "model")), results=folder / "mup")
    print("address", address, flush=True)
    print("results", holder.folder, flush=True)
    sys.stdin.readline()  # until the test is done
    holder.close()
    threading.Timer(5, sys.exit).start()
