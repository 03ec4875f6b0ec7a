#!/usr/bin/env python3
"""The late-write probe of this project, pointed at a transfer engine that users have today.

It must find late bytes there: the one thing that shows that the probe is not blind. Two processes on loopback; a
batch of 256 MiB with one bad slice is written; the moment the call has returned an error the source is overwritten;
the target then counts how much of that *later* content reached it. Exits with 1 when none did.

  late_writes.py [RUNS]     needs `mooncake-transfer-engine-non-cuda` and `numpy`
"""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import time

import numpy as np

MIB = 1 << 20
SLICE = MIB
PAYLOAD = 256 * MIB
BLANK, BEFORE, AFTER = 0x11, 0x22, 0x33
# What is still under way when the call returns lands within this, or not at all.
WATCH_S = 3.0


def engine_with_memory(fill):
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        sys.exit("the engine does not start")
    memory = np.frombuffer(mmap.mmap(-1, PAYLOAD), dtype=np.uint8)
    memory[:] = fill
    if engine.register_memory(memory.ctypes.data, PAYLOAD):
        sys.exit("the engine does not register memory")
    return engine, memory


def target():
    engine, memory = engine_with_memory(BLANK)
    print(f"READY 127.0.0.1:{engine.get_rpc_port()} {memory.ctypes.data}", flush=True)
    for line in sys.stdin:
        if line.strip() == "blank":
            memory[:] = BLANK
            print("OK", flush=True)
        elif line.strip() == "count":
            shades = [int(np.count_nonzero(memory == shade)) for shade in (BEFORE, AFTER)]
            print(*shades, flush=True)
    os._exit(0)


class Target:
    def __init__(self):
        command = [sys.executable, os.path.abspath(__file__), "--target"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        # The library may print on its own before we do.
        for line in self.process.stdout:
            words = line.split()
            if words[:1] == ["READY"]:
                self.session, self.address = words[1], int(words[2])
                return
        sys.exit("the target did not start")

    def ask(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().split()

    def end(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def one(number):
    """One run, with fresh processes: a batch that failed leaves the incumbent in a state of its own."""
    peer = Target()
    engine, memory = engine_with_memory(BEFORE)
    base = memory.ctypes.data
    if engine.batch_transfer_sync_write(peer.session, [base], [peer.address], [SLICE]):
        sys.exit("a good write fails: nothing to probe")
    peer.ask("blank")
    offsets = range(0, PAYLOAD, SLICE)
    here = [base + offset for offset in offsets]
    there = [peer.address + offset for offset in offsets]
    # Far beyond what is registered.
    there[number % len(there)] += 1 << 40
    begun = time.perf_counter()
    rc = engine.batch_transfer_sync_write(peer.session, here, there, [SLICE] * len(here))
    took = time.perf_counter() - begun
    if rc:
        ctypes.memset(base, AFTER, PAYLOAD)
    time.sleep(WATCH_S)
    before, after = map(int, peer.ask("count"))
    peer.end()
    print(f"run {number}: rc {rc} after {took * 1e3:.1f} ms, {before} bytes of before, {after} late", flush=True)
    # A batch with a bad slice that is said to be good is no late write; it shows nothing either way.
    os._exit(0 if rc and after else 3)


def main():
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    script = os.path.abspath(__file__)
    codes = [subprocess.run([sys.executable, script, "--one", str(n)], stderr=subprocess.DEVNULL).returncode for n in range(runs)]
    found = codes.count(0)
    print(f"late bytes in {found} of {runs} runs")
    sys.exit(0 if found else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--target"]:
        target()
    elif sys.argv[1:2] == ["--one"]:
        one(int(sys.argv[2]))
    else:
        main()
