"""The drop-in, as a program that was written for Mooncake's engine meets it."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path

import numpy
from daemons import Daemon, Program

from kvferry import compat

POOL = 4 << 20

# What sglang's wrapper does, and then a line of Python per line of input.
PROGRAM = textwrap.dedent(
    """
    import sys, numpy
    from mooncake.engine import TransferEngine
    engine = TransferEngine()
    code = engine.initialize("127.0.0.1", "P2PHANDSHAKE", "rdma", "")
    pool = numpy.zeros(int(sys.argv[1]), numpy.uint8)
    print(code, f"127.0.0.1:{engine.get_rpc_port()}", pool.ctypes.data, flush=True)
    print(engine.batch_register_memory([pool.ctypes.data], [pool.nbytes]), flush=True)
    for line in sys.stdin:
        try:
            print(eval(line), flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    """
)


def environment(daemon, **more):
    known = {**os.environ, "PYTHONPATH": compat.path(), "KVFERRY_SOCKET": str(daemon.socket), "MC_FORCE_TCP": "1"}
    return {**known, **more}


class Worker(Program):
    """A rank of somebody's program."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(PROGRAM, str(POOL), env=environment(daemon), stderr=subprocess.DEVNULL)
        code, self.session, address = self.line().split()
        self.address = int(address)
        self.codes = [int(code), int(self.line())]


class DropIn(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.here, cls.there = Daemon("23500-23599"), Daemon("23600-23699")
        cls.prefill, cls.decode = Worker(cls.here), Worker(cls.there)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.prefill.stop()
        cls.decode.stop()
        cls.here.stop()
        cls.there.stop()

    def setUp(self) -> None:
        self.decode.ask("pool.fill(0)")
        self.prefill.ask("pool.fill(7)")

    def move(self, call: str, offsets, length: int) -> str:
        local = [self.prefill.address + at for at in offsets]
        remote = [self.decode.address + at for at in offsets]
        return self.prefill.ask(f"engine.{call}({self.decode.session!r}, {local}, {remote}, {[length] * len(local)})")

    def test_it_attaches_and_registers(self) -> None:
        self.assertEqual(self.prefill.codes, [0, 0])
        self.assertEqual(self.decode.codes, [0, 0])

    def test_a_batch_of_writes_arrives(self) -> None:
        self.assertEqual(self.move("batch_transfer_sync_write", range(0, POOL, 8192), 4096), "0")
        self.assertEqual(self.decode.ask("int(pool.sum())"), str(7 * POOL // 2))

    def test_a_batch_of_reads_arrives(self) -> None:
        self.decode.ask("pool.fill(5)")
        self.assertEqual(self.move("batch_transfer_sync_read", [0, 4096], 4096), "0")
        self.assertEqual(self.prefill.ask("int(pool[:8192].sum())"), str(5 * 8192))

    def test_single_slices_and_arrays(self) -> None:
        session, local, remote = self.decode.session, self.prefill.address, self.decode.address
        self.assertEqual(self.prefill.ask(f"engine.transfer_sync_write({session!r}, {local}, {remote}, 16)"), "0")
        self.assertEqual(self.prefill.ask(f"engine.transfer_sync_read({session!r}, {local}, {remote}, 16)"), "0")
        columns = f"numpy.array([{local}]), numpy.array([{remote}]), numpy.array([32])"
        self.assertEqual(self.prefill.ask(f"engine.batch_transfer_sync_write({session!r}, {columns})"), "0")
        self.assertEqual(self.decode.ask("int(pool.sum())"), str(32 * 7))

    def test_a_batch_with_one_bad_slice_moves_nothing(self) -> None:
        self.assertEqual(self.move("batch_transfer_sync_write", [0, 4096, POOL - 10], 4096), "-1")
        self.assertEqual(self.decode.ask("int(pool.sum())"), "0")

    def test_probes(self) -> None:
        self.assertEqual(self.prefill.ask(f"engine.send_probe({self.decode.session!r})"), "0")
        self.assertEqual(self.prefill.ask("engine.send_probe('127.0.0.1:1')"), "-1")

    def test_codes_of_registration(self) -> None:
        self.prefill.ask("setattr(engine, 'other', numpy.zeros(8192, numpy.uint8))")
        address = "engine.other.ctypes.data"
        for expression, code in [
            (f"engine.register_memory({address}, 0)", "-1"),
            (f"engine.unregister_memory({address})", "-3"),
            (f"engine.register_memory({address}, 8192)", "0"),
            (f"engine.register_memory({address} + 10, 100)", "-7"),
            (f"engine.batch_unregister_memory([{address}])", "0"),
            (f"engine.unregister_memory({address})", "-3"),
            (f"engine.batch_register_memory([{address}], [8192])", "0"),
            (f"engine.unregister_memory({address})", "0"),
        ]:
            self.assertEqual(self.prefill.ask(expression), code, expression)

    def test_misuse_raises(self) -> None:
        before = self.prefill.ask("TransferEngine().get_rpc_port()")
        self.assertIn("not initialized", before)
        self.assertIn("Mooncake", self.prefill.ask("engine.get_engine()"))
        again = self.prefill.ask("engine.initialize('127.0.0.1', 'P2PHANDSHAKE', 'tcp', '')")
        self.assertEqual(again, "-1")
        self.assertEqual(self.prefill.ask("hasattr(engine, 'transfer_submit_write')"), "False")

    def test_a_stopped_peer_is_an_error_in_time_and_no_late_byte(self) -> None:
        self.there.process.send_signal(signal.SIGSTOP)
        try:
            begun = time.monotonic()
            code = self.move("batch_transfer_sync_write", range(0, POOL, 8192), 4096)
            self.assertLess(time.monotonic() - begun, 29.0)
            self.assertEqual(code, "-1")
            # The source is another request's from now on.
            self.prefill.ask("pool.fill(99)")
        finally:
            self.there.process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        self.assertEqual(self.decode.ask("int((pool == 99).sum())"), "0")
        until = time.monotonic() + 20
        while self.prefill.ask(f"engine.send_probe({self.decode.session!r})") != "0" and time.monotonic() < until:
            time.sleep(0.1)
        self.assertEqual(self.move("batch_transfer_sync_write", [0], 4096), "0")


class Beginnings(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.daemon = Daemon("23700-23799")

    @classmethod
    def tearDownClass(cls) -> None:
        cls.daemon.stop()

    def say(self, code: str, **more) -> str:
        program = "import logging; logging.basicConfig(); from mooncake.engine import TransferEngine as T;" + code
        run = [sys.executable, "-c", program]
        known = environment(self.daemon, **more)
        return subprocess.run(run, env=known, capture_output=True, text=True, timeout=60, check=False).stderr

    def test_rdma_is_never_tcp_silently(self) -> None:
        said = self.say("assert T().initialize('127.0.0.1', 'P2PHANDSHAKE', 'rdma', '') == -1", MC_FORCE_TCP="0")
        self.assertIn("MC_FORCE_TCP=1", said)
        self.assertNotIn("AssertionError", said)

    def test_a_device_that_is_not_there_stops_rdma_alone(self) -> None:
        code = "assert T().initialize('127.0.0.1', 'P2PHANDSHAKE', 'rdma', 'nowhere_0,nowhere_1') == "
        said = self.say(code + "-1", MC_FORCE_TCP="0")
        self.assertIn("Invalid IB devices", said)
        self.assertIn("MC_FORCE_TCP=1", said)
        self.assertNotIn("AssertionError", said)
        self.assertEqual(self.say(code + "0"), "")

    def test_a_host_where_nobody_listens_is_named(self) -> None:
        said = self.say("assert T().initialize('127.0.0.9', 'P2PHANDSHAKE', 'tcp', '') == -1")
        self.assertIn("SGLANG_HOST_IP", said)
        self.assertNotIn("AssertionError", said)

    def test_a_port_in_the_hostname_is_the_engines(self) -> None:
        said = self.say("e = T(); assert e.initialize('127.0.0.1:23777', 'any', 'tcp', '') == 0;"
                        "assert e.get_rpc_port() == 23777")
        self.assertNotIn("Error", said)

    def test_no_daemon_is_said(self) -> None:
        said = self.say("assert T().initialize('127.0.0.1', '', 'tcp', '') == -1", KVFERRY_SOCKET="/nowhere")
        self.assertIn("/nowhere", said)
        self.assertNotIn("AssertionError", said)

    def test_the_rest_of_an_installed_mooncake_still_resolves(self) -> None:
        with tempfile.TemporaryDirectory() as installed:
            package = Path(installed, "mooncake")
            package.mkdir()
            (package / "__init__.py").touch()
            (package / "store.py").write_text("from mooncake.engine import TransferEngine; kind = TransferEngine")
            (package / "engine.py").write_text("raise ImportError('the wrong one')")
            path = os.pathsep.join([compat.path(), installed])
            said = self.say("import mooncake.store; assert 'kvferry' in mooncake.store.kind.__module__", PYTHONPATH=path)
        self.assertEqual(said, "")

    def test_the_wheel_installs_no_mooncake(self) -> None:
        self.assertIsNone(importlib.util.find_spec("mooncake"))
        run = [sys.executable, "-m", "kvferry.compat", "--path"]
        said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
        self.assertTrue(Path(said, "mooncake", "engine.py").exists())


if __name__ == "__main__":
    unittest.main()
