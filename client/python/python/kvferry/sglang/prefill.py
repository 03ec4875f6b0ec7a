"""Hooks of a prefill rank. Each is what its part of `hooks.PARTS` says it is."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import kvferry
from kvferry.sglang import wire
from kvferry.sglang.engine import TransferEngine
from kvferry.sglang.sessions import GONE, Blacklist, FailureCounts

__all__ = [
    "Sglang",
    "adopt",
    "after_registration",
    "answer",
    "around_from_zmq",
    "around_poison",
    "around_transfer_worker",
    "is_ours",
]

logger = logging.getLogger("kvferry.sglang")


def is_ours(manager) -> bool:
    """Whether this manager moves by kvferry. Other backends share some of its classes."""
    return isinstance(getattr(manager, "engine", None), TransferEngine)


def around_transfer_worker(original, self, *args, **kwargs):
    """Each of the manager's workers runs in this call. The first puts kvferry's verdicts in the place of sglang's."""
    if is_ours(self):
        adopt(self)
    return original(self, *args, **kwargs)


def adopt(manager) -> None:
    """Replaces `failed_sessions` and `session_failures`, and keeps the former as kvferry says."""
    sessions = manager.engine.sessions
    with manager.session_lock:
        if isinstance(manager.failed_sessions, Blacklist):
            return
        manager.failed_sessions = Blacklist(sessions)
        manager.session_failures = FailureCounts(sessions)
    known = weakref.ref(manager)

    def watcher(session: str, failed: bool) -> None:
        manager = known()
        if manager is None:
            return
        with manager.session_lock:
            if failed:
                manager.failed_sessions.add(session)
            else:
                manager._unblacklist_session(session)
        if not failed:
            logger.info("kvferry: session %s is healthy again", session)

    sessions.watch(watcher)


def after_registration(result, self, mooncake_session_id: str, *args, **kwargs) -> None:
    """A decode has told its memory anew: whoever lives at its session now is the one to talk to."""
    if is_ours(self) and self.engine.sessions.reason(mooncake_session_id) in GONE:
        try:
            self.engine.reset_session(mooncake_session_id)
        except kvferry.Error as error:
            logger.error(
                "kvferry: session %s is another engine's now, and stays blacklisted: %s", mooncake_session_id, error
            )


def around_poison(original, self, room: int):
    """Poisoned is a room of which a failed write may still reach the peer."""
    if is_ours(self) and not self.engine.unproven.take(room):
        logger.debug("kvferry: room %s failed, and is proven settled on both sides", room)
        return None
    return original(self, room)


def around_from_zmq(original, cls, msg: list[bytes]):
    """A decode's publication. Its session id will know for what it is used."""
    info = original(cls, msg)
    tagged = wire.tagged(msg)
    info.mooncake_session_id = wire.RoomSession(
        info.mooncake_session_id, info.room, tagged.tag if tagged is not None else None
    )
    return info


class Sglang(NamedTuple):
    """What is asked of sglang's own modules."""

    # A ZMQ endpoint of host and port, and whether it is IPv6.
    to_tcp: Callable[[str, int], tuple[str, bool]]
    # Whether the manager sends auxiliary data in messages, which the decode's process writes: no tag stops those.
    sends_aux_itself: Callable[[Any], bool]


def answer(manager, message: list[bytes], sglang: Sglang) -> None:
    """Tells decode that what is written for this publication will be tagged: `around_from_zmq` sees the message next."""
    tagged = wire.tagged(message)
    if tagged is None or wire.is_dummy(message):
        return
    try:
        if sglang.sends_aux_itself(manager):
            return
        endpoint, is_ipv6 = sglang.to_tcp(message[1].decode("ascii"), int(message[2]))
        manager._send_multipart_locked(endpoint, wire.bound(int(message[0]), tagged), is_ipv6=is_ipv6)
    except Exception as error:
        # The thread is the one that hears of new rooms. Without the answer decode does as it does without the plugin.
        logger.warning("kvferry: room %s: no answer to its decode: %s", message[0], error)
