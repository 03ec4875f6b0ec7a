"""A TCP proxy before a daemon's endpoints, on another loopback address: it slows, and it cuts."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

CHUNK = 64 << 10


class Proxy:
    """Listens on `host` at each of `ports` and passes everything on to the same port of 127.0.0.1."""

    def __init__(self, host: str, ports: range) -> None:
        self.rate: float | None = None  # bytes a second and direction of each connection
        self.cuts = 0  # connections that were cut
        self._lock = threading.Lock()  # over what is still to be cut
        self._cut_after, self._cut_times = 0, 0
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._listeners = []
        for port in ports:
            listener = socket.create_server((host, port))
            self._listeners.append(listener)
            threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()

    def cut(self, after: int, times: int) -> None:
        """Resets each of the next `times` connections that pass so many bytes in one direction."""
        with self._lock:
            self._cut_after, self._cut_times = after, times

    def cut_all(self) -> None:
        """Resets every connection there is."""
        for pair in list(self._pairs):
            self._reset(pair)

    def close(self) -> None:
        for listener in self._listeners:
            # Wakes who accepts, which a close alone does not.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut_all()

    def _accept(self, listener: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._serve, args=(near, port), daemon=True).start()

    def _serve(self, near: socket.socket, port: int) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", port))
        except OSError:
            near.close()
            return
        pair = near, far
        self._pairs.add(pair)
        for one in pair:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=self._pass_on, args=(far, near, pair), daemon=True)
        back.start()
        self._pass_on(near, far, pair)
        back.join()
        self._pairs.discard(pair)
        for one in pair:
            one.close()

    def _pass_on(self, source: socket.socket, target: socket.socket, pair) -> None:
        passed = 0
        try:
            while data := source.recv(CHUNK):
                target.sendall(data)
                passed += len(data)
                if self._is_cut(passed):
                    self._reset(pair)
                    return
                if self.rate is not None:
                    time.sleep(len(data) / self.rate)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            self._reset(pair)

    def _is_cut(self, passed: int) -> bool:
        with self._lock:
            if self._cut_times == 0 or passed < self._cut_after:
                return False
            self._cut_times -= 1
            self.cuts += 1
            return True

    def _reset(self, pair) -> None:
        self._pairs.discard(pair)
        for one in pair:
            with contextlib.suppress(OSError):
                # Without lingering a close is a reset.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Wakes whoever waits in it, which a close alone does not.
                one.shutdown(socket.SHUT_RD)
            one.close()
