"""Prefill and decode of sglang behind two daemons, and the rooms that go from one to the other."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
from pathlib import Path

from daemons import Daemon, Program
from proxy import Proxy

from kvferry import compat

HERE = Path(__file__).parent
# Loopback addresses: sglang takes its address for its host, and the proxy stands at the other one.
HOST, PROXIED = "127.0.0.1", "127.0.0.2"
ENDS_SECONDS = 60.0
# How sglang comes to kvferry, and the module of the engine that it then has.
WAYS = {"drop-in": {"PYTHONPATH": compat.path()}, "plugin": {"KVFERRY_SGLANG": "1"}}
ENGINES = {"drop-in": "kvferry.compat.engine", "plugin": "kvferry.sglang.engine"}
WAY = os.environ.get("KVFERRY_WAY", "drop-in")

numbers = itertools.count(1)
# Of bootstrap servers, below those that the system gives away.
bootstrap_ports = iter(range(28500, 32000))
# Endpoint ports of the daemons, four each: a proxy listens before it knows which are used.
port_ranges = (range(first, first + 4) for first in itertools.count(26000, 4))


class Rank(Program):
    """A process of sglang, attached to a daemon."""

    def __init__(self, daemon: Daemon, host: str, **told) -> None:
        self.log = Path(daemon.place.name, f"{told['role']}-{told['tp_rank']}-{next(numbers)}.log")
        environment = {
            **os.environ,
            **WAYS[WAY],
            "KVFERRY_SOCKET": str(daemon.socket),
            "MC_FORCE_TCP": "1",
            "SGLANG_HOST_IP": host,
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            # Ranks of one role meet over gloo: sglang leaves NCCL alone where there is no such library.
            "SGLANG_NCCL_SO_PATH": "/nonexistent/libnccl.so",
            # A peer that is gone is noticed within 2 s instead of 10.
            "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
            "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "1",
            # A session that was given up is looked at again after 1 s instead of 30.
            "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "1",
            # Pages of a failed room that nobody answers for are released after 10 s instead of 30.
            "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "10",
        }
        with open(self.log, "ab") as log:
            super().__init__(HERE / "rank.py", json.dumps(told), env=environment, stderr=log)

    def started(self) -> dict:
        """What it says of itself. It takes as long as importing sglang takes."""
        return self._answer(self.line())

    def call(self, name: str, **arguments):
        return self._answer(self.ask(json.dumps([name, arguments])))

    def kill(self) -> None:
        self.process.kill()
        self.stop()

    def stop(self) -> None:
        # One that died by itself may not have read what it was told last.
        with contextlib.suppress(BrokenPipeError):
            super().stop()

    def _answer(self, line: str):
        if not line:
            raise AssertionError("a rank of sglang died:\n" + self.tail())
        return json.loads(line)

    def tail(self) -> str:
        return "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-40:])


class Side:
    """The ranks of one role on one node. All have the same pages, as sglang's allocators would give."""

    def __init__(self, role: str, daemon: Daemon, host: str, tp_size: int, shape: dict, bootstrap: int) -> None:
        meet = f"file://{daemon.place.name}/meet-{next(numbers)}"
        told = {"role": role, "tp_size": tp_size, "shape": shape, "bootstrap": bootstrap, "meet": meet}
        self.ranks = [Rank(daemon, host, tp_rank=rank, **told) for rank in range(tp_size)]
        self.pages = list(range(1, shape["pages"]))
        self.slots = list(range(shape["slots"]))

    def started(self) -> list[dict]:
        return [rank.started() for rank in self.ranks]

    def call(self, name: str, **arguments) -> list:
        return [rank.call(name, **arguments) for rank in self.ranks]

    def facts(self) -> list[dict]:
        return self.call("facts")

    def take(self, pages: int, is_scattered: bool, dice: random.Random) -> tuple[list[int], int]:
        """Pages and a slot that nobody has."""
        if is_scattered:
            dice.shuffle(self.pages)
        else:
            self.pages.sort()
        taken, self.pages = self.pages[:pages], self.pages[pages:]
        assert len(taken) == pages, "the test asks for more pages than there are"
        return taken, self.slots.pop(0)

    def give(self, room: dict) -> None:
        self.pages += room["pages"]
        self.slots.append(room["slot"])

    def stop(self) -> None:
        for rank in self.ranks:
            rank.stop()


class Fleet:
    """A prefill side, a decode side, two daemons. `is_proxied`: whoever writes to decode goes through `proxy`."""

    def __init__(self, prefill_tp: int = 1, decode_tp: int = 1, is_proxied: bool = False, **shape) -> None:
        self.shape = {"kind": "mha", "pages": 257, "page_size": 16, "slots": 64, **shape}
        self.dice = random.Random(1)
        self.decode_host = PROXIED if is_proxied else HOST
        here, there = next(port_ranges), next(port_ranges)
        self.proxy = Proxy(PROXIED, there) if is_proxied else None
        self.here, self.there = (Daemon(f"{ports[0]}-{ports[-1]}") for ports in (here, there))
        self.prefill_tp, self.decode_tp = prefill_tp, decode_tp
        self.prefill, self.decode = self.new_prefill(), self.new_decode()
        try:
            self.sessions = [fact["session"] for fact in self.prefill.started() + self.decode.started()]
        except AssertionError:
            self.stop()
            raise

    def new_prefill(self) -> Side:
        self.bootstrap = free_port()
        return Side("prefill", self.here, HOST, self.prefill_tp, self.shape, self.bootstrap)

    def new_decode(self) -> Side:
        return Side("decode", self.there, self.decode_host, self.decode_tp, self.shape, self.bootstrap)

    def open(self, rooms: int = 1, pages: int = 16, is_scattered: bool = False, chunks: int = 1) -> list[tuple]:
        """Opens rooms on both sides: what each was told, prefill first."""
        opened = []
        for _ in range(rooms):
            common = {"room": next(numbers), "chunks": chunks, "bootstrap": self.bootstrap}
            sides = []
            for side in (self.prefill, self.decode):
                taken, slot = side.take(pages, is_scattered, self.dice)
                state = {"": None, "swa": taken, "mamba": [slot]}[self.shape.get("state", "")]
                sides.append({**common, "pages": taken, "slot": slot, "state": state})
            opened.append(tuple(sides))
        self.decode.call("open", rooms=[there for _, there in opened])
        self.prefill.call("open", rooms=[here for here, _ in opened])
        return opened

    def ends(self, opened: list[tuple], seconds: float = ENDS_SECONDS) -> tuple[list[dict], list[dict]]:
        """What became of the rooms, on every rank: of prefill, of decode."""
        numbers_of = [here["room"] for here, _ in opened]
        ends = tuple(
            [end for rank in side.call("ends", rooms=numbers_of, seconds=seconds) for end in rank]
            for side in (self.prefill, self.decode)
        )
        for here, there in opened:
            self.prefill.give(here)
            self.decode.give(there)
        return ends

    def stop(self) -> None:
        self.prefill.stop()
        self.decode.stop()
        for daemon in (self.here, self.there):
            daemon.stop()
        if self.proxy is not None:
            self.proxy.close()


def free_port() -> int:
    """One that nobody is given meanwhile: a rank takes long until it listens there."""
    for port in bootstrap_ports:
        with contextlib.suppress(OSError), socket.create_server((HOST, port)):
            return port
    raise AssertionError("there is no port left")
