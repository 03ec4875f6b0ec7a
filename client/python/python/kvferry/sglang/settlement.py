"""Which rooms had a write whose peer's half is not proven settled."""

from __future__ import annotations

import logging
import threading

__all__ = ["ROOMS_LIMIT", "Unproven"]

logger = logging.getLogger("kvferry.sglang")

ROOMS_LIMIT = 65_536


class Unproven:
    """Rooms are noted until asked for. A room's next life may inherit a note, which errs on the safe side."""

    def __init__(self, limit: int = ROOMS_LIMIT) -> None:
        self._lock = threading.Lock()
        self._rooms: set[int] = set()
        self._limit = limit
        self._lost = False

    def note(self, room: int | None) -> None:
        """A write for the room is over here, and perhaps not there. Writes for no room are nobody's to ask for."""
        if room is None:
            return
        with self._lock:
            if len(self._rooms) < self._limit or room in self._rooms:
                self._rooms.add(room)
            elif not self._lost:
                self._lost = True
                logger.error(
                    "kvferry: %d rooms without their peers' word: from now on none counts as proven", self._limit
                )

    def take(self, room: int) -> bool:
        """Whether the room had such a write. Forgets it: the caller acts on it."""
        with self._lock:
            noted = room in self._rooms
            self._rooms.discard(room)
            return noted or self._lost
