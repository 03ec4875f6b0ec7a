"""What sglang's plugin decides, without sglang, engines or daemons."""

import time
import types
import unittest
from unittest import mock

import numpy

import kvferry
from kvferry.sglang import hooks, known, prefill, revoker, wire
from kvferry.sglang.decode import around_make_worker_recv
from kvferry.sglang.engine import TransferEngine
from kvferry.sglang.holds import Holds
from kvferry.sglang.pages import RANGES_LIMIT, destinations
from kvferry.sglang.sessions import DEAD, UNREACHABLE, Blacklist, Sessions
from kvferry.sglang.settlement import Unproven


class Verdicts(unittest.TestCase):
    def test_a_reply_from_before_a_recovery_changes_nothing(self) -> None:
        sessions, seen = Sessions(), []
        sessions.watch(lambda session, failed: seen.append((session, failed)))
        began = sessions.began("a:1")
        sessions.changed("a:1", "FAILED")
        sessions.changed("a:1", "HEALTHY")
        with self.assertNoLogs("kvferry.sglang", "ERROR"):
            sessions.failed("a:1", began, "SESSION_FAILED")
        self.assertIsNone(sessions.reason("a:1"))
        self.assertEqual(seen, [("a:1", True), ("a:1", False)])

    def test_an_engine_that_dies_under_its_first_room_is_gone(self) -> None:
        sessions = Sessions()
        began = sessions.began("a:1")
        sessions.changed("a:1", "HEALTHY")
        with self.assertLogs("kvferry.sglang", "ERROR"):
            sessions.failed("a:1", began, "ENGINE_GONE")
        self.assertEqual(sessions.reason("a:1"), "ENGINE_GONE")

    def test_only_what_speaks_against_the_session_does(self) -> None:
        sessions = Sessions()
        blacklist = Blacklist(sessions)
        for reason in ("CONNECTION_LOST", "REVOKED", "DEADLINE", "OWN_DAEMON_GONE", ""):
            sessions.failed("a:1", sessions.began("a:1"), reason)
            blacklist.add("a:1")
        self.assertEqual(blacklist, set())
        with self.assertLogs("kvferry.sglang", "ERROR"):
            sessions.failed("a:1", sessions.began("a:1"), "PEER_RESTARTED")
        blacklist.add(wire.RoomSession("a:1", 3, None))
        self.assertIs(type(blacklist.pop()), str)

    def test_whoever_is_dead_is_known_by_its_reason_until_it_answers(self) -> None:
        sessions, seen = Sessions(), []
        sessions.watch(lambda session, failed: seen.append(failed))
        for reason in sorted(DEAD):
            with self.assertLogs("kvferry.sglang", "ERROR"):
                sessions.failed("a:1", sessions.began("a:1"), reason)
            self.assertEqual(sessions.reason("a:1"), reason)
            sessions.done("a:1")
            self.assertIsNone(sessions.reason("a:1"))
        self.assertEqual(seen, [True, False] * len(DEAD))

    def test_nobody_is_doubted_for_long_nor_for_a_cut(self) -> None:
        sessions = Sessions()
        for reason in ("CONNECTION_LOST", "REVOKED", "DEADLINE"):
            sessions.failed("a:1", 0, reason)
        self.assertFalse(sessions.is_doubted("a:1"))
        for reason in sorted(UNREACHABLE):
            for ends in (lambda: sessions.done("a:1"), lambda: sessions.changed("a:1", "HEALTHY")):
                sessions.failed("a:1", 0, reason)
                self.assertTrue(sessions.is_doubted("a:1"))
                ends()
                self.assertFalse(sessions.is_doubted("a:1"))

    def test_a_decode_that_tells_its_memory_anew_is_accepted(self) -> None:
        engine = mock.Mock(spec=TransferEngine, sessions=Sessions())
        manager = types.SimpleNamespace(engine=engine)
        prefill.after_registration(None, manager, "a:1", object())
        self.assertEqual(engine.reset_session.call_count, 0)
        with self.assertLogs("kvferry.sglang", "ERROR") as said:
            engine.sessions.failed("a:1", 0, "PEER_RESTARTED")
            prefill.after_registration(None, manager, "a:1", object())
            engine.reset_session.side_effect = kvferry.NoDaemonError("gone")
            prefill.after_registration(None, manager, "a:1", object())
        self.assertEqual(engine.reset_session.call_count, 2)
        self.assertIn("stays blacklisted", said.output[-1])

    def test_a_room_is_poisoned_for_want_of_proof_only(self) -> None:
        manager = types.SimpleNamespace(engine=mock.Mock(spec=TransferEngine, unproven=Unproven(limit=2)))
        poisoned = []
        poison = lambda room: prefill.around_poison(lambda _, room: poisoned.append(room), manager, room)  # noqa: E731
        manager.engine.unproven.note(1)
        poison(1)
        poison(2)
        poison(1)
        self.assertEqual(poisoned, [1])
        with self.assertLogs("kvferry.sglang", "ERROR"):
            for room in (3, 4, 5):
                manager.engine.unproven.note(room)
        poison(6)
        self.assertEqual(poisoned, [1, 6], "what does not fit is remembered as everybody")
        other = types.SimpleNamespace(engine=object())
        prefill.around_poison(lambda _, room: poisoned.append(room), other, 7)
        self.assertEqual(poisoned, [1, 6, 7], "other engines are none of its business")

    def test_an_aborted_room_waits_for_all_of_it(self) -> None:
        holds = Holds(unbound_seconds=1e9)
        message = [b"1", b"ip", b"1", b"s", b"pages", b"0", b"", b"2", b"0", b""]
        dummy = [*message[:4], b"", b"", *message[6:]]
        first, second = (holds.open(5, mock.Mock(), lambda: None) for _ in range(2))
        told = [wire.tagged(first.publish(frames)) for frames in (message, dummy, message)]
        second.publish(message)
        holds.abort(first)
        first.settled = True
        holds.bound(wire.Bound(5, told[0].tag, 0))
        holds.bound(wire.Bound(5, told[0].tag, 1))
        self.assertFalse(holds.is_proven(5), "the third rank has not answered")
        holds.bound(wire.Bound(5, b"x" * 16, 2))
        self.assertFalse(holds.is_proven(5), "an answer to something else")
        holds.bound(wire.Bound(5, told[0].tag, 2))
        self.assertTrue(holds.is_proven(5))
        holds.abort(second)
        self.assertFalse(holds.is_proven(5), "the room was used again, and aborted again")
        holds.released(5)
        holds.released(5)
        self.assertFalse(holds.is_proven(5))
        self.assertTrue(first.released and second.released)


class Revoking(unittest.TestCase):
    """An engine that answers as it is told."""

    rooms = 0

    def setUp(self) -> None:
        type(self).rooms += 1
        pauses = mock.patch.multiple(revoker, FIRST_PAUSE_SECONDS=0.01, LONGEST_PAUSE_SECONDS=0.02)
        pauses.start()
        self.addCleanup(pauses.stop)
        self.holds = Holds(unbound_seconds=0.05)
        self.revoker = revoker.Revoker()

    def hold(self, answers, *, bound: bool = True, ranges=None):
        engine = mock.Mock()
        engine.revoke_tag.side_effect = answers
        hold = self.holds.open(self.rooms, engine, lambda: ranges)
        tagged = wire.tagged(hold.publish([b"1", b"ip", b"1", b"s", b"pages", b"0", b"", b"1", b"0", b""]))
        if bound:
            self.holds.bound(wire.Bound(self.rooms, *tagged))
        self.holds.abort(hold)
        self.revoker.submit(hold)
        self.addCleanup(self.holds.released, self.rooms)
        return hold

    def soon(self, is_so) -> bool:
        until = time.monotonic() + 5
        while not is_so() and time.monotonic() < until:
            time.sleep(0.002)
        return is_so()

    def test_it_asks_until_it_is_settled(self) -> None:
        with self.assertLogs("kvferry.sglang", "WARNING") as said:
            hold = self.hold([False, kvferry.NoDaemonError("gone"), True])
            self.assertTrue(self.soon(lambda: hold.proven))
        said = [line for line in said.output if f"room {self.rooms}" in line]
        self.assertEqual((len(said), hold.engine.revoke_tag.call_count), (2, 3))
        self.assertEqual(hold.engine.revoke.call_count, 0, "the tag does the work")

    def test_others_do_not_wait_for_one_that_cannot_be_had(self) -> None:
        with self.assertLogs("kvferry.sglang", "WARNING"):
            for _ in range(20):
                self.hold(lambda _: False)
            hold = self.hold([True])
            self.assertTrue(self.soon(lambda: hold.proven))

    def test_a_full_table_leaves_it_to_sglangs_own_time(self) -> None:
        failure = types.SimpleNamespace(reason="LIMIT")
        with self.assertLogs("kvferry.sglang", "WARNING"):
            hold = self.hold(lambda _: (_ for _ in ()).throw(kvferry.RefusedError("full", failure)))
            self.assertTrue(self.soon(lambda: self.holds.is_overdue(self.rooms)))
        self.assertFalse(hold.proven)

    def test_a_daemon_that_is_gone_is_waited_for(self) -> None:
        with self.assertLogs("kvferry.sglang", "WARNING"):
            hold = self.hold(lambda _: (_ for _ in ()).throw(kvferry.NoDaemonError("gone")))
            time.sleep(0.2)
        self.assertFalse(hold.proven or self.holds.is_overdue(self.rooms))

    def test_without_answers_the_pages_are_revoked_once_more_is_known(self) -> None:
        with self.assertLogs("kvferry.sglang", "WARNING"):
            hold = self.hold([True], bound=False, ranges=[(1000, 10)])
            self.assertTrue(self.soon(lambda: hold.engine.revoke.called))
        hold.engine.revoke.assert_called_once_with([(1000, 10)])
        self.assertFalse(hold.proven, "what they begin later is not stopped")

    def test_whoever_is_released_is_not_asked_for_any_more(self) -> None:
        with self.assertLogs("kvferry.sglang", "WARNING"):
            hold = self.hold(lambda _: False)
            self.assertTrue(self.soon(lambda: hold.engine.revoke_tag.call_count > 1))
        self.holds.released(self.rooms)
        time.sleep(0.1)
        calls = hold.engine.revoke_tag.call_count
        time.sleep(0.2)
        self.assertEqual(hold.engine.revoke_tag.call_count, calls)


class Wire(unittest.TestCase):
    MESSAGE = [b"%d" % number for number in range(wire.METADATA_FRAMES)]

    def test_a_tag_travels_behind_what_sglang_reads(self) -> None:
        message = wire.with_tag(self.MESSAGE, b"t" * 16, 70_000)
        self.assertEqual(message[: len(self.MESSAGE)], self.MESSAGE)
        self.assertEqual(set(message[len(self.MESSAGE) : -1]), {b""})
        self.assertEqual(wire.tagged(message), (b"t" * 16, 70_000))

    def test_anything_else_has_none(self) -> None:
        message = wire.with_tag(self.MESSAGE, b"t" * 16, 1)
        for other in (
            self.MESSAGE,
            message[:-1],
            [*message, b""],
            [*message[:-1], b"x"],
            [*message[:-1], message[-1] + b"x"],
        ):
            self.assertIsNone(wire.tagged(other))
        self.assertEqual(wire.with_tag([b""] * 40, b"t" * 16, 1), [b""] * 40, "no room")

    def test_answers(self) -> None:
        self.assertEqual(wire.parse_bound(wire.bound(7, wire.Tagged(b"t" * 16, 3))), (7, b"t" * 16, 3))
        for bad in ([wire.BOUND], [wire.BOUND, b"a", b"t" * 16, b"1"], [wire.BOUND, b"1", b"t", b"1"]):
            self.assertIsNone(wire.parse_bound(bad))

    def test_a_session_that_knows_its_room_is_the_session(self) -> None:
        session = wire.RoomSession("10.0.0.1:20000", 5, b"t" * 16)
        self.assertEqual({"10.0.0.1:20000": 1}[session], 1)
        self.assertEqual((session.room, session.tag), (5, b"t" * 16))

    def test_what_is_received(self) -> None:
        """Answers are taken out; a publication is answered before the manager sees it; a bad one harms nobody."""
        holds, sent = Holds(unbound_seconds=30.0), []
        hold = holds.open(7, mock.Mock(), lambda: None)
        publication = hold.publish([b"7", b"10.0.0.2", b"9000", *self.MESSAGE[3:]])
        nonsense = [b"7", b"10.0.0.2", b"port", *publication[3:]]
        registration = [b"None", *self.MESSAGE[1:]]
        answer = wire.bound(7, wire.tagged(publication))
        messages = iter([publication, answer, registration, nonsense, None, publication])
        elsewhere = [False, False, True]
        manager = types.SimpleNamespace(
            engine=mock.Mock(spec=TransferEngine),
            transfer_infos={},
            _send_multipart_locked=lambda endpoint, frames, is_ipv6: sent.append((endpoint, frames)),
        )
        receive = around_make_worker_recv(
            lambda _manager, _socket: lambda: next(messages),
            manager,
            None,
            holds=holds,
            sglang=prefill.Sglang(
                to_tcp=lambda host, port: (f"tcp://{host}:{port}", False), sends_aux_itself=lambda _: elsewhere.pop(0)
            ),
        )
        with self.assertLogs("kvferry.sglang", "WARNING"):
            received = [receive() for _ in range(6)]
        self.assertEqual(received, [publication, None, registration, nonsense, None, publication])
        self.assertEqual(sent, [("tcp://10.0.0.2:9000", answer)], "the last one has writes that no tag stops")
        self.assertTrue(hold.all_bound)


class Pages(unittest.TestCase):
    def args(self, **more):
        usual = dict.fromkeys(("aux_data_ptrs", "aux_item_lens", "state_data_ptrs", "state_item_lens"), ())
        return types.SimpleNamespace(**{**usual, "kv_data_ptrs": [1000, 9000], "kv_item_lens": [10, 20], **more})

    def test_pages_of_every_pool_aux_and_state(self) -> None:
        args = self.args(
            aux_data_ptrs=[50],
            aux_item_lens=[4],
            state_data_ptrs=[[70_000, 80_000], [90_000]],
            state_item_lens=[[8, 2], [1]],
        )
        ranges = destinations(args, numpy.array([3, 1, 2, 7]), 5, [[2], None])
        expected = [(70, 4), (1010, 30), (1070, 10), (9020, 60), (9140, 20), (70_016, 8), (80_004, 2)]
        self.assertEqual(ranges, expected)

    def test_neighbours_are_joined_and_nothing_is_nothing(self) -> None:
        args = self.args(kv_data_ptrs=[0, 100], kv_item_lens=[10, 10])
        self.assertEqual(destinations(args, numpy.arange(10), None, None), [(0, 200)])
        self.assertEqual(destinations(args, numpy.array([], int), None, None), [])
        self.assertEqual(
            destinations(args, numpy.array([0]), None, None, numpy.array([5])),
            [(0, 10), (50, 10), (100, 10), (150, 10)],
        )

    def test_scattered_pages_are_too_many(self) -> None:
        args = self.args(kv_data_ptrs=[0], kv_item_lens=[10])
        self.assertEqual(len(destinations(args, numpy.arange(0, 2 * RANGES_LIMIT, 2), None, None)), RANGES_LIMIT)
        self.assertIsNone(destinations(args, numpy.arange(0, 2 * RANGES_LIMIT + 2, 2), None, None))


class Guards(unittest.TestCase):
    """The standard library stands for an sglang of some version."""

    HERE = "textwrap.dedent"

    def test_what_is_known_is_taken_and_what_is_not_is_refused_loudly(self) -> None:
        part = hooks.Part("part", (), (self.HERE,), ("textwrap.indent",))
        table = {path: known.digest(path) for path in (self.HERE, "textwrap.indent")}
        with mock.patch.dict(known.SOURCES, {"0.5.23": table}), self.assertNoLogs("kvferry.sglang"):
            self.assertTrue(hooks._is_known(part, []))
        with mock.patch.dict(known.SOURCES, {"0.5.23": {self.HERE: table[self.HERE]}}):
            with self.assertLogs("kvferry.sglang", "ERROR") as said:
                self.assertFalse(hooks._is_known(part, []))
        self.assertIn("textwrap.indent", said.output[0])
        self.assertNotIn(self.HERE, said.output[0])

    def test_a_part_without_what_it_needs_is_refused_loudly(self) -> None:
        part = hooks.Part("part", ("engine",), (), ())
        with self.assertLogs("kvferry.sglang", "ERROR") as said:
            self.assertFalse(hooks._is_known(part, []))
        self.assertIn("engine", said.output[0])
        self.assertTrue(hooks._is_known(part, ["engine"]))

    def test_what_is_not_there_has_no_digest(self) -> None:
        self.assertIsNone(known.digest("textwrap.nothing"))
        self.assertIsNone(known.digest("no_such_package.thing"))
        self.assertEqual(known.strangers(["textwrap.nothing"]), ["textwrap.nothing"])

    def test_every_path_has_a_hash_and_every_hash_a_path(self) -> None:
        paths = {path for part in hooks.PARTS for path in (*part.hooked, *part.relies)}
        for version, table in known.SOURCES.items():
            self.assertEqual(set(table), paths, version)


if __name__ == "__main__":
    unittest.main()
