"""One rank of sglang in a process of its own: its KV manager, and what its scheduler does with it.

    rank.py SETTINGS     a JSON object; then a command per line on stdin, a JSON answer per line on stdout

What is sglang's is imported, nothing of it is replaced: configuration, process groups, pools, the bootstrap server,
MooncakeKVManager, senders and receivers. This file stands in for the scheduler, which needs a model: it polls, in the
order in which PrefillBootstrapQueue, DecodePreallocQueue and DecodeTransferQueue do.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time

# sglang and its libraries print; answers go where only this program writes.
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import numpy  # noqa: E402
from pools import KV, Pools, Shape  # noqa: E402
from sglang.srt.disaggregation.base import KVPoll  # noqa: E402
from sglang.srt.disaggregation.common.conn import CommonKVReceiver  # noqa: E402
from sglang.srt.disaggregation.utils import (  # noqa: E402
    DisaggregationMode,
    KVClassType,
    TransferBackend,
    get_kv_class,
)
from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import (  # noqa: E402
    init_mooncake_transfer_engine,
)
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, get_context, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.utils.network import get_local_ip_auto  # noqa: E402

POLL_SECONDS = 0.002


def mooncake(kind: KVClassType):
    return get_kv_class(TransferBackend.MOONCAKE, kind)


class Room:
    """A request: what it was told to be, and what became of it."""

    def __init__(self, told: dict) -> None:
        self.told = told
        self.opened = time.monotonic()
        self.end: dict | None = None

    def ended(self, status: str, **more) -> None:
        seconds = round(time.monotonic() - self.opened, 3)
        self.end = {"room": self.told["room"], "status": status, "seconds": seconds, **more}


class Prefill:
    """Paints what a forward pass would have computed, and sends it, a chunk a turn."""

    def __init__(self, manager, pools: Pools) -> None:
        self.manager, self.pools = manager, pools

    def open(self, room: Room) -> None:
        self.pools.own(room.told)
        self.pools.paint(room.told)
        room.sender = mooncake(KVClassType.SENDER)(
            mgr=self.manager,
            bootstrap_addr=f"127.0.0.1:{room.told['bootstrap']}",
            bootstrap_room=room.told["room"],
        )
        room.chunks = None

    def turn(self, room: Room) -> None:
        status = room.sender.poll()
        if status == KVPoll.Failed:
            why = reason(room.sender)
            room.sender.clear()
            self.pools.release(room.told)
            room.ended("Failed", why=why)
        elif status == KVPoll.Success:
            metric = room.sender.get_transfer_metric()
            room.sender.clear()
            self.pools.release(room.told)
            room.ended("Success", bytes=metric.transfer_total_bytes)
        elif status == KVPoll.WaitingForInput and room.chunks is None:
            pages = numpy.array(room.told["pages"], numpy.int32)
            room.sender.init(len(pages), room.told["slot"])
            room.chunks = numpy.array_split(pages, room.told.get("chunks", 1))
        if room.end is None and room.chunks:
            chunk = room.chunks.pop(0)
            state = room.told.get("state") if not room.chunks else None
            room.sender.send(chunk, state_indices=state and [state])


class Decode:
    """Publishes its pages, waits, looks at every byte, and gives the pages away."""

    def __init__(self, manager, pools: Pools) -> None:
        self.manager, self.pools = manager, pools
        self.hold_seconds = envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT.get()

    def open(self, room: Room) -> None:
        address = f"127.0.0.1:{room.told['bootstrap']}"
        room.receiver = mooncake(KVClassType.RECEIVER)(
            mgr=self.manager, bootstrap_addr=address, bootstrap_room=room.told["room"]
        )
        room.published = False
        room.held = None
        self.pools.own(room.told)

    def turn(self, room: Room) -> None:
        if room.held is not None:
            return self._hold(room)
        receiver = room.receiver
        status = receiver.poll()
        if status == KVPoll.Bootstrapping:
            if self.manager.try_ensure_parallel_info(receiver.bootstrap_addr):
                receiver.init(0)
        elif status == KVPoll.WaitingForInput and not room.published:
            room.published = True
            state = room.told.get("state")
            pages = numpy.array(room.told["pages"], numpy.int32)
            receiver.send_metadata(pages, room.told["slot"], state and [numpy.array(state, numpy.int32)], 0)
        elif status == KVPoll.Success:
            end = {"wrong": self.pools.wrong(room.told), "bytes": self.pools.bytes_of(room.told)}
            self._release(room)
            room.ended("Success", **end)
        elif status == KVPoll.Failed:
            room.why = reason(receiver)
            room.held = time.monotonic()
            if room.published:
                receiver.ensure_abort_notified(force_arm=True)
        return None

    def abort(self, room: Room) -> None:
        room.receiver.abort()

    def _hold(self, room: Room) -> None:
        """sglang keeps the pages of a failed room until prefill says that it drained, or for 30 s."""
        number, held = room.told["room"], time.monotonic() - room.held
        needed = len(room.receiver.bootstrap_infos) if room.receiver.abort_notified else 0
        drained = self.manager.is_abort_release_safe(number, needed)
        if drained or held > self.hold_seconds:
            self.manager.clear_deferred_abort_state(number)
            self._release(room)
            room.ended("Failed", why=room.why, held=round(held, 3), drained=drained)

    def _release(self, room: Room) -> None:
        self.pools.release(room.told)
        room.receiver.clear()


def reason(end) -> str:
    """Why a sender or receiver failed: sglang tells it by raising."""
    try:
        end.failure_exception()
    except Exception as error:  # noqa: BLE001 whatever it is, it is the reason
        return str(error)
    return "no reason"


class Rank:
    """What runs in this process, and the rooms it has."""

    def __init__(self, told: dict) -> None:
        self.told = told
        self.args = ServerArgs(
            model_path="dummy",
            device="cpu",
            host="127.0.0.1",
            tp_size=told["tp_size"],
            page_size=told["shape"]["page_size"],
            disaggregation_mode=told["role"],
            disaggregation_transfer_backend="mooncake",
            disaggregation_bootstrap_port=told["bootstrap"],
            enable_pd_role_switch=True,
        )
        publish(self.args, role="scheduler", ranks=SpawnRanks(world_rank=told["tp_rank"], gpu_id=0))
        init_distributed_environment(
            world_size=told["tp_size"],
            rank=told["tp_rank"],
            distributed_init_method=told["meet"],
            local_rank=told["tp_rank"],
            backend="gloo",
        )
        initialize_model_parallel()
        self.engine = init_mooncake_transfer_engine(hostname=get_local_ip_auto(), gpu_id=0)
        background = 0xA5 if told["role"] == "prefill" else 0x5A
        self.pools = Pools(Shape(**told["shape"]), told["tp_size"], told["tp_rank"], background)
        self.bootstrap_server = None
        self.rooms: dict[int, Room] = {}
        self.be(told["role"])

    def be(self, role: str) -> None:
        """Takes a role, as init_disaggregation of sglang's scheduler does."""
        if role == "prefill" and self.told["tp_rank"] == 0 and self.bootstrap_server is None:
            server = mooncake(KVClassType.BOOTSTRAP_SERVER)
            self.bootstrap_server = server(host="127.0.0.1", port=self.told["bootstrap"])
        mode = DisaggregationMode.PREFILL if role == "prefill" else DisaggregationMode.DECODE
        is_mla = self.told["shape"]["kind"] == "mla"
        self.manager = mooncake(KVClassType.MANAGER)(self.pools.args, mode, self.args, is_mla)
        self.side = (Prefill if role == "prefill" else Decode)(self.manager, self.pools)

    def turn(self) -> None:
        for room in self.rooms.values():
            if room.end is None:
                self.side.turn(room)

    @property
    def busy(self) -> bool:
        return any(room.end is None for room in self.rooms.values())

    # --- Commands -----------------------------------------------------------------------------------------

    def open(self, rooms: list[dict]) -> int:
        """Opens rooms; they are served from now on."""
        for told in rooms:
            room = self.rooms[told["room"]] = Room(told)
            self.side.open(room)
        return len(rooms)

    def ends(self, rooms: list[int], seconds: float) -> list[dict]:
        """What became of these rooms, within so many seconds. They are forgotten."""
        until = time.monotonic() + seconds
        while any(self.rooms[room].end is None for room in rooms) and time.monotonic() < until:
            self.turn()
            time.sleep(POLL_SECONDS)
        return [self.rooms.pop(room).end or {"room": room, "status": "Open"} for room in rooms]

    def abort(self, rooms: list[int]) -> int:
        for room in rooms:
            self.side.abort(self.rooms[room])
        return len(rooms)

    def switch(self, role: str, bootstrap: int) -> str:
        """Changes the role, as handle_pd_role_switch of sglang does."""
        self.manager.teardown()
        if isinstance(self.side, Decode):
            CommonKVReceiver.close_all_sockets()
        if self.bootstrap_server is not None:
            self.bootstrap_server.close()
            self.bootstrap_server = None
        self.told = {**self.told, "bootstrap": bootstrap}
        get_context().override(
            "role_switch.flip", disaggregation_mode=role, disaggregation_bootstrap_port=bootstrap
        )
        self.be(role)
        return role

    def spoil(self) -> list[int]:
        """Spoils a byte that is nobody's, and says how many strangers there are before, meanwhile and afterwards."""
        seen = []
        for flip in (0x00, 0xFF, 0xFF):
            self.pools.canvases[KV].buffers[-1][-1, -1] ^= flip
            seen.append(self.pools.strangers())
        return seen

    def confuse(self) -> list[bool]:
        """Whether pages are right in their order, and in another."""
        room = {"room": 0, "pages": [1, 2], "slot": 0}
        self.pools.paint(room)
        right = [self.pools.wrong({**room, "pages": pages}) == 0 for pages in ([1, 2], [2, 1])]
        self.pools.release(room)
        return right

    def facts(self) -> dict:
        """What there is to see from outside."""
        return {
            "session": self.engine.session_id,
            "engine": [type(engine).__module__ for engine in (self.engine, self.engine.engine)],
            "manager": type(self.manager).__module__,
            "blacklisted": sorted(getattr(self.manager, "failed_sessions", ())),
            "failures": sum(getattr(self.manager, "session_failures", {}).values()),
            "strangers": self.pools.strangers(),
        }


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    load_plugins()
    rank = Rank(json.loads(sys.argv[1]))
    print(json.dumps(rank.facts()), file=ANSWERS)
    commands: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            commands.put(line)
        # Whoever started this is gone. Threads of sglang do not end by themselves.
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = commands.get(timeout=POLL_SECONDS if rank.busy else None)
        except queue.Empty:
            rank.turn()
            continue
        name, arguments = json.loads(line)
        print(json.dumps(getattr(rank, name)(**arguments)), file=ANSWERS)


if __name__ == "__main__":
    main()
