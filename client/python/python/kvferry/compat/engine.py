"""`mooncake.engine.TransferEngine` on kvferry: the methods and codes that sglang and vLLM rely on.

A code of 0 says that every byte is visible at the peer, any other that nothing is in flight any more: the memory of a
failed transfer is the caller's again. A transfer is decided within its deadline; a call that cannot be sure that it is
over says so once a second and does not return before it is.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
import time

import kvferry

__all__ = ["TransferEngine"]

logger = logging.getLogger("kvferry.compat")

OK = 0
FAILED = -1
ZERO_LENGTH = -1
UNKNOWN_REGION = -3
OVERLAPPING = -7

# sglang gives up on a room after 30 s: 24 and 5 to settle leave one.
WRITE_SECONDS = 24.0
# Weights are large and nobody holds pages for them: 30 s, and the time that 100 MB/s would take.
READ_SECONDS = 30.0
READ_BYTES_A_SECOND = 100e6

PROBE_SECONDS = 5.0


class TransferEngine:
    """One engine per process. Every method may be called on any thread, and lets others run while it blocks."""

    def __init__(self) -> None:
        self._engine: kvferry.Engine | None = None
        self._regions = _Regions()

    # --- Life ---------------------------------------------------------------------------------------------

    def initialize(self, local_hostname: str, metadata_server: str, protocol: str, device_name: str) -> int:
        """Attaches to this node's daemon. `local_hostname` may name a port: then peers reach this engine there.

        Any metadata server is accepted: the address is the identity. `protocol` is "tcp" or "rdma"; MC_FORCE_TCP=1
        makes it "tcp". An engine that asks for rdma and cannot have it is refused, never moved to tcp silently.
        `device_name` is a comma list of RDMA devices; with "" the daemon's configuration decides.
        """
        if self._engine is not None:
            logger.error("initialize: this engine is attached already, as %s", self._engine.session_id)
            return FAILED
        host, port = _host_and_port(local_hostname)
        if os.environ.get("MC_FORCE_TCP") == "1":
            protocol = "tcp"
        transports = {"tcp": ["local", "tcp"], "rdma": ["rdma"]}.get(protocol)
        if transports is None:
            logger.error('initialize: kvferry moves by "rdma" or "tcp", not by %r', protocol)
            return FAILED
        try:
            engine = kvferry.Engine.attach(
                transports=transports, advertise_host=host, port=port, rail_map=_rails(device_name)
            )
        except kvferry.RefusedError as error:
            if transports == ["rdma"] and error.reason in ("NO_PATH", "BAD_ARGUMENT"):
                logger.error(
                    "initialize: no rdma path on this node (%s). Set MC_FORCE_TCP=1 to move over tcp.", error
                )
            else:
                logger.error("initialize: the daemon refused this engine: %s", error)
            return FAILED
        except kvferry.Error as error:
            logger.error("initialize: %s", error)
            return FAILED
        if not self._is_reachable(engine):
            engine.close()
            return FAILED
        self._engine = engine
        logger.info("kvferry: attached as %s to daemon %d", engine.session_id, engine.daemon_pid)
        return OK

    @staticmethod
    def _is_reachable(engine: kvferry.Engine) -> bool:
        """Callers compose the session id from their own idea of the host. In a pod's network nobody listens there."""
        probe = engine.probe(engine.session_id, PROBE_SECONDS)
        if not probe.alive:
            logger.error(
                "initialize: this node's daemon cannot be reached at %s (%s). Name an address it listens on: set"
                " SGLANG_HOST_IP=<node ip>, or run the engine in the host's network.",
                engine.session_id,
                probe.failure,
            )
        return probe.alive

    def get_rpc_port(self) -> int:
        """The port of this engine's session id."""
        return int(self._attached().session_id.rsplit(":", 1)[1])

    def get_engine(self):
        """Mooncake's native engine, which its store wants."""
        raise RuntimeError("kvferry has no native Mooncake engine to give: use Mooncake's own engine for its store")

    # --- Memory -------------------------------------------------------------------------------------------

    def register_memory(self, buffer_addr: int, length: int) -> int:
        """Registers a range of this process's memory."""
        return self.batch_register_memory([buffer_addr], [length])

    def batch_register_memory(self, buffer_addresses, lengths) -> int:
        """Registers ranges, all or none. Failures are logged as errors, because callers swallow the code."""
        engine = self._attached()
        ranges = list(zip(map(int, buffer_addresses), map(int, lengths), strict=True))
        if any(length <= 0 for _, length in ranges):
            logger.error("register_memory: a buffer of %d has no bytes", len(ranges))
            return ZERO_LENGTH
        try:
            self._regions.add(engine.register(ranges))
        except kvferry.RefusedError as error:
            logger.error("register_memory of %d buffers failed at %s: %s", len(ranges), error.index, error)
            return OVERLAPPING if error.reason == "OVERLAP" else FAILED
        except kvferry.Error as error:
            logger.error("register_memory of %d buffers failed: %s", len(ranges), error)
            return FAILED
        return OK

    def unregister_memory(self, buffer_addr: int) -> int:
        """Takes a range back. On 0 nobody touches it any more."""
        return self.batch_unregister_memory([buffer_addr])

    def batch_unregister_memory(self, buffer_addresses) -> int:
        """Takes ranges back, by their addresses. On 0 nobody touches them any more."""
        engine = self._attached()
        addresses = [int(address) for address in buffer_addresses]
        ids = self._regions.ids(addresses)
        if ids is None:
            logger.error("unregister_memory: not every address is one that was registered")
            return UNKNOWN_REGION
        try:
            while not engine.unregister(ids):
                logger.warning("unregister_memory waits: somebody may still touch the memory")
                time.sleep(1.0)
        except kvferry.Error as error:
            logger.error("unregister_memory failed: %s", error)
            return FAILED
        self._regions.drop(addresses)
        return OK

    # --- Transfers ----------------------------------------------------------------------------------------

    def transfer_sync_write(self, target_hostname: str, buffer: int, peer_buffer_address: int, length: int) -> int:
        """Writes one slice to the peer."""
        return self.batch_transfer_sync_write(target_hostname, [buffer], [peer_buffer_address], [length])

    def transfer_sync_read(self, target_hostname: str, buffer: int, peer_buffer_address: int, length: int) -> int:
        """Reads one slice from the peer."""
        return self.batch_transfer_sync_read(target_hostname, [buffer], [peer_buffer_address], [length])

    def batch_transfer_sync_write(self, target_hostname: str, buffers, peer_buffer_addresses, lengths) -> int:
        """Writes slices to the peer, any number of them."""
        return self._move(target_hostname, "write", buffers, peer_buffer_addresses, lengths, WRITE_SECONDS)

    def batch_transfer_sync_read(self, target_hostname: str, buffers, peer_buffer_addresses, lengths) -> int:
        """Reads slices from the peer, any number of them."""
        seconds = READ_SECONDS + float(sum(lengths)) / READ_BYTES_A_SECOND
        return self._move(target_hostname, "read", buffers, peer_buffer_addresses, lengths, seconds)

    def send_probe(self, target_hostname: str) -> int:
        """0 when the engine there is attached to its daemon and can be reached."""
        probe = self._attached().probe(target_hostname, PROBE_SECONDS)
        if not probe.alive:
            logger.warning("%s cannot be reached: %s", target_hostname, probe.failure)
        return OK if probe.alive else FAILED

    def _move(self, session: str, op: str, local, remote, lengths, seconds: float) -> int:
        engine = self._attached()
        try:
            report = engine.transfer(session, op, local, remote, lengths, deadline=seconds)
        except kvferry.Error as error:
            logger.error("nothing was moved to %s: %s", session, error)
            return FAILED
        report = settled(engine, session, report)
        if report.done:
            return OK
        logger.error("transfer with %s: %s", session, report)
        return FAILED

    def _attached(self) -> kvferry.Engine:
        if self._engine is None:
            raise RuntimeError("this transfer engine is not initialized: call initialize() first")
        return self._engine


class _Regions:
    """Which region stands for which address. Callers name memory by its address alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: dict[int, int] = {}

    def add(self, regions) -> None:
        with self._lock:
            self._ids.update((region.base, region.id) for region in regions)

    def ids(self, addresses) -> list[int] | None:
        with self._lock:
            ids = [self._ids.get(address) for address in addresses]
        return None if None in ids else ids

    def drop(self, addresses) -> None:
        with self._lock:
            for address in addresses:
                self._ids.pop(address, None)


def settled(engine: kvferry.Engine, session: str, report: kvferry.Report) -> kvferry.Report:
    """Waits until nobody touches this engine's memory for the transfer any more, and says why it waits."""
    while not report.settled:
        logger.warning("transfer with %s is not over yet: %s", session, report.failure)
        try:
            report = engine.wait(report.id, 1.0)
        except kvferry.NoAnswerError:
            continue
        except kvferry.RefusedError as error:
            # A daemon forgets what has ended, and nothing else.
            logger.warning("transfer with %s has ended, unknown how: %s", session, error)
            return report
        except kvferry.Error as error:
            logger.warning("transfer with %s: %s", session, error)
            time.sleep(1.0)
    return report


def _rails(device_name: str | None) -> str | None:
    """Callers say "" where they have nothing to say."""
    return (device_name or "").strip() or None


def _host_and_port(hostname: str) -> tuple[str, int | None]:
    """`host`, `host:port`, `[v6]:port`, `v6`."""
    try:
        ipaddress.ip_address(hostname)
        return hostname, None
    except ValueError:
        pass
    host, colon, port = hostname.rpartition(":")
    if colon and port.isdigit() and 0 < int(port) < 65536:
        return host.strip("[]"), int(port)
    return hostname.strip("[]"), None
