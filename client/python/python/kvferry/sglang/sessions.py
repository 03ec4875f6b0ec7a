"""Which peers have failed, by kvferry's word. Pure but for its lock: events and replies in, verdicts out."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["DEAD", "GONE", "SESSIONS_LIMIT", "UNREACHABLE", "Blacklist", "FailureCounts", "Sessions"]

logger = logging.getLogger("kvferry.sglang")

# Reasons of a transfer that speak against its session, and not only against the transfer.
DEAD = frozenset({"SESSION_FAILED", "PEER_RESTARTED", "ENGINE_GONE"})

# Those of them that say that the engine which was met at the session will not come back.
GONE = frozenset({"PEER_RESTARTED", "ENGINE_GONE"})

# Reasons for which a transfer was given up because nobody was there, for as long as one waits for a peer's return.
UNREACHABLE = frozenset({"CONNECT_REFUSED", "CONNECT_TIMEOUT", "PEER_SILENT", "HANDSHAKE_FAILED"})

# Sessions whose recoveries are counted, or who are doubted. Beyond it the one longest not heard of is forgotten.
SESSIONS_LIMIT = 4096

Watcher = Callable[[str, bool], None]


class Sessions:
    """Told of both by replies and by events, which race: a reply from before a recovery must not undo it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dead: dict[str, str] = {}
        self._recoveries: OrderedDict[str, int] = OrderedDict()
        self._doubted: OrderedDict[str, None] = OrderedDict()
        self._watchers: list[Watcher] = []

    def watch(self, watcher: Watcher) -> None:
        """Calls `watcher(session, failed)` at every change from now on, on whatever thread learns of it."""
        with self._lock:
            self._watchers.append(watcher)

    def began(self, session: str) -> int:
        """To be handed to `failed` when the transfer that begins now has failed."""
        with self._lock:
            return self._recoveries.get(session, 0)

    def is_doubted(self, session: str) -> bool:
        """Whether the last transfer was given up because nobody was there.

        sglang sends one room after the other: if each waited as long for a decode that has died, ten of them would
        hold up everybody's for as many times. So the first waits, and the next are tried once.
        """
        with self._lock:
            return session in self._doubted

    def done(self, session: str) -> None:
        """A transfer has succeeded."""
        with self._lock:
            was_bad = session in self._doubted or session in self._dead
        if was_bad:
            self.healed(session)

    def failed(self, session: str, began: int, reason: str) -> None:
        """A transfer has failed."""
        if reason in UNREACHABLE:
            with self._lock:
                self._doubted[session] = None
                if len(self._doubted) > SESSIONS_LIMIT:
                    self._doubted.popitem(last=False)
        if reason in DEAD:
            # Opening a session is a recovery too, and no recovery brings back who is gone.
            self._set(session, reason, None if reason in GONE else began)

    def changed(self, session: str, state: str) -> None:
        """The session's state, as the daemon tells it."""
        if state == "FAILED":
            self._set(session, "SESSION_FAILED", None)
        elif state == "HEALTHY":
            self.healed(session)

    def healed(self, session: str) -> None:
        """The peer answers."""
        with self._lock:
            self._recoveries[session] = self._recoveries.pop(session, 0) + 1
            if len(self._recoveries) > SESSIONS_LIMIT:
                self._recoveries.popitem(last=False)
            self._doubted.pop(session, None)
            was_dead = self._dead.pop(session, None)
            watchers = list(self._watchers)
        if was_dead:
            for watcher in watchers:
                watcher(session, False)

    def reason(self, session: str) -> str | None:
        """Why the session is dead; None if it is not."""
        with self._lock:
            return self._dead.get(session)

    def _set(self, session: str, reason: str, began: int | None) -> None:
        with self._lock:
            if began is not None and self._recoveries.get(session, 0) != began:
                return
            news = session not in self._dead
            self._dead[session] = reason
            watchers = list(self._watchers)
        if news:
            logger.error("kvferry: session %s has failed (%s)", session, reason)
            for watcher in watchers:
                watcher(session, True)


class Blacklist(set):
    """sglang's `failed_sessions`. It adds whoever failed once; of them, this takes those that are dead."""

    def __init__(self, sessions: Sessions) -> None:
        super().__init__()
        self._sessions = sessions

    def add(self, session: str) -> None:
        if self._sessions.reason(session):
            super().add(str(session))


class FailureCounts(dict):
    """sglang's `session_failures`. It blacklists, and says so, at a count of 1; only the dead get there."""

    def __init__(self, sessions: Sessions) -> None:
        super().__init__()
        self._sessions = sessions

    def __missing__(self, session: str) -> int:
        return 0

    def __setitem__(self, session: str, failures: int) -> None:
        if self._sessions.reason(session):
            super().__setitem__(str(session), failures)
