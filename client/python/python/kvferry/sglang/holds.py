"""Decode's rooms: which tag was published to whom, and whether what was aborted is out of everyone's reach.

A *hold* is one publication of a room's pages. It belongs to the receiver that published it, so a success costs
nothing and leaves nothing behind. Once aborted it is also known by its room, until sglang has freed the pages.

The pages may be freed when the tag's revocation has been answered SETTLED *and* every rank that was told of the pages
has said that its writes carry the tag.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

from kvferry.sglang import wire

__all__ = ["HOLDS_LIMIT", "Hold", "Holds", "Ranges", "Revokes"]

logger = logging.getLogger("kvferry.sglang")

# Aborted rooms whose pages sglang has not freed. Beyond it the oldest is sglang's own affair.
HOLDS_LIMIT = 65_536

Ranges = list[tuple[int, int]]


class Revokes(Protocol):
    """What is asked of the engine. True once it is settled; both may raise."""

    def revoke_tag(self, tag: bytes) -> bool: ...
    def revoke(self, ranges: Ranges) -> bool: ...


class Hold:
    """One publication, by one engine."""

    def __init__(self, room: int, engine: Revokes, ranges: Callable[[], Ranges | None]) -> None:
        """`ranges` tells the (address, bytes) that it names, or None where they are too many; asked only when wanted."""
        self.room = room
        self.engine = engine
        self.ranges = ranges
        self.tag = os.urandom(wire.TAG_BYTES)
        # Ranks that may write, and those of them that have answered.
        self.published: set[int] = set()
        self.bound: set[int] = set()
        self._sent = 0
        # When, by time.monotonic().
        self.aborted_at: float | None = None
        self.settled = False
        # The daemon will not revoke: its table of tags is full.
        self.refused = False
        self.released = False

    def publish(self, message: list[bytes]) -> list[bytes]:
        """The message to the next rank, tagged."""
        index, self._sent = self._sent, self._sent + 1
        if not wire.is_dummy(message):
            self.published.add(index)
        return wire.with_tag(message, self.tag, index)

    @property
    def all_bound(self) -> bool:
        """Whether every rank that may write has said that its writes carry the tag."""
        return self.published <= self.bound

    @property
    def proven(self) -> bool:
        """Whether no write of this publication can reach its pages any more."""
        return self.settled and self.all_bound


class Holds:
    """All of a process. Told by the scheduler's thread, the thread that receives answers, and the revoker's."""

    def __init__(self, unbound_seconds: float, limit: int = HOLDS_LIMIT) -> None:
        """`unbound_seconds` is how long sglang itself holds pages for want of an acknowledgement."""
        self._lock = threading.Lock()
        self._by_tag: WeakValueDictionary[bytes, Hold] = WeakValueDictionary()
        self._aborted: OrderedDict[int, list[Hold]] = OrderedDict()
        self._unbound_seconds = unbound_seconds
        self._limit = limit

    def open(self, room: int, engine: Revokes, ranges: Callable[[], Ranges | None]) -> Hold:
        """A publication that is about to begin."""
        hold = Hold(room, engine, ranges)
        with self._lock:
            self._by_tag[hold.tag] = hold
        return hold

    def bound(self, answer: wire.Bound) -> None:
        """A rank has answered. To a publication that is forgotten it means nothing any more."""
        with self._lock:
            hold = self._by_tag.get(answer.tag)
            if hold is not None and answer.index in hold.published:
                hold.bound.add(answer.index)

    def abort(self, hold: Hold) -> None:
        """The room was aborted: from now on it is asked for."""
        with self._lock:
            hold.aborted_at = time.monotonic()
            self._aborted.setdefault(hold.room, []).append(hold)
            if len(self._aborted) > self._limit:
                room, given_up = self._aborted.popitem(last=False)
                for old in given_up:
                    old.released = True
                logger.error("kvferry: %d rooms are held: room %s waits for sglang's own time", self._limit, room)

    def is_proven(self, room: int) -> bool:
        """Whether all that was aborted of the room is out of everyone's reach. False for a room never aborted."""
        with self._lock:
            holds = self._aborted.get(room)
            return bool(holds) and all(hold.proven for hold in holds)

    def is_overdue(self, room: int) -> bool:
        """Whether sglang itself would free the pages by now, and no proof is to be had: some rank has not answered, or
        the daemon has refused. Where it may still come, the pages stay held."""
        until = time.monotonic() - self._unbound_seconds
        with self._lock:
            holds = self._aborted.get(room)
            return bool(holds) and all(
                hold.proven or ((hold.refused or not hold.all_bound) and (hold.aborted_at or until) < until)
                for hold in holds
            )

    def released(self, room: int) -> None:
        """sglang has freed the pages of one request of the room: the one held longest."""
        with self._lock:
            holds = self._aborted.get(room)
            if holds:
                holds.pop(0).released = True
            if not holds:
                self._aborted.pop(room, None)
