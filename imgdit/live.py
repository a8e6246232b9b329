"""Images that follow changing prompts and conditions: the latest request is generated next, and none wait in line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from imgdit.pipelines.few_steps import FewSteps, few_steps

T = TypeVar("T")


class Latest(Generic[T]):
    """Room for one value: a new one takes the place of one that nobody has taken yet. One thread puts, another one
    iterates; the iteration waits for values and ends when it is closed and empty."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._values: list[T] = []
        self._closed = False
        self.replaced = 0
        """Values whose place was taken."""

    def put(self, value: T) -> None:
        """Hand a value on.

        Raises:
            ValueError: it is closed.
        """
        with self._changed:
            if self._closed:
                raise ValueError("this is closed; make a new Latest")
            self.replaced += len(self._values)
            self._values = [value]
            self._changed.notify()

    def close(self) -> None:
        """End the iteration after the value that is there, if there is one."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._values) or self._closed)
                if not self._values:
                    return
                value = self._values.pop()
            yield value


class LiveImage(NamedTuple):
    """One of the images that follow."""

    image: Any
    """As the pipeline returns it."""
    asked: Mapping[str, Any]
    """The input that it shows."""
    seconds: float
    """It took."""


def live(
    pipe: Any, inputs: Iterable[Mapping[str, Any]], *, seed: int = 0, turbo: FewSteps | None = None, **call: Any
) -> Iterator[LiveImage]:
    """Generate an image for each input, all from the same noise, so that only what was changed changes.

        inputs = Latest()
        threading.Thread(target=draw, args=[inputs]).start()  # inputs.put({"prompt": …, "conditions": […]})
        for shown in live(pipe, inputs, turbo=load_few_steps(pipe)):
            window.show(shown.image)

    Args:
        pipe: a pipeline.
        inputs: arguments of its call that change, such as `prompt` and `conditions`; a `Latest` leaves out those that
            were replaced while an image was generated.
        seed: of the noise.
        turbo: the few-step LoRA to use, see `load_few_steps`; `None`: as many steps as the call says.
        call: arguments of the pipeline's call that stay.
    """
    for asked in inputs:
        started = time.perf_counter()
        settings: AbstractContextManager[dict[str, Any]] = nullcontext({}) if turbo is None else few_steps(pipe, turbo)
        with settings as few:
            generator = torch.Generator().manual_seed(seed)
            images = pipe(**{**few, **call, **asked}, generator=generator).images
        yield LiveImage(images[0], asked, time.perf_counter() - started)
