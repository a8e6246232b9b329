"""Bulk work: many independent items through a few workers, in this process or as a Ray Data job.

A worker writes its items' results itself, each file whole or not at all, and the caller leaves out what is there
already. So a job that was stopped goes on, and an item that two workers got is the same file twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from tqdm import tqdm

from imgdit.naming import check_choice

logger = logging.getLogger(__name__)

ENGINES = ("local", "ray")
IN_FLIGHT = 2
"""Items that wait at a Ray actor: enough to keep it busy, few enough that a slow one holds nothing up."""


class Worker(Protocol):
    """Works on one item after another; made once per process with the job's arguments."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Do an item, and say something about it in plain values."""


def run_bulk(
    items: Sequence[dict[str, Any]],
    worker: type[Worker],
    arguments: dict[str, Any],
    *,
    engine: str = "local",
    workers: int = 1,
    retries: int = 3,
    gpus: float | None = None,
    address: str | None = None,
) -> Iterator[dict[str, Any]]:
    """What a worker says about each item, in the order they are done.

    Args:
        items: plain values.
        worker: class of a `Worker`; must be importable on every machine.
        arguments: its keyword arguments.
        engine: "local": this process, one after the other; "ray": an actor pool, whose actors are started again when
            they die.
        workers: actors.
        retries: how often an item is tried again before its error is raised.
        gpus: of an actor, may be a part; `None`: one where there are any.
        address: of a Ray cluster; `None`: that of RAY_ADDRESS, or a new one on this machine.

    Raises:
        ValueError: no such engine.
        ImportError: Ray is not installed.
    """
    check_choice("engine", engine, ENGINES)
    options: dict[str, Any] = {"worker": worker, "arguments": arguments, "retries": retries}
    done: Iterator[dict[str, Any]]
    if engine == "ray":
        gpus = float(torch.cuda.is_available()) if gpus is None else gpus
        done = _ray(items, options, workers, gpus, address)
    else:
        done = map(_Retrying(**options), items) if items else iter(())
    return iter(tqdm(done, total=len(items), desc=worker.__name__, unit="item", disable=None))


class _Retrying:
    """A worker that tries again where the disk or the GPU was full; a mistake in the arguments is final."""

    def __init__(self, worker: Any, arguments: dict[str, Any], retries: int):
        self.work, self.retries = worker(**arguments), retries

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        for _ in range(self.retries):
            try:
                return self.work(item)
            except (OSError, RuntimeError) as error:
                logger.warning("an item failed and is tried again: %s", error)
        return self.work(item)


def _ray(
    items: Sequence[dict], arguments: dict, workers: int, gpus: float, address: str | None
) -> Iterator[dict[str, Any]]:
    try:
        import ray
        from ray.data import ActorPoolStrategy
    except ImportError as error:
        raise ImportError("the engine ray needs Ray; install it with: pip install 'imgdit[ray]'") from error
    started = not ray.is_initialized()
    if started:
        known = address or os.environ.get("RAY_ADDRESS")
        # One processor more than actors: reading the items is a task of its own.
        size: dict[str, Any] = {} if known else {"num_cpus": workers + 1, "include_dashboard": False}
        ray.init(address=known, log_to_driver=False, logging_level=logging.ERROR, **size)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        data: Any = ray.data  # its own annotations refuse a class of actors
        table = data.from_items(list(items), override_num_blocks=len(items)).map(
            _Retrying,  # an actor that dies is started again, and its item given out again, by Ray Data itself
            fn_constructor_kwargs=arguments,
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=IN_FLIGHT),
            num_cpus=1,
            num_gpus=gpus,
        )
        yield from table.iter_rows()
    finally:
        if started:
            ray.shutdown()
