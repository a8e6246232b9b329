"""Reads thousands of wrong inputs and says what came of it. Run by test_fuzz.py, by `make fuzz`, or by hand:

    PYTHONPATH=.:tests python tests/fuzz/hammer.py FOLDER all|lora,sae,… SHARE [SEED]

SHARE is the part of the usual number of inputs. What no input may cause is printed with the input's number and kept in
FOLDER, and the exit status is then 1.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from fuzz.guard import Broken, Guard, limit_memory
from fuzz.loaders import LOADERS
from PIL import Image


def hammer(name: str, folder: Path, guard: Guard, inputs: int, seed: int) -> dict:
    """Try one loader; counts, the slowest input, and what went wrong by its kind."""
    loader = LOADERS[name]
    valid, tried = folder / f"{name}-valid", folder / "input"
    valid.mkdir()
    loader.make(valid)
    shutil.rmtree(tried, ignore_errors=True)
    shutil.copytree(valid, tried)
    loader.load(tried)  # imports whatever is imported late
    read(loader, valid, tried, guard, lambda: None)  # a valid input is taken
    outcomes: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    slowest = 0.0
    for number in range(inputs):
        rng = random.Random(f"{name}-{seed}-{number}")
        started = time.process_time()
        try:
            read(loader, valid, tried, guard, lambda rng=rng: loader.change(rng, tried))
            outcomes["taken"] += 1
        except loader.documented as error:
            outcomes[f"refused: {type(error).__name__}"] += 1
        except (Broken, Exception) as error:
            outcomes[f"WRONG: {type(error).__name__}"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {str(error)[:120]}"
            if kind not in wrong:
                wrong[kind] = f"input {number}\n" + "".join(traceback.format_exception(error))[-3000:]
                shutil.copytree(tried, folder / f"wrong-{name}-{number}", symlinks=True, dirs_exist_ok=True)
        slowest = max(slowest, time.process_time() - started)
    return {"inputs": inputs, "outcomes": dict(outcomes), "slowest": round(slowest, 2), "wrong": wrong}


def read(loader, valid, tried, guard, change) -> None:
    shutil.rmtree(tried, ignore_errors=True)
    shutil.copytree(valid, tried)
    change()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # as the demo has it
        with guard.watch():
            loader.load(tried)


def main() -> int:
    folder, names, fraction = Path(sys.argv[1]), sys.argv[2].split(","), float(sys.argv[3])
    names = list(LOADERS) if names == ["all"] else names
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    logging.disable(logging.CRITICAL)
    faulthandler.enable()
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(folder / "secret.png")
    (folder / "input").mkdir(exist_ok=True)
    os.chdir(folder)
    guard = Guard(folder / "input")
    limit_memory()  # after torch was imported: what that maps is no input's fault
    bad = 0
    for name in names:
        faulthandler.dump_traceback_later(3600, exit=True)
        started = time.process_time()
        told = hammer(name, folder, guard, max(1, round(LOADERS[name].inputs * fraction)), seed)
        wrong = told.pop("wrong")
        told |= {"loader": name, "seconds": round(time.process_time() - started, 1)}
        told |= {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
        print(json.dumps(told), flush=True)
        for kind, trace in wrong.items():
            bad += 1
            print(f"--- {name}: {kind}\n{trace}", flush=True)
    ran = [path.name for path in folder.rglob("*-ran")]
    assert not ran, ran
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
