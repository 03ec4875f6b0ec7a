"""sglang's plugin without sglang: its engine and its hooks, between two processes behind two daemons.

What it decides: test_plugin_decisions.py. The hooks on sglang's own classes: test_plugin_sglang.py.
"""

import logging
import os
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import types
import unittest
from collections import defaultdict
from importlib.metadata import entry_points
from unittest import mock

import numpy
from cutting_proxy import Proxy
from daemons import Daemon, Program

from kvferry.sglang import prefill, wire
from kvferry.sglang.decode import Decode
from kvferry.sglang.engine import TransferEngine
from kvferry.sglang.holds import Holds

POOL = 64 << 20
PAGE = 16 << 10
PAGES = POOL // PAGE

# A prefill rank: attached as the plugin attaches it, then a line of Python per line of input.
PREFILL = textwrap.dedent(
    """
    import sys, threading, time, numpy
    from kvferry.sglang.engine import TransferEngine
    from kvferry.sglang.wire import RoomSession
    engine = TransferEngine("127.0.0.1", gpu_id=0)
    page, pool = int(sys.argv[1]), numpy.zeros(int(sys.argv[2]), numpy.uint8)
    engine.register(pool.ctypes.data, pool.nbytes)
    codes = {}

    def move(session, room, tag, target, pages):
        to = RoomSession(session, room, bytes.fromhex(tag) if tag else None)
        sources, targets = [pool.ctypes.data + at * page for at in pages], [target + at * page for at in pages]
        return engine.batch_transfer_sync(to, sources, targets, [page] * len(sources))

    def begin(key, *call):
        thread = threading.Thread(target=lambda: codes.__setitem__(key, move(*call)), daemon=True)
        thread.start()

    def end(key):
        while key not in codes:
            time.sleep(0.001)
        return codes.pop(key)

    print(engine.session_id, flush=True)
    for line in sys.stdin:
        try:
            print(eval(line), flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    """
)


def environment(daemon: Daemon, **more: str) -> dict[str, str]:
    return {"KVFERRY_SOCKET": str(daemon.socket), "MC_FORCE_TCP": "1", **more}


class Prefill(Program):
    def __init__(self, daemon: Daemon, **more: str) -> None:
        known = {**os.environ, **environment(daemon, **more)}
        super().__init__(PREFILL, str(PAGE), str(POOL), env=known, stderr=subprocess.DEVNULL)
        self.session = self.line()


class Manager:
    """As much of a decode rank's manager as the hooks look at."""

    enable_deferred_decode_kv_release = True

    def __init__(self, engine: TransferEngine, pool: numpy.ndarray) -> None:
        self.engine = engine
        self.kv_args = types.SimpleNamespace(
            kv_data_ptrs=[pool.ctypes.data],
            kv_item_lens=[PAGE],
            aux_data_ptrs=[],
            aux_item_lens=[],
            state_data_ptrs=[],
            state_item_lens=[],
        )


class Room:
    """A receiver of one prefill rank, driven through the hooks as sglang's methods are."""

    def __init__(self, decode: Decode, manager: Manager, room: int) -> None:
        self.decode, self.kv_mgr, self.bootstrap_room = decode, manager, room
        self.message: list[bytes] = []

    def publish(self, pages, *, answered: bool = True) -> str:
        """The tag, in hexadecimal."""

        def send_metadata(receiver, kv_indices, aux_index=None, state_indices=None):
            message = [b"0", b"127.0.0.1", b"1", b"session", kv_indices.tobytes(), b"0", b"", b"1", b"0", b""]
            receiver.message = receiver.decode.after_metadata_message(message)

        indices = numpy.asarray(pages, numpy.int32)
        self.decode.around_send_metadata(send_metadata, self, indices, 0)
        tagged = wire.tagged(self.message)
        if answered:
            self.decode.holds.bound(wire.parse_bound(wire.bound(self.bootstrap_room, tagged)))
        return tagged.tag.hex()

    def abort(self) -> None:
        self.decode.after_abort_notification(None, self)

    def is_safe(self) -> bool:
        return self.decode.around_release_safe(lambda *_: False, self.kv_mgr, self.bootstrap_room, 1)

    def wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.is_safe():
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def release(self) -> None:
        self.decode.after_release(None, self.kv_mgr, self.bootstrap_room)


class Aborts(unittest.TestCase):
    """This process is the decode rank."""

    @classmethod
    def setUpClass(cls) -> None:
        logging.getLogger("kvferry").addHandler(logging.NullHandler())
        cls.here, cls.there = Daemon("24000-24099"), Daemon("24100-24199")
        slow = {"SGLANG_DISAGG_TRANSFER_RETRY_BACKOFF_MS": "2000"}
        cls.prefill = Prefill(cls.there, **slow)
        with mock.patch.dict(os.environ, environment(cls.here)), cls.saying() as said:
            cls.engine = TransferEngine("127.0.0.1", gpu_id=1)
        cls.said = said.output
        cls.pool = numpy.zeros(POOL, numpy.uint8)
        cls.engine.batch_register([cls.pool.ctypes.data], [cls.pool.nbytes])
        cls.manager = Manager(cls.engine, cls.pool)
        cls.decode = Decode(Holds(unbound_seconds=1.0))
        cls.rooms = 0

    @classmethod
    def saying(cls):
        return cls().assertLogs("kvferry.sglang", "INFO")

    @classmethod
    def tearDownClass(cls) -> None:
        cls.prefill.stop()
        cls.engine._engine.close()
        cls.here.stop()
        cls.there.stop()

    def setUp(self) -> None:
        self.pool.fill(0)
        self.prefill.ask("pool.fill(7)")

    def room(self) -> Room:
        type(self).rooms += 1
        return Room(self.decode, self.manager, self.rooms)

    def call(self, room: Room, tag: str | None, pages, session: str | None = None) -> str:
        target = self.pool.ctypes.data
        return f"{session or self.engine.session_id!r}, {room.bootstrap_room}, {tag!r}, {target}, {pages}"

    def test_it_says_where_it_is(self) -> None:
        (line,) = self.said
        pattern = (
            r"attached as 127\.0\.0\.1:\d+ to kvferryd \d+\.\d+\.\d+ \(pid \d+\), paths local tcp, GPU 1, rails None"
        )
        self.assertRegex(line, pattern)
        self.assertEqual(self.engine.get_session_id(), self.engine.session_id)

    def test_a_room_arrives(self) -> None:
        room = self.room()
        tag = room.publish([0, 1])
        self.assertEqual(self.prefill.ask(f"move({self.call(room, tag, [0, 1])})"), "0")
        self.assertEqual(int(self.pool.sum()), 7 * 2 * PAGE)
        self.assertFalse(room.is_safe(), "nobody aborted it")

    def test_aborted_pages_are_free_on_proof(self) -> None:
        times, cut_short = [], 0
        for number in range(21):
            room = self.room()
            tag = room.publish(range(PAGES))
            self.prefill.ask(f"begin({number}, {self.call(room, tag, f'range({PAGES})')})")
            time.sleep(0.003 + 0.001 * (number % 5))
            begun = time.monotonic()
            room.abort()
            self.assertTrue(room.wait(10.0))
            times.append(time.monotonic() - begun)
            # They are another request's from now on.
            self.pool.fill(99)
            room.release()
            self.assertFalse(room.is_safe(), "it is forgotten")
            cut_short += self.prefill.ask(f"end({number})") == "-1"
            self.assertEqual(self.prefill.ask(f"engine.unproven.take({room.bootstrap_room})"), "False")
            self.assertTrue((self.pool == 99).all(), "a byte came late")
        median = statistics.median(times)
        print(f"released on proof: median {median * 1e3:.1f} ms, most {max(times) * 1e3:.1f} ms, {cut_short} of 21 cut")
        self.assertLess(median, 0.1)
        self.assertGreater(cut_short, 0, "none was in flight")
        self.assertEqual(self.prefill.ask(f"engine.sessions.reason({self.engine.session_id!r})"), "None")

    def test_the_next_chunk_after_a_lost_abort_moves_nothing(self) -> None:
        room = self.room()
        tag = room.publish(range(8))
        self.assertEqual(self.prefill.ask(f"move({self.call(room, tag, [0, 1, 2, 3])})"), "0")
        room.abort()
        self.assertTrue(room.wait(10.0))
        self.pool.fill(99)
        room.release()
        # Nobody told prefill.
        self.assertEqual(self.prefill.ask(f"move({self.call(room, tag, [4, 5, 6, 7])})"), "-1")
        self.assertTrue((self.pool == 99).all())
        # The same room and pages, published again, are another matter.
        again = Room(self.decode, self.manager, room.bootstrap_room)
        other = again.publish(range(8))
        self.assertNotEqual(other, tag)
        self.assertEqual(self.prefill.ask(f"move({self.call(again, other, [4, 5, 6, 7])})"), "0")
        self.assertEqual(int((self.pool == 7).sum()), 4 * PAGE)

    def test_an_abort_reaches_a_transfer_that_backs_off(self) -> None:
        proxy = Proxy(self.engine.session_id, cut_after=POOL // 4)
        self.addCleanup(proxy.close)
        room = self.room()
        tag = room.publish(range(PAGES))
        call = self.call(room, tag, f"range({PAGES})", proxy.session)
        self.prefill.ask(f"begin('cut', {call})")
        self.assertTrue(proxy.was_cut.wait(10.0))
        cut = time.monotonic()
        self.assertEqual(self.prefill.ask("'cut' in codes"), "False", "it was not to be given up")
        room.abort()
        self.assertTrue(room.wait(1.5))
        self.pool.fill(99)
        self.assertLess(time.monotonic() - cut, 1.9, "it should still back off")
        room.release()
        self.assertEqual(self.prefill.ask("end('cut')"), "-1")
        self.assertEqual(self.prefill.ask(f"engine.unproven.take({room.bootstrap_room})"), "False")
        self.assertTrue((self.pool == 99).all(), "a byte came late")

    def test_without_the_peers_answer_sglangs_own_time_holds(self) -> None:
        room = self.room()
        room.publish(range(8), answered=False)
        with self.assertLogs("kvferry.sglang", "WARNING") as said:
            begun = time.monotonic()
            room.abort()
            self.assertTrue(room.wait(10.0))
        self.assertGreater(time.monotonic() - begun, 1.0)
        self.assertTrue(any("without this plugin" in line for line in said.output), said.output)
        self.assertTrue(any("without proof" in line for line in said.output), said.output)
        room.release()

    def test_a_late_answer_is_proof_as_well(self) -> None:
        room = self.room()
        room.publish(range(8), answered=False)
        room.abort()
        self.assertFalse(room.wait(0.2))
        self.decode.holds.bound(wire.parse_bound(wire.bound(room.bootstrap_room, wire.tagged(room.message))))
        self.assertTrue(room.wait(0.2))
        room.release()

    def test_a_failed_registration_says_why(self) -> None:
        taken = self.pool.ctypes.data
        with self.assertRaisesRegex(RuntimeError, "overlap"):
            self.engine.batch_register([taken + 10], [100])
        with self.assertRaisesRegex(RuntimeError, "kvferry"):
            self.engine.register(taken, 0)
        self.assertEqual(self.engine.batch_deregister([1]), -3)
        with self.assertRaises(RuntimeError):
            self.engine.deregister(1)

    def test_a_region_can_be_given_back_and_registered_again(self) -> None:
        other = numpy.zeros(PAGE, numpy.uint8)
        for _ in range(2):
            self.engine.register(other.ctypes.data, other.nbytes)
            self.engine.deregister(other.ctypes.data)

    def test_what_mooncake_offers_beyond_it(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "Mooncake"):
            self.engine.get_engine()
        self.assertEqual(self.engine.engine.get_rpc_port(), int(self.engine.session_id.rsplit(":", 1)[1]))
        self.assertEqual(self.engine.get_ib_device(), "kvferry:")
        with self.assertRaisesRegex(TypeError, "KVFERRY_SGLANG"):
            type("Ascend", (TransferEngine,), {})


class Beginnings(unittest.TestCase):
    def begin(self, host: str = "127.0.0.1", **more: str) -> TransferEngine:
        with mock.patch.dict(os.environ, more):
            return TransferEngine(host)

    def test_no_daemon(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "/nowhere"):
            self.begin(KVFERRY_SOCKET="/nowhere", MC_FORCE_TCP="1")

    def test_a_path_that_nobody_has(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "MOONCAKE_PROTOCOL=efa"):
            self.begin(MOONCAKE_PROTOCOL="efa", MC_FORCE_TCP="0")

    def test_what_the_daemon_cannot_do(self) -> None:
        daemon = Daemon("24200-24299")
        self.addCleanup(daemon.stop)
        with self.assertRaisesRegex(RuntimeError, "MC_FORCE_TCP=1"):
            self.begin(KVFERRY_SOCKET=str(daemon.socket), MC_FORCE_TCP="0")
        with self.assertRaisesRegex(RuntimeError, "SGLANG_HOST_IP"):
            self.begin("127.0.0.9", **environment(daemon))

    def test_not_enabled_it_imports_nothing(self) -> None:
        (entry,) = entry_points(group="sglang.srt.plugins", name="kvferry")
        self.assertEqual(entry.value, "kvferry.sglang:load")
        code = (
            "import sys; from importlib.metadata import entry_points;"
            "(entry,) = entry_points(group='sglang.srt.plugins', name='kvferry'); entry.load()();"
            "print(sorted({'sglang', 'torch', 'numpy', 'kvferry.sglang.hooks'} & set(sys.modules)))"
        )
        environ = {name: value for name, value in os.environ.items() if name != "KVFERRY_SGLANG"}
        run = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        self.assertEqual((run.stdout.strip(), run.stderr), ("[]", ""))


class Health(unittest.TestCase):
    """This process is the prefill rank, with sglang's accounting of failures."""

    def setUp(self) -> None:
        logging.getLogger("kvferry").addHandler(logging.NullHandler())
        self.here, self.there = Daemon("24300-24399"), Daemon("24400-24499")
        self.addCleanup(self.here.stop)
        self.addCleanup(self.there.stop)
        self.decode = Prefill(self.there)
        self.addCleanup(self.decode.stop)
        with mock.patch.dict(os.environ, environment(self.here, SGLANG_DISAGG_TRANSFER_RETRIES="1")):
            self.engine = TransferEngine("127.0.0.1")
        self.addCleanup(self.engine._engine.close)
        self.pool = numpy.zeros(PAGE, numpy.uint8)
        self.engine.register(self.pool.ctypes.data, self.pool.nbytes)
        self.target = int(self.decode.ask("pool.ctypes.data"))
        self.session_lock = threading.Lock()
        self.failed_sessions: set[str] = set()
        self.session_failures: dict[str, int] = defaultdict(int)
        prefill.adopt(self)

    def _unblacklist_session(self, session: str) -> None:
        self.failed_sessions.discard(session)
        self.session_failures.pop(session, None)

    def move(self) -> int:
        """As `transfer_worker` does."""
        session = wire.RoomSession(self.decode.session, 1, None)
        code = self.engine.batch_transfer_sync(session, [self.pool.ctypes.data], [self.target], [PAGE])
        if code != 0:
            with self.session_lock:
                self.session_failures[session] += 1
                if self.session_failures[session] >= 1:
                    self.failed_sessions.add(session)
        return code

    def eventually(self, is_so, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not is_so() and time.monotonic() < until:
            time.sleep(0.002)
        return is_so()

    def test_nine_are_not_a_death_ten_are_and_healing_lifts_it(self) -> None:
        session = self.decode.session
        self.assertEqual(self.move(), 0)
        self.there.kill()
        for number in range(9):
            self.assertEqual(self.move(), -1, number)
            # A session that has failed is told at once, if it is told at all.
            time.sleep(0.05)
            self.assertNotIn(session, self.failed_sessions, number)
        self.assertFalse(self.engine.unproven.take(1), "nothing was sent, so nothing is in doubt")
        self.assertEqual(self.move(), -1)
        self.assertTrue(self.eventually(lambda: session in self.failed_sessions, 2.0))
        self.there.start()
        self.assertTrue(self.eventually(lambda: session not in self.failed_sessions, 15.0))
        self.assertEqual(self.move(), 0, "lifted means usable")

    def test_nine_leave_the_session_usable(self) -> None:
        self.assertEqual(self.move(), 0)
        self.there.kill()
        self.assertEqual([self.move() for _ in range(9)], [-1] * 9)
        self.there.start()
        self.assertTrue(self.eventually(lambda: self.engine.send_probe(self.decode.session) == 0, 15.0))
        self.assertEqual(self.move(), 0)
        self.assertEqual(self.failed_sessions, set())


class DeadPeer(unittest.TestCase):
    def test_one_room_waits_for_it_and_the_next_do_not(self) -> None:
        logging.getLogger("kvferry").addHandler(logging.NullHandler())
        here, there = Daemon("24700-24799"), Daemon("24800-24899")
        self.addCleanup(here.stop)
        self.addCleanup(there.stop)
        decode = Prefill(there)
        with mock.patch.dict(os.environ, environment(here)):
            engine = TransferEngine("127.0.0.1")
        self.addCleanup(engine._engine.close)
        pool = numpy.zeros(PAGE, numpy.uint8)
        engine.register(pool.ctypes.data, pool.nbytes)
        target = int(decode.ask("pool.ctypes.data"))

        def move() -> int:
            return engine.batch_transfer_sync(decode.session, [pool.ctypes.data], [target], [PAGE])

        self.assertEqual(move(), 0)
        decode.process.kill()
        decode.stop()
        begun, moved = time.monotonic(), 0
        while engine.sessions.reason(decode.session) is None and moved < 20:
            self.assertEqual(move(), -1)
            moved += 1
        print(f"a dead decode has failed after {moved} rooms and {time.monotonic() - begun:.1f} s")
        self.assertLess(time.monotonic() - begun, 10.0, "ten times the 5 s that one waits for a peer's return")
        self.assertEqual(engine.sessions.reason(decode.session), "SESSION_FAILED")


if __name__ == "__main__":
    unittest.main()
