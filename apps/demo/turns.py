"""Whose turn it is: one at a time, one of each person after the other, each person's in the order they were asked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Full(ValueError):
    """More are waiting than may."""


class Place:
    """One turn that somebody waits for or has."""


class Turns:
    """A round: whoever has been served stands behind everybody else who waits, however much more they ask for.

    Args:
        most: places that may wait, over all people.
    """

    def __init__(self, most: int):
        self.most = most
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[Place]] = {}  # in the order of the round
        self._served: Place | None = None

    @contextmanager
    def line(self, person: str) -> Iterator[Place]:
        """Stand in line, then have the turn (see `ahead`), until the context ends.

        Raises:
            Full: there is no place left.
        """
        place = Place()
        with self._changed:
            waiting = sum(map(len, self._waiting.values()))
            if waiting >= self.most:
                raise Full(f"{waiting} requests are waiting already; try again in a minute")
            self._waiting.setdefault(person, deque()).append(place)
            self._call_next()
        try:
            yield place
        finally:
            with self._changed:
                if self._served is place:
                    self._served = None
                else:
                    self._leave(person, place)
                self._call_next()

    def ahead(self, place: Place, seconds: float | None = None) -> int:
        """How many are served before this place, at the end of some seconds at most; 0: it is its turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._served is place, seconds)
            if self._served is place:
                return 0
            mine, own = next((i, places) for i, places in enumerate(self._waiting.values()) if place in places)
            rounds = own.index(place)  # that go by before it
            others = (len(places) for places in self._waiting.values())
            return 1 + sum(min(n, rounds + (i < mine)) for i, n in enumerate(others))

    def _call_next(self) -> None:
        if self._served is None and self._waiting:
            person = next(iter(self._waiting))
            places = self._waiting.pop(person)
            self._served = places.popleft()
            if places:
                self._waiting[person] = places
            self._changed.notify_all()

    def _leave(self, person: str, place: Place) -> None:
        self._waiting[person].remove(place)
        if not self._waiting[person]:
            del self._waiting[person]
