"""Revokes what was aborted, on threads of its own: the thread that aborts is the scheduler's, and must not wait."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time

import kvferry
from kvferry.sglang.holds import Hold

__all__ = ["GIVE_UP_SECONDS", "Revoker"]

logger = logging.getLogger("kvferry.sglang")

WORKERS = 4
# Pause before the second attempt; doubled for each further one.
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
# The daemon refuses a tag for longer than this after the first attempt that it heard.
GIVE_UP_SECONDS = 600.0


class Revoker:
    """Asks until it is settled, or nobody wants to know any more. Those that are asked for the first time go first.

    Its queue holds at most what is aborted and not released (`HOLDS_LIMIT`).
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[tuple[float, int, int, Hold]] = []
        self._number = itertools.count()
        self._started = False

    def submit(self, hold: Hold) -> None:
        """Revokes soon. Returns at once."""
        with self._changed:
            self._push(time.monotonic(), 0, hold)
            if not self._started:
                # Not before it is needed: a prefill aborts nothing.
                self._started = True
                for number in range(WORKERS):
                    threading.Thread(target=self._work, name=f"kvferry-revoke-{number}", daemon=True).start()

    def _push(self, due: float, attempts: int, hold: Hold) -> None:
        heapq.heappush(self._queue, (due, next(self._number), attempts, hold))
        self._changed.notify()

    def _work(self) -> None:
        while True:
            attempts, hold = self._next()
            # What sglang has freed may be somebody else's: nothing more is done about it.
            if hold.released or self._attempt(hold, attempts):
                continue
            pause = min(FIRST_PAUSE_SECONDS * 2**attempts, LONGEST_PAUSE_SECONDS)
            with self._changed:
                self._push(time.monotonic() + pause, attempts + 1, hold)

    def _next(self) -> tuple[int, Hold]:
        with self._changed:
            while True:
                wait = self._queue[0][0] - time.monotonic() if self._queue else None
                if wait is not None and wait <= 0:
                    _, _, attempts, hold = heapq.heappop(self._queue)
                    return attempts, hold
                self._changed.wait(wait)

    def _attempt(self, hold: Hold, attempts: int) -> bool:
        """Whether there is nothing left to do."""
        is_last = time.monotonic() - (hold.aborted_at or 0.0) > GIVE_UP_SECONDS
        try:
            hold.settled = hold.settled or hold.engine.revoke_tag(hold.tag)
            if attempts and not hold.all_bound:
                self._without_proof(hold)
                return hold.settled
        except Exception as error:
            # Whatever it is: the pages stay held, and a thread that ended here would hold all later ones.
            hold.refused = isinstance(error, kvferry.RefusedError)
            more = "for good" if is_last else "and will be tried again"
            logger.warning("kvferry: room %s: revoking failed, %s: %s", hold.room, more, error)
            return is_last
        if not hold.settled:
            logger.warning("kvferry: room %s is revoked, and not settled yet", hold.room)
        return is_last or hold.proven

    @staticmethod
    def _without_proof(hold: Hold) -> None:
        """Some rank does not tag its writes. What it has under way can be stopped; what it will begin cannot.

        Only a moment after the abort, because its answer may have been under way; and never where tags do the work: a
        peer that has not heard of a revoked range has its next room refused there.
        """
        ranges = hold.ranges()
        if ranges:
            hold.engine.revoke(ranges)
        logger.warning(
            "kvferry: room %s: %d of %d prefill ranks run without this plugin: sglang's own rules free its pages",
            hold.room,
            len(hold.published - hold.bound),
            len(hold.published),
        )
