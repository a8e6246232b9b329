"""`imgdit bench gpu`: everything that only a GPU can show, in pieces that are kept one by one.

A piece that was interrupted or failed is run again by the next call; one that is there is not.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imgdit.benchmarks.speed import sae as sae_speed
from imgdit.benchmarks.speed import shapes
from imgdit.benchmarks.speed.command_line import machine as described
from imgdit.benchmarks.speed.families import TINY, Size
from imgdit.benchmarks.speed.large import LARGE, LargeRow, large_costs
from imgdit.benchmarks.speed.large import TINY as TINY_MMDIT
from imgdit.benchmarks.speed.large import model_of as mmdit_of
from imgdit.benchmarks.speed.pipeline import load
from imgdit.benchmarks.speed.shapes import Machine, Row
from imgdit.benchmarks.speed.timing import Comparison
from imgdit.benchmarks.speed.training import training_seconds
from imgdit.checkpoints import SCENES
from imgdit.io.atomic import write_text
from imgdit.io.safe_json import read_object

BATCH = 64
"""Of the embedded model's training step."""


class Job(NamedTuple):
    """What is asked for."""

    machine: Machine
    tiny: bool
    """Small models instead, to see that everything runs."""
    tests: Path | None = None
    """File of tests to run first."""

    def size(self, size: Size) -> Size:
        """Of a shape."""
        return TINY if self.tiny else size


def _tests(job: Job) -> Iterator[Row]:
    """Tests that need a GPU; they are skipped elsewhere."""
    if job.tests is None:
        return
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(job.tests)]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2].strip(" =")
    if done.returncode:
        raise RuntimeError(f"{job.tests}: {last}\n{done.stdout[-4000:]}")
    yield Row(str(job.tests.name), "", time.perf_counter() - started, note=last)


def _mmdit(job: Job, variants: tuple[Any, ...]) -> Iterator[Row]:
    size, machine = TINY_MMDIT if job.tiny else LARGE, job.machine
    options: dict[str, Any] = {"device": machine.device, "dtype": machine.dtype, "compiler": machine.compiler}
    for row in large_costs(size, backends=("native",), variants=variants, rounds=machine.rounds, **options):
        yield _row_of(row)


def _row_of(row: LargeRow) -> Row:
    note = f"{row.recompiled} graphs compiled anew" if row.recompiled else ""
    work = f"MMDiT: {row.work}, {row.variant}"
    return Row(work, row.against, row.seconds, row.ratio, row.low, row.high, row.fraction, note=note)


def _sae(job: Job) -> Iterator[Row]:
    """Training step and hooks; their sizes are small anyway."""
    rounds, device = job.machine.rounds, job.machine.device
    if not job.tiny:
        yield _ratio(sae_speed.training_comparison(rounds=rounds, device=device))
    for row in sae_speed.hook_comparisons(rounds=rounds, device=device):
        yield _ratio(row)


def _ratio(row: Comparison) -> Row:
    return Row(f"SAE: {row.work}", row.against, row.ours, row.ratio, row.low, row.high)


def _training(job: Job) -> Iterator[Row]:
    """The training loop with the embedded model."""
    model = mmdit_of(TINY_MMDIT) if job.tiny else load(SCENES).transformer
    batch = 2 if job.tiny else BATCH
    precision = "no" if job.machine.dtype == torch.float32 else "bf16"
    seconds, memory = training_seconds(
        model, batch_size=batch, rounds=job.machine.rounds, precision=precision, device=job.machine.device
    )
    work = f"training step of the embedded model, {batch} images"
    yield Row(work, "", seconds, memory=memory, note=f"{batch / seconds:.0f} images/s")


PIECES: dict[str, Callable[[Job], Iterator[Row]]] = {
    "tests": _tests,
    "flux1": lambda job: shapes.eager_rows("FLUX.1", job.size(shapes.FLUX1), job.machine),
    "flux2": lambda job: shapes.eager_rows("FLUX.2", job.size(shapes.KLEIN), job.machine),
    "mmdit": lambda job: _mmdit(job, ("eager",)),
    "training": _training,
    "sae": _sae,
    "offload": lambda job: shapes.offload_rows("FLUX.1", job.size(shapes.OFFLOADED), job.machine),
    "flux1-compiled": lambda job: shapes.compiled_rows("FLUX.1", job.size(shapes.FLUX1), job.machine),
    "flux2-compiled": lambda job: shapes.compiled_rows("FLUX.2", job.size(shapes.KLEIN), job.machine),
    "mmdit-compiled": lambda job: _mmdit(job, ("compiled",)),
}
"""In the order in which they run: what takes longest to compile comes last."""


def run(
    job: Job, out: Path, names: Iterable[str], *, minutes: float, say: Callable[[str], None] = print
) -> dict[str, str]:
    """Run the pieces that `out` does not hold yet.

    Args:
        job: what is measured.
        out: folder of a JSON file per piece.
        names: of pieces, of `PIECES`.
        minutes: no piece begins later.
        say: gets a line per piece and per row.

    Returns:
        Of each piece "there", "done", "no time left", or the error that ended it.

    Raises:
        ValueError: `out` holds pieces of another job or machine.
    """
    about = _settings(job)
    out.mkdir(parents=True, exist_ok=True)
    _check_folder(out, about)
    started, states = time.monotonic(), {}
    for name in names:
        file = out / f"{name}.json"
        if file.exists() and "error" not in read_object(file):
            states[name] = "there"
        elif time.monotonic() - started > 60 * minutes:
            states[name] = "no time left"
        else:
            states[name] = _piece(job, name, file, about, say)
        say(f"{name}: {states[name].partition(chr(10))[0]}")
    return states


def _piece(job: Job, name: str, file: Path, about: Mapping[str, Any], say: Callable[[str], None]) -> str:
    rows: list[Row] = []
    content: dict[str, Any] = {"settings": dict(about), "machine": described()}
    started = time.perf_counter()
    try:
        for row in PIECES[name](job):
            rows.append(row)
            say(line(row))
        state = "done"
    except Exception as error:  # the other pieces are worth having, and the next call tries this one again
        state = content["error"] = f"{type(error).__name__}: {error}"
    content |= {"seconds": time.perf_counter() - started, "rows": [{**r._asdict(), "met": r.met} for r in rows]}
    write_text(file, json.dumps(content, indent=1))
    torch.compiler.reset()
    gc.collect()
    if job.machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return state


def collect(out: Path) -> list[Row]:
    """The rows of all pieces that a folder holds, in the order of `PIECES`."""
    found = []
    for name in PIECES:
        file = out / f"{name}.json"
        for values in read_object(file)["rows"] if file.exists() else []:
            found.append(Row(**{key: value for key, value in values.items() if key != "met"}))
    return found


def write(out: Path) -> Path:
    """All pieces as one file, `gpu.json`."""
    pieces = {name: read_object(out / f"{name}.json") for name in PIECES if (out / f"{name}.json").exists()}
    write_text(out / "gpu.json", json.dumps(pieces, indent=1))
    return out / "gpu.json"


HEAD = "| work | against | step | ratio | spread | of peak | memory | must reach | |\n" + "|---" * 9 + "|"


def line(row: Row) -> str:
    """A row of the Markdown table under `HEAD`."""
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    spread = "" if row.low is None or row.high is None else f"{row.low:.3f} - {row.high:.3f}"
    peak = "" if row.fraction is None else f"{row.fraction:.0%}"
    memory = "" if row.memory is None else f"{row.memory / 2**30:.2f} GiB"
    bar = "" if row.bar is None else f"≤ {row.bar:.3f}{' s' if row.ratio is None else ''}"
    word = {None: row.note, True: "met", False: "missed"}[row.met]
    step = f"{row.seconds * 1e3:.1f} ms"
    return "| " + " | ".join([row.work, row.against, step, ratio, spread, peak, memory, bar, word]) + " |"


def _settings(job: Job) -> dict[str, Any]:
    device = job.machine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "dtype": str(job.machine.dtype), "tiny": job.tiny, "torch": torch.__version__}


def _check_folder(out: Path, about: Mapping[str, Any]) -> None:
    for file in sorted(out.glob("*.json")):
        found = read_object(file).get("settings")
        if found is not None and found != about:
            raise ValueError(
                f"{file} was measured with {found}, this run is {dict(about)}; take another folder with --out, or "
                "--again to measure anew"
            )
