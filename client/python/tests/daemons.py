"""Daemons on loopback, and engines in processes of their own, for the tests of this folder."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Daemon:
    """A kvferryd in a directory of its own. The binary is named by KVFERRYD_BIN."""

    def __init__(self, ports: str) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="kvferry-python-")
        self.socket = Path(self.place.name, "engine.sock")
        self.ports = ports
        self.process = None
        self.start()

    def start(self) -> None:
        place = self.place.name
        command = [os.environ["KVFERRYD_BIN"], "--socket", self.socket, "--state-dir", place, "--admin", ""]
        command += ["--advertise-host", "127.0.0.1", "--bind-host", "127.0.0.1", "--endpoint-ports", self.ports]
        with open(Path(place, "log"), "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 20
        while not self.socket.exists() and time.monotonic() < until:
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.start()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.place.cleanup()


class Program:
    """A Python program, its text or its file, that answers a line per line."""

    def __init__(self, program: str | Path, *arguments: str, **more) -> None:
        command = [sys.executable, *(["-c"] if isinstance(program, str) else []), program, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more
        )

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def ask(self, expression: str) -> str:
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self.line()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
