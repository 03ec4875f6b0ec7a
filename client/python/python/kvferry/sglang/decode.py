"""Hooks of a decode rank. Each is what its part of `hooks.PARTS` says it is."""

from __future__ import annotations

import contextvars
import inspect
import logging

import numpy

from kvferry.sglang import wire
from kvferry.sglang.holds import Hold, Holds
from kvferry.sglang.pages import destinations
from kvferry.sglang.prefill import Sglang, answer, is_ours
from kvferry.sglang.revoker import Revoker

__all__ = ["Decode", "around_make_worker_recv"]

logger = logging.getLogger("kvferry.sglang")

# The publication under way in this call.
_publishing: contextvars.ContextVar[Hold | None] = contextvars.ContextVar("kvferry_publishing", default=None)


def around_make_worker_recv(original, self, *args, holds: Holds, sglang: Sglang, **kwargs):
    """What both roles receive from their peers. Answers are ours alone: nobody else sees them."""
    receive = original(self, *args, **kwargs)
    if not is_ours(self):
        return receive

    def received():
        message = receive()
        if message is None:
            return None
        if message[0] == wire.BOUND:
            said = wire.parse_bound(message)
            if said is not None:
                holds.bound(said)
            return None
        if hasattr(self, "transfer_infos"):
            answer(self, message, sglang)
        return message

    return received


class Decode:
    """The hooks, around what they share."""

    def __init__(self, holds: Holds) -> None:
        self.holds = holds
        self.revoker = Revoker()

    def around_send_metadata(self, original, receiver, *args, **kwargs):
        """Mints the publication's tag, and remembers on the receiver what it names."""
        if not is_ours(receiver.kv_mgr):
            return original(receiver, *args, **kwargs)
        asked = inspect.signature(original).bind(receiver, *args, **kwargs).arguments
        named = [_copied(asked.get(name)) for name in ("kv_indices", "aux_index", "state_indices", "device_kv_indices")]
        manager = receiver.kv_mgr
        hold = self.holds.open(receiver.bootstrap_room, manager.engine, lambda: destinations(manager.kv_args, *named))
        receiver.__dict__.setdefault("kvferry_holds", []).append(hold)
        token = _publishing.set(hold)
        try:
            return original(receiver, *args, **kwargs)
        finally:
            _publishing.reset(token)

    @staticmethod
    def after_metadata_message(message, *_args, **_kwargs):
        """The message to one prefill rank, tagged."""
        hold = _publishing.get()
        return hold.publish(message) if hold is not None else None

    def after_abort_notification(self, _result, receiver, *_args, **_kwargs) -> None:
        """Prefill was told, if it listens. What it sends is refused from now on, whether it does or not."""
        for hold in receiver.__dict__.pop("kvferry_holds", []):
            if receiver.kv_mgr.enable_deferred_decode_kv_release:
                self.holds.abort(hold)
            self.revoker.submit(hold)

    def around_release_safe(self, original, manager, bootstrap_room: int, *args, **kwargs) -> bool:
        """Whether the pages of an aborted room may be freed. Asked every turn of the scheduler."""
        if original(manager, bootstrap_room, *args, **kwargs) or self.holds.is_proven(bootstrap_room):
            return True
        if self.holds.is_overdue(bootstrap_room):
            logger.warning("kvferry: room %s: its pages are freed without proof, as sglang does", bootstrap_room)
            return True
        return False

    def after_release(self, _result, _manager, bootstrap_room: int, *_args, **_kwargs) -> None:
        """The pages are freed."""
        self.holds.released(bootstrap_room)


def _copied(value):
    """Callers own what they pass; it is looked at after the call."""
    return value.copy() if isinstance(value, numpy.ndarray) else list(value) if isinstance(value, list) else value
