"""A TCP proxy that cuts, for the tests of this folder. A session id is an address, so a proxy's will do."""

import socket
import threading


class Proxy:
    """Passes connections on to `session`. Once `cut_after` bytes went there it ends them all; new ones it passes on."""

    def __init__(self, session: str, cut_after: int) -> None:
        host, port = session.rsplit(":", 1)
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._left = cut_after
        self.was_cut = threading.Event()
        self.session = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        _shut(self._listener)
        self._listener.close()
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            _shut(end)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
            except OSError:
                return
            with self._lock:
                self._ends += [near, far]
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, there: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
                if there and self._is_due(len(data)):
                    self._cut()
                    self.was_cut.set()
        except OSError:
            pass
        _shut(sink)
        source.close()

    def _is_due(self, length: int) -> bool:
        with self._lock:
            before, self._left = self._left, self._left - length
            return before > 0 >= self._left


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
