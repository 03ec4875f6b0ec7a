"""sglang's plugin in sglang itself: the hooks on the real classes, their threads and messages, behind real daemons.

Skipped, with the reason, where sglang cannot be imported. By itself:

    KVFERRYD_BIN=target/debug/kvferryd python -m unittest client/python/tests/test_plugin_sglang.py

What sglang's managers do from their start on, with a bootstrap server and processes of their own, is tests/sglang.
"""

import os
import sys
import threading
import time
import types
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import numpy
from daemons import Daemon

os.environ["KVFERRY_SGLANG"] = "1"
os.environ["MC_FORCE_TCP"] = "1"

try:
    from sglang.srt.disaggregation.mooncake import conn
    from sglang.srt.distributed.device_communicators import mooncake_transfer_engine
    from sglang.srt.environ import envs
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    WHY_NOT = None
except ImportError as error:
    WHY_NOT = f"sglang cannot be imported: {error}"

import kvferry.sglang
from kvferry.sglang import hooks, known, wire
from kvferry.sglang.engine import TransferEngine
from kvferry.sglang.sessions import Blacklist

PAGE = 4096
PAGES = 256

# What was said while it was loaded.
SAID: list[str] = []


def setUpModule() -> None:
    if WHY_NOT:
        print(f"test_plugin_sglang: skipped: {WHY_NOT}", file=sys.stderr)
        raise unittest.SkipTest(WHY_NOT)
    with unittest.TestCase().assertLogs("kvferry.sglang", "INFO") as said:
        kvferry.sglang.load()
        kvferry.sglang.load()
    SAID.extend(said.output)


def engine(daemon: Daemon) -> TransferEngine:
    """A rank's, as sglang makes it."""
    with mock.patch.dict(os.environ, {"KVFERRY_SOCKET": str(daemon.socket)}):
        mooncake_transfer_engine._mooncake_transfer_engine = None
        return mooncake_transfer_engine.init_mooncake_transfer_engine("127.0.0.1", 0, None)


class Pool:
    """A rank's memory: two KV buffers and one auxiliary one, as KVArgs names them."""

    def __init__(self, fill: int) -> None:
        self.bytes = numpy.full(2 * PAGES * PAGE, fill, numpy.uint8)
        self.aux = numpy.full(64 * 16, fill, numpy.uint8)
        base = self.bytes.ctypes.data
        self.args = conn.KVArgs()
        self.args.kv_data_ptrs = [base, base + PAGES * PAGE]
        self.args.kv_data_lens = [PAGES * PAGE] * 2
        self.args.kv_item_lens = [PAGE] * 2
        self.args.kv_layer_ids = []
        self.args.aux_data_ptrs = [self.aux.ctypes.data]
        self.args.aux_data_lens = [self.aux.nbytes]
        self.args.aux_item_lens = [64]
        self.args.state_types, self.args.state_data_ptrs, self.args.state_data_lens = [], [], []
        self.args.state_item_lens, self.args.state_layer_ids = [], []
        self.args.engine_rank, self.args.page_size = 0, 1
        self.args.prefill_start_layer, self.args.prefill_end_layer = 0, 1

    def pages(self, indices) -> numpy.ndarray:
        """Both buffers' bytes of these pages."""
        return self.bytes.reshape(2, PAGES, PAGE)[:, indices]


def manager(made: TransferEngine, pool: Pool, **more) -> "conn.MooncakeKVManager":
    """sglang's, without the constructor: that wants a server around it, and tests/sglang has one."""
    self = object.__new__(conn.MooncakeKVManager)
    self.engine, self.kv_args = made, pool.args
    self.local_ip, self.rank_port, self.bootstrap_port = "127.0.0.1", 1, 1
    self.enable_deferred_decode_kv_release, self.enable_trace, self.enable_staging = True, False, False
    self.defer_decode_allocation = self.enable_custom_mem_pool = False
    self.is_mla_backend, self.is_hybrid_mla_backend = False, False
    self.pp_size = self.attn_tp_size = self.attn_cp_size = 1
    self.attn_tp_rank = self.attn_cp_rank = self.pp_rank = 0
    self.max_transfer_batch_indices, self._dcp_pack_buffers = 0, None
    self.request_status, self.failure_records, self.failure_lock = {}, {}, threading.Lock()
    self._staging_outstanding = conn.defaultdict(int)
    self._deferred_ack_targets, self._deferred_ack_poisoned_rooms = {}, set()
    self._staging_ctx, self._stopped = None, False
    self.sent = []
    self._send_multipart_locked = lambda endpoint, parts, is_ipv6=False: self.sent.append(list(parts))
    self.register_buffer_to_engine()
    for name, value in more.items():
        setattr(self, name, value)
    return self


class Installed(unittest.TestCase):
    def test_every_part_is_taken_and_says_so(self) -> None:
        self.assertEqual(len(SAID), 1, "loading is done once")
        self.assertRegex(SAID[0], r"kvferry: sglang \S+ with engine, health, tags, poison, release")
        for part in hooks.PARTS:
            for path in part.hooked:
                self.assertIn(path, HookRegistry._patched)

    def test_the_sources_are_those_of_a_version_that_is_known(self) -> None:
        paths = {path for part in hooks.PARTS for path in part.relies}
        self.assertEqual(known.strangers(paths), [])

    def test_sglangs_loader_finds_it(self) -> None:
        with self.assertLogs("sglang.srt.plugins", "INFO") as said:
            load_plugins()
        self.assertTrue(any("Executed general plugin: kvferry" in line for line in said.output), said.output)

    def test_everybody_has_the_engine(self) -> None:
        self.assertIs(mooncake_transfer_engine.MooncakeTransferEngine, TransferEngine)

    def test_holding_is_a_last_resort(self) -> None:
        self.assertEqual(envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT.get(), 600.0)


class Refused(unittest.TestCase):
    def test_a_changed_source_leaves_its_part_to_sglang(self) -> None:
        path = f"{hooks.COMMON}.CommonKVReceiver.ensure_abort_notified"
        changed = {version: {**table, path: "0" * 16} for version, table in known.SOURCES.items()}
        release = next(part for part in hooks.PARTS if part.name == "release")
        with mock.patch.dict(known.SOURCES, changed), self.assertLogs("kvferry.sglang", "ERROR") as said:
            self.assertFalse(hooks._is_known(release, ["engine", "tags"]))
        self.assertIn("ensure_abort_notified", said.output[0])


class Rooms(unittest.TestCase):
    """A prefill and a decode rank in this process, each behind a daemon of its own."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.here, cls.there = Daemon("24500-24599"), Daemon("24600-24699")
        cls.source, cls.target = Pool(7), Pool(0)
        # One after the other: sglang has one engine per process.
        decode, prefill = engine(cls.there), engine(cls.here)
        cls.decode = manager(decode, cls.target, _deferred_abort_ack_tracker={}, _deferred_abort_generation=0)
        cls.prefill = manager(
            prefill,
            cls.source,
            transfer_infos={},
            req_to_decode_prefix_len={},
            failed_session_probes={},
            failed_sessions=set(),
            session_failures=conn.defaultdict(int),
            state_layout_rejections={},
            session_lock=threading.Lock(),
            decode_kv_args_table={},
        )
        cls.register()
        cls.queue = conn.FastQueue()
        cls.executor = conn.concurrent.futures.ThreadPoolExecutor(2)
        arguments = (cls.queue, cls.executor)
        cls.memory = mock.patch.object(conn, "get_memory", lambda: types.SimpleNamespace(enable_unified_memory=False))
        cls.memory.start()
        cls.worker = threading.Thread(target=cls.prefill.transfer_worker, args=arguments, daemon=True)
        cls.worker.start()
        cls.room = 0

    @classmethod
    def register(cls) -> None:
        """The decode's memory, as it tells its prefill."""
        args = cls.target.args
        cls.prefill.decode_kv_args_table[cls.decode.engine.session_id] = types.SimpleNamespace(
            requires_dcp_relayout=False,
            dst_kv_ptrs=args.kv_data_ptrs,
            dst_aux_ptrs=args.aux_data_ptrs,
            dst_attn_tp_size=1,
            dst_kv_layer_ids=[],
            dst_kv_item_len=PAGE,
            dst_kv_item_lens=args.kv_item_lens,
            dst_tp_rank=0,
        )

    @classmethod
    def tearDownClass(cls) -> None:
        cls.queue.put(None)
        cls.worker.join(10)
        cls.memory.stop()
        cls.executor.shutdown()
        for made in (cls.prefill.engine, cls.decode.engine):
            made._engine.close()
        cls.here.stop()
        cls.there.stop()

    def setUp(self) -> None:
        self.target.bytes.fill(0)
        self.prefill.sent.clear()

    def receiver(self):
        """A request at the decode, and everything it sends to its prefill."""
        type(self).room += 1
        made = object.__new__(conn.MooncakeKVReceiver)
        made.kv_mgr, made.bootstrap_room, made.bootstrap_addr = self.decode, self.room, "prefill"
        made.bootstrap_infos = [{"rank_ip": "127.0.0.1", "rank_port": 1, "is_dummy": False}]
        made.required_dst_info_num, made.init_time, made.conclude_state = 1, None, None
        made.abort_notified, made._abort_generation = False, None
        made.sent = []
        socket = types.SimpleNamespace(send_multipart=made.sent.append)
        made._connect_to_bootstrap_server = lambda info: (socket, threading.Lock())
        return made

    def deliver(self, message: list[bytes], role) -> "list[bytes] | None":
        """Through what a manager's thread receives by."""
        socket = types.SimpleNamespace(recv_multipart=lambda: message)
        role.server_args = types.SimpleNamespace(enable_pd_role_switch=False)
        return role._make_worker_recv(socket)()

    def publish(self, pages, *, tagged: bool = True):
        """Decode tells prefill its pages, and prefill answers."""
        receiver = self.receiver()
        receiver.send_metadata(numpy.asarray(pages, numpy.int32), 0)
        (message,) = receiver.sent
        if not tagged:
            message = message[: wire.METADATA_FRAMES]
        info = conn.TransferInfo.from_zmq(self.deliver(message, self.prefill))
        room = receiver.bootstrap_room
        self.prefill.request_status[room] = conn.KVPoll.WaitingForInput
        self.prefill.transfer_infos[room] = {str(info.mooncake_session_id): info}
        for answer in self.prefill.sent:
            if answer[0] == wire.BOUND:
                self.assertIsNone(self.deliver(answer, self.decode), "nobody else sees it")
        return receiver

    def send(self, receiver, pages, chunk: slice, *, last: bool) -> None:
        room = receiver.bootstrap_room
        indices = numpy.asarray(pages, numpy.int32)
        self.queue.put(
            conn.TransferKVChunk(room, indices, chunk, last, 0 if last else None, None, trace_ctx=mock.Mock())
        )

    def status(self, receiver, *expected: int):
        """Waits for the room to be in one of these states on the prefill."""
        until = time.monotonic() + 20
        while (now := self.prefill.request_status.get(receiver.bootstrap_room)) not in expected:
            self.assertLess(time.monotonic(), until, now)
            time.sleep(0.002)
        return now

    def drained(self, receiver) -> None:
        until = time.monotonic() + 20
        while self.prefill._staging_outstanding.get(receiver.bootstrap_room, 0) > 0:
            self.assertLess(time.monotonic(), until)
            time.sleep(0.002)

    def safe(self, receiver) -> bool:
        return self.decode.is_abort_release_safe(receiver.bootstrap_room, 1)

    def test_a_room_arrives_by_chunks(self) -> None:
        receiver = self.publish(range(8))
        self.assertEqual(len(receiver.__dict__["kvferry_holds"]), 1)
        self.send(receiver, range(100, 104), slice(0, 4), last=False)
        self.send(receiver, range(104, 108), slice(4, 8), last=True)
        self.status(receiver, conn.KVPoll.Success)
        self.assertTrue((self.target.pages(range(8)) == 7).all())
        self.assertEqual(int((self.target.bytes == 7).sum()), 2 * 8 * PAGE)

    def test_a_lost_abort_frees_the_pages_and_the_next_chunk_moves_nothing(self) -> None:
        receiver = self.publish(range(8))
        self.send(receiver, range(100, 104), slice(0, 4), last=False)
        self.drained(receiver)
        begun = time.monotonic()
        receiver.abort_notified = True
        receiver._send_abort_notification()
        while not self.safe(receiver):
            self.assertLess(time.monotonic() - begun, 5.0)
            time.sleep(0.001)
        print(f"sglang's pages are free on proof after {(time.monotonic() - begun) * 1e3:.1f} ms")
        self.assertEqual(receiver.sent[-1][0], b"ABORT")
        self.target.bytes.fill(99)
        self.decode.clear_deferred_abort_state(receiver.bootstrap_room)
        # It was not delivered.
        self.send(receiver, range(104, 108), slice(4, 8), last=True)
        self.status(receiver, conn.KVPoll.Failed)
        self.assertTrue((self.target.bytes == 99).all())
        self.assertIsInstance(self.prefill.failed_sessions, Blacklist)
        self.assertEqual(self.prefill.failed_sessions, set())
        self.assertNotIn(receiver.bootstrap_room, self.prefill._deferred_ack_poisoned_rooms, "both sides are settled")

    def test_a_prefill_without_the_plugin_is_believed_as_sglang_does(self) -> None:
        receiver = self.publish(range(8), tagged=False)
        self.send(receiver, range(100, 108), slice(0, 8), last=True)
        self.status(receiver, conn.KVPoll.Success)
        receiver._send_abort_notification()
        time.sleep(0.2)
        self.assertFalse(self.safe(receiver))
        generation = self.decode._deferred_abort_ack_tracker[receiver.bootstrap_room].generation
        self.decode.note_abort_ack(receiver.bootstrap_room, 0, generation)
        self.assertTrue(self.safe(receiver))
        self.decode.clear_deferred_abort_state(receiver.bootstrap_room)

    def test_head_slices_from_a_pool_of_threads_are_tagged(self) -> None:
        receiver = self.publish(range(8))
        receiver._send_abort_notification()
        while not self.safe(receiver):
            time.sleep(0.001)
        (info,) = self.prefill.transfer_infos[receiver.bootstrap_room].values()
        blocks = [(self.source.args.kv_data_ptrs[0], self.target.args.kv_data_ptrs[0], PAGE)]
        future = self.executor.submit(self.prefill._transfer_data, info.mooncake_session_id, blocks)
        self.assertEqual(future.result(20), -1)
        self.assertFalse(self.target.bytes.any())
        self.decode.clear_deferred_abort_state(receiver.bootstrap_room)

    def test_a_room_in_doubt_is_poisoned(self) -> None:
        poisoned = self.prefill._deferred_ack_poisoned_rooms
        self.prefill._poison_unsettled_send(1_000_001)
        self.assertNotIn(1_000_001, poisoned)
        self.prefill.engine.unproven.note(1_000_001)
        self.prefill._poison_unsettled_send(1_000_001)
        self.assertIn(1_000_001, poisoned)

    def test_a_failed_registration_ends_the_rank(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "overlap"):
            self.decode.register_buffer_to_engine()


if __name__ == "__main__":
    unittest.main()
