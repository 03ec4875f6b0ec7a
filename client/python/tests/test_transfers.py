"""Two processes, two daemons, bytes from one to the other: the package as its users meet it.

Run by client/python/test.sh, which installs the wheel and names the daemon's binary in KVFERRYD_BIN.
"""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest

import numpy
from daemons import Daemon, Program

import kvferry


class Peer(Program):
    """An engine in a process of its own: attaches, and shares a pool."""

    CODE = textwrap.dedent(
        """
        import sys, numpy, kvferry
        with kvferry.Engine.attach(sys.argv[1], name="peer") as engine:
            pool = kvferry.SharedBuffer(int(sys.argv[2]))
            bytes = numpy.asarray(pool)
            engine.register([pool])
            print(engine.session_id, pool.address, flush=True)
            for line in sys.stdin:
                print(eval(line), flush=True)
        """
    )

    def __init__(self, daemon: Daemon, length: int) -> None:
        super().__init__(self.CODE, str(daemon.socket), str(length))
        session, address = self.line().split()
        self.session, self.address = session, int(address)


POOL = 16 << 20


class Transfers(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.here, cls.there = Daemon("23000-23099"), Daemon("23100-23199")
        cls.peer = Peer(cls.there, POOL)
        cls.engine = kvferry.Engine.attach(cls.here.socket, name="here")
        cls.pool = kvferry.SharedBuffer(POOL)
        cls.bytes = numpy.asarray(cls.pool)
        cls.engine.register([cls.pool])

    @classmethod
    def tearDownClass(cls) -> None:
        cls.engine.close()
        cls.peer.stop()
        cls.here.stop()
        cls.there.stop()

    def setUp(self) -> None:
        self.peer.ask("bytes.fill(0)")
        self.bytes[:] = numpy.random.default_rng(7).integers(0, 256, POOL, dtype=numpy.uint8)

    def move(self, op, offsets, lengths, **more):
        local = [self.pool.address + offset for offset in offsets]
        remote = [self.peer.address + offset for offset in offsets]
        return self.engine.transfer(self.peer.session, op, local, remote, lengths, **more)

    def test_every_byte_of_a_write_arrives_and_no_other_changes(self) -> None:
        offsets, length = range(0, POOL, 65536), 4096
        report = self.move("write", list(offsets), length)
        self.assertTrue(report.done, report)
        self.assertEqual((report.slices, report.bytes_done), (256, 256 * 4096))
        self.assertEqual(report.path, "TCP")
        expected = int(sum(int(self.bytes[at : at + length].sum()) for at in offsets))
        self.assertEqual(int(self.peer.ask("int(bytes.sum())")), expected)
        first = self.bytes[:length].tobytes().hex()
        self.assertEqual(self.peer.ask(f"bytes[:{length}].tobytes().hex()"), first)

    def test_a_read_brings_what_the_peer_wrote(self) -> None:
        self.peer.ask("bytes.fill(171)")
        report = self.move("read", [0, 1 << 20], [1 << 20, 5])
        self.assertTrue(report.done, report)
        self.assertTrue((self.bytes[: (1 << 20) + 5] == 171).all())

    def test_columns_may_be_lists_tuples_and_arrays(self) -> None:
        offsets = numpy.arange(0, POOL, 4096, dtype=numpy.uint64)
        for kind in (list, tuple, numpy.asarray, lambda it: numpy.asarray(it).astype(numpy.int64)):
            local, remote = kind(offsets + self.pool.address), kind(offsets + self.peer.address)
            lengths = kind(numpy.full(len(offsets), 256, numpy.uint32))
            report = self.engine.transfer(self.peer.session, "write", local, remote, lengths)
            self.assertTrue(report.done, report)
            self.assertEqual(report.bytes, 256 * len(offsets))

    def test_plain_memory_is_registered_by_address(self) -> None:
        array = numpy.full(100_000, 9, numpy.uint8)
        (region,) = self.engine.register([(array.ctypes.data, array.nbytes)])
        self.assertEqual((region.kind, region.length), ("PROCESS", 100_000))
        remote = [self.peer.address]
        report = self.engine.transfer(self.peer.session, "write", [array.ctypes.data], remote, array.nbytes)
        self.assertTrue(report.done, report)
        self.assertEqual(self.peer.ask("int(bytes.sum())"), "900000")
        self.assertTrue(self.engine.unregister([region.id]))

    def test_started_and_waited_for_by_id_or_handle(self) -> None:
        arguments = (self.peer.session, "write", [self.pool.address], [self.peer.address], 4096)
        pending = self.engine.transfer_async(*arguments)
        self.assertTrue(pending.wait().done)
        self.assertTrue(self.engine.wait(pending.id, 5.0).done)
        with self.assertRaises(ValueError):
            pending.wait()
        other = self.engine.transfer_async(*arguments)
        self.assertTrue(self.engine.wait(other.id).done)

    def test_many_threads_move_at_once(self) -> None:
        reports = []

        def work(number: int) -> None:
            for turn in range(20):
                reports.append(self.move("write", [(number * 20 + turn) * 4096], 4096))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(reports), 160)
        self.assertTrue(all(report.done for report in reports), reports)
        mine = int(self.bytes[: 160 * 4096].sum())
        self.assertEqual(int(self.peer.ask("int(bytes.sum())")), mine)

    def test_other_threads_run_while_one_waits(self) -> None:
        events, ticks = self.engine.events(), []

        def wait() -> None:
            events.get(0.5)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while waiting.is_alive():
            ticks.append(time.monotonic())
            time.sleep(0.01)
        self.assertGreater(len(ticks), 10)

    def test_refusals_name_the_slice_and_move_nothing(self) -> None:
        local, remote = [self.pool.address] * 2, [self.peer.address, 4096]
        report = self.engine.transfer(self.peer.session, "write", local, remote, 4096)
        self.assertEqual((report.outcome, report.failure.index, report.bytes_done), ("FAILED", 1, 0))
        with self.assertRaises(kvferry.RefusedError) as refused:
            self.engine.transfer(self.peer.session, "write", [1, 2], [3], 4096)
        self.assertEqual(refused.exception.reason, "BAD_ARGUMENT")
        self.assertEqual(self.peer.ask("int(bytes.sum())"), "0")

    def test_arguments_that_make_no_sense(self) -> None:
        at, there = [self.pool.address], [self.peer.address]
        session = self.peer.session
        for error, arguments, keywords in [
            (ValueError, (session, "push", at, there, 1), {}),
            (OverflowError, (session, "write", [-1], there, 1), {}),
            (ValueError, (session, "write", numpy.array([-1]), there, 1), {}),
            (TypeError, (session, "write", numpy.array([1.5]), there, 1), {}),
            (TypeError, (session, "write", numpy.array([[1]]), there, 1), {}),
            (TypeError, (session, "write", ["one"], there, 1), {}),
            (TypeError, (session, "write", None, there, 1), {}),
            (ValueError, (session, "write", at, there, 1), {"deadline": -1.0}),
            (ValueError, (session, "write", at, there, 1), {"deadline": float("nan")}),
            (ValueError, (session, "write", at, there, 1), {"id": b"short"}),
        ]:
            with self.assertRaises(error, msg=(arguments, keywords)):
                self.engine.transfer(*arguments, **keywords)

    def test_a_revoked_tag_is_refused_from_then_on(self) -> None:
        tag = "request 17"
        report = self.move("write", [0], 4096, tag=tag)
        self.assertTrue(report.done, report)
        self.assertEqual(self.peer.ask(f"engine.revoke_tag({tag!r})"), "True")
        report = self.move("write", [0], 4096, tag=tag)
        self.assertEqual((report.outcome, report.failure.reason), ("FAILED", "REVOKED"))
        self.assertEqual(kvferry.tag(tag), kvferry.tag(tag.encode()))
        self.assertTrue(self.engine.revoke([(self.pool.address, 4096)]))

    def test_an_id_nobody_knows(self) -> None:
        for ask in (self.engine.cancel, lambda id: self.engine.wait(id, 1.0)):
            with self.assertRaises(kvferry.RefusedError):
                ask(bytes(range(16)))

    def test_probe(self) -> None:
        self.assertTrue(self.engine.probe(self.peer.session))
        nobody = self.engine.probe("127.0.0.1:1", 2.0)
        self.assertFalse(nobody.alive)
        self.assertIsNotNone(nobody.failure)

    def test_a_view_without_numpy_keeps_the_memory(self) -> None:
        buffer = kvferry.SharedBuffer(4096)
        view = buffer.view()
        del buffer
        view[4095] = 3
        self.assertEqual((view[4095], len(view)), (3, 4096))

    def test_a_forked_child_is_told_to_attach_for_itself(self) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                self.engine.probe(self.peer.session)
            except kvferry.ForkedError as error:
                code = 0 if error.owner == os.getppid() else 2
            finally:
                os._exit(code)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
        self.assertTrue(self.move("write", [0], 4096).done)


class Attachments(unittest.TestCase):
    def test_no_daemon_names_the_path_and_what_helps(self) -> None:
        with self.assertRaises(kvferry.NoDaemonError) as nobody:
            kvferry.Engine.attach("/nowhere/engine.sock")
        self.assertEqual(str(nobody.exception.path), "/nowhere/engine.sock")
        self.assertIsInstance(nobody.exception, ConnectionError)
        self.assertIn("/nowhere/engine.sock", str(nobody.exception))

    def test_rail_maps_are_taken_as_sglang_writes_them(self) -> None:
        daemon = Daemon("23950-23959")
        self.addCleanup(daemon.stop)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write('{"0": "nowhere_0", "1": "nowhere_1"}')
            file.flush()
            for gpu, rails in [(None, "nowhere_0,nowhere_1"), (1, '{"1": "nowhere_0"}'), (0, file.name)]:
                kvferry.Engine.attach(daemon.socket, gpu_id=gpu, rail_map=rails).close()
            for gpu, rails, says in [
                (2, file.name, "No IB devices configured for GPU 2. Available GPUs: [0, 1]"),
                (0, file.name + ".json", f"File {file.name}.json does not exist."),
                (0, "", "No valid IB devices specified"),
            ]:
                with self.assertRaises(kvferry.RefusedError) as refused:
                    kvferry.Engine.attach(daemon.socket, gpu_id=gpu, rail_map=rails)
                self.assertEqual(refused.exception.reason, "BAD_ARGUMENT")
                self.assertIn(says, str(refused.exception))
        with self.assertRaises(kvferry.RefusedError) as refused:
            kvferry.Engine.attach(daemon.socket, rail_map="nowhere_0", transports=["rdma"])
        self.assertIn("Invalid IB devices", str(refused.exception))

    def test_a_closed_engine_says_so(self) -> None:
        daemon = Daemon("23200-23299")
        try:
            with kvferry.Engine.attach(daemon.socket) as engine:
                events = engine.events()
            with self.assertRaises(kvferry.ClosedError):
                engine.probe("127.0.0.1:1")
            self.assertEqual(repr(engine), "Engine(closed)")
            self.assertEqual(list(events), [], "nothing more comes, and that is said")
        finally:
            daemon.stop()

    def test_a_killed_daemon_is_survived(self) -> None:
        daemon = Daemon("23300-23399")
        try:
            engine = kvferry.Engine.attach(daemon.socket)
            pool = kvferry.SharedBuffer(1 << 20)
            engine.register([pool])
            events, session = engine.events(), engine.session_id
            daemon.kill()
            daemon.start()
            until = time.monotonic() + 20
            seen = []
            while "reattached" not in seen and time.monotonic() < until:
                event = events.get(1.0)
                seen += [event["event"]] if event else []
            self.assertIn("reattached", seen)
            self.assertEqual(engine.session_id, session)
            numpy.asarray(pool)[:8] = range(8)
            report = engine.transfer(session, "write", [pool.address], [pool.address + 4096], 8)
            self.assertTrue(report.done, report)
            self.assertEqual(bytes(pool.view()[4096:4104]), bytes(range(8)))
            engine.close()
        finally:
            daemon.stop()

    def test_control_c_ends_a_wait(self) -> None:
        daemon = Daemon("23400-23499")
        # Whoever runs this may ignore the signal, which children inherit.
        program = textwrap.dedent(
            """
            import signal, sys, kvferry
            signal.signal(signal.SIGINT, signal.default_int_handler)
            engine = kvferry.Engine.attach(sys.argv[1])
            print("ready", flush=True)
            engine.events().get()
            """
        )
        command = [sys.executable, "-c", program, daemon.socket]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            waiting.stdout.readline()
            waiting.send_signal(signal.SIGINT)
            _, said = waiting.communicate(timeout=20)
            self.assertIn(b"KeyboardInterrupt", said)
        finally:
            waiting.kill()
            daemon.stop()


if __name__ == "__main__":
    unittest.main()
