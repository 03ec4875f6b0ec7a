"""`MooncakeTransferEngine` of sglang, on kvferry. Knows nothing of sglang but what its callers ask for."""

from __future__ import annotations

import atexit
import logging
import os
import threading

import kvferry
from kvferry.compat.engine import FAILED, OK, settled
from kvferry.compat.engine import TransferEngine as DropIn
from kvferry.sglang.sessions import Sessions
from kvferry.sglang.settlement import Unproven

__all__ = ["WRITE_SECONDS", "TransferEngine"]

logger = logging.getLogger("kvferry.sglang")

# With 5 s to settle and 3 s for the peer's word (`fence.settle_ms`, `fence.peer_wait_ms`) it stays below the 30 s after
# which a decode without this plugin frees the pages.
WRITE_SECONDS = 21.0

# How often the thread that reads events looks whether the process ends.
_TURN_SECONDS = 0.5


class TransferEngine:
    """One engine per process, attached as long as the process lives.

    Methods and attributes are those of sglang's `MooncakeTransferEngine`; every method may be called on any thread.
    `sessions` says which peers have failed, and `unproven` which rooms wait for their peer's word.
    """

    def __init__(self, hostname: str, gpu_id: int | None = None, ib_device: str | None = None) -> None:
        """Attaches to this node's daemon, known to peers by `hostname`.

        `ib_device` is the rail map as given on sglang's command line, whatever its form. Raises RuntimeError with the
        reason when the daemon is not there, refuses, or cannot be reached at `hostname`.
        """
        self.hostname = hostname
        self.gpu_id = gpu_id or 0
        self.ib_device = ib_device
        transports = _transports()
        try:
            engine = kvferry.Engine.attach(
                transports=transports,
                advertise_host=hostname,
                gpu_id=self.gpu_id,
                rail_map=(ib_device or "").strip() or None,
            )
        except kvferry.Error as error:
            raise RuntimeError(
                f"kvferry: no transfer engine on this node: {error}{_advice(error, transports)}"
            ) from error
        if not _Raw.is_reachable(engine):
            engine.close()
            raise RuntimeError(
                f"kvferry: this node's daemon cannot be reached at {hostname}: set SGLANG_HOST_IP to an address that"
                " it listens on, or run in the host's network"
            )
        self.session_id = engine.session_id
        # What the rest of sglang asks beyond its own wrapper, by the names that Mooncake gave it.
        self.engine = _Raw(engine)
        self.sessions = Sessions()
        self.unproven = Unproven()
        self._engine = engine
        _Listener(engine, self.sessions).start()
        logger.info(
            "kvferry: attached as %s to kvferryd %s (pid %d), paths %s, GPU %d, rails %s",
            self.session_id,
            engine.daemon_version,
            engine.daemon_pid,
            " ".join(transports),
            self.gpu_id,
            ib_device,
        )

    def __init_subclass__(cls) -> None:
        raise TypeError(
            f"{cls.__name__} derives from Mooncake's engine and cannot run on kvferry: unset KVFERRY_SGLANG"
        )

    # --- Memory -------------------------------------------------------------------------------------------

    def register(self, ptr: int, length: int) -> None:
        """Registers `length` bytes at `ptr`. Raises RuntimeError with the reason."""
        self.batch_register([ptr], [length])

    def batch_register(self, ptrs: list[int], lengths: list[int]) -> int:
        """Registers ranges, all or none, and returns 0. Raises RuntimeError with the reason, which ends a rank."""
        try:
            self.engine.register(ptrs, lengths)
        except kvferry.RefusedError as error:
            at = f", at buffer {error.index}" if error.index is not None else ""
            raise RuntimeError(f"kvferry: registering {len(ptrs)} buffers was refused{at}: {error}") from error
        except kvferry.Error as error:
            raise RuntimeError(f"kvferry: registering {len(ptrs)} buffers failed: {error}") from error
        return OK

    def deregister(self, ptr: int) -> None:
        """Takes a range back; nobody touches it any more. Raises RuntimeError if that could not be had."""
        if self.batch_deregister([ptr]) != OK:
            raise RuntimeError(f"kvferry: taking back the memory at {ptr:#x} failed; the log says why")

    def batch_deregister(self, ptrs: list[int]) -> int:
        """Takes ranges back. On 0 nobody touches them any more; anything else is in the log as an error."""
        return self.engine.batch_unregister_memory(ptrs)

    # --- Transfers ----------------------------------------------------------------------------------------

    def transfer_sync(self, session_id: str, buffer: int, peer_buffer_address: int, length: int) -> int:
        """Writes one slice. As `batch_transfer_sync`."""
        return self.batch_transfer_sync(session_id, [buffer], [peer_buffer_address], [length])

    def batch_transfer_sync(self, session_id: str, buffers, peer_buffer_addresses, lengths) -> int:
        """Writes slices to the peer. On 0 every byte is visible there; otherwise -1, and nothing is in flight here.

        A `session_id` that is a `RoomSession` says for which request, and the writes carry its tag.
        """
        session, room = str(session_id), getattr(session_id, "room", None)
        known = self.sessions.began(session)
        try:
            report = self._engine.transfer(
                session,
                "write",
                buffers,
                peer_buffer_addresses,
                lengths,
                tag=getattr(session_id, "tag", None),
                deadline=WRITE_SECONDS,
                attempts=1 if self.sessions.is_doubted(session) else None,
            )
        except kvferry.Error as error:
            logger.error("room %s: nothing was moved to %s: %s", room, session, error)
            return FAILED
        report = settled(self._engine, session, report)
        if report.done:
            self.sessions.done(session)
            return OK
        self.sessions.failed(session, known, report.failure.reason if report.failure else "")
        if not (report.settled and report.peer_confirmed):
            self.unproven.note(room)
        logger.error("room %s: transfer with %s: %s", room, session, report)
        return FAILED

    def send_probe(self, peer_session_id: str) -> int:
        """0 when the engine there is attached to its daemon and can be reached. A failed session is probed at once."""
        code = self.engine.send_probe(str(peer_session_id))
        if code == OK:
            self.sessions.healed(str(peer_session_id))
        return code

    # --- Aborts -------------------------------------------------------------------------------------------

    def revoke_tag(self, tag: bytes) -> bool:
        """Refuses whatever carries the tag, for 15 minutes. True once nothing of it can reach this memory any more;
        call again to wait on. Raises kvferry.Error."""
        return self._engine.revoke_tag(tag)

    def revoke(self, ranges: list[tuple[int, int]]) -> bool:
        """Takes (address, bytes) back from what was admitted so far. As `revoke_tag` in all else."""
        return self._engine.revoke(ranges)

    def reset_session(self, session_id: str) -> None:
        """Accepts that another engine lives at the session. Raises kvferry.Error."""
        self._engine.reset_session(session_id)
        self.sessions.healed(session_id)

    # --- What is asked about it -----------------------------------------------------------------------------

    def get_session_id(self) -> str:
        """`host:port`, by which peers name this engine."""
        return self.session_id

    def get_engine(self):
        """Mooncake's native engine, which its store wants. Raises RuntimeError: there is none."""
        return self.engine.get_engine()

    def get_ib_device(self) -> str:
        """The rails that this engine was given, by a name that is nobody else's: only Mooncake's store asks, in order
        to share the native engine of a transfer engine on the same devices, and there is none to share."""
        return f"kvferry:{self.ib_device or ''}"


class _Raw(DropIn):
    """The drop-in over an engine that is attached already."""

    def __init__(self, engine: kvferry.Engine) -> None:
        super().__init__()
        self._engine = engine

    is_reachable = staticmethod(DropIn._is_reachable)

    def register(self, ptrs, lengths) -> None:
        """As `batch_register_memory`, but raises kvferry.Error."""
        self._regions.add(self._attached().register(list(zip(map(int, ptrs), map(int, lengths), strict=True))))


class _Listener(threading.Thread):
    """Reads the engine's events. Ends before the interpreter does, because it must not come back into its ruins."""

    def __init__(self, engine: kvferry.Engine, sessions: Sessions) -> None:
        super().__init__(name="kvferry-events", daemon=True)
        self._events = engine.events()
        self._sessions = sessions
        self._ends = threading.Event()
        atexit.register(self._end)

    def run(self) -> None:
        while not self._ends.is_set():
            event = self._events.get(_TURN_SECONDS)
            if event is None:
                continue
            if event["event"] == "session_changed":
                self._sessions.changed(event["session"], event["state"])
            elif event["event"] == "reattached" and event["moved_from"]:
                logger.error(
                    "kvferry: this engine was %s and is %s now, which nobody knows: restart this rank",
                    event["moved_from"],
                    event["session_id"],
                )
            elif event["event"] == "detached":
                logger.error("kvferry: this engine is detached for good: %s", event["cause"])
                return

    def _end(self) -> None:
        self._ends.set()
        self.join(2 * _TURN_SECONDS)


def _transports() -> list[str]:
    """Paths in order of preference, by the variables that name them to Mooncake."""
    protocol = os.environ.get("MOONCAKE_PROTOCOL", "rdma")
    if os.environ.get("MC_FORCE_TCP") == "1":
        protocol = "tcp"
    transports = {"tcp": ["local", "tcp"], "rdma": ["rdma"]}.get(protocol)
    if transports is None:
        raise RuntimeError(f'kvferry moves by "rdma" or "tcp", not by MOONCAKE_PROTOCOL={protocol}')
    return transports


def _advice(error: kvferry.Error, transports: list[str]) -> str:
    """A node without devices knows none of the rails it is told, either."""
    is_refused = isinstance(error, kvferry.RefusedError) and error.reason in ("NO_PATH", "BAD_ARGUMENT")
    return ". Set MC_FORCE_TCP=1 to move over tcp" if is_refused and "rdma" in transports else ""
