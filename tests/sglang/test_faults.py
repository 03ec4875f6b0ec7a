"""What sglang's rooms see of faults: nothing where they pass, a prompt and final failure where they do not."""

from __future__ import annotations

import threading
import time
import unittest

from cases import FleetCase

PAGES = 64
# Bytes of KV of one room: K and V of four layers, four heads of 64 in two bytes, 16 tokens a page.
ROOM_BYTES = PAGES * 16 * 4 * 64 * 2 * 8
SLOW = 4e6  # bytes a second: a room takes one


class Cuts(FleetCase):
    """Whoever writes to decode goes through a proxy that resets connections."""

    settings = {"is_proxied": True, "pages": 1025}

    def tearDown(self) -> None:
        self.fleet.proxy.rate = None

    def test_first_attempts_fail(self) -> None:
        # Each lane dies in its first part, of 1 MiB: no progress in between, and the third of three attempts passes.
        self.fleet.proxy.cut(after=512 << 10, times=2)
        before = self.fleet.proxy.cuts
        self.move(rooms=8, pages=PAGES, is_scattered=True)
        self.assertEqual(self.fleet.proxy.cuts - before, 2)
        self.expect_no_blacklist()

    def test_one_lane_after_the_other_is_cut(self) -> None:
        # With progress in between, however often.
        self.fleet.proxy.cut(after=3 << 20, times=8)
        before = self.fleet.proxy.cuts
        self.move(rooms=14, pages=PAGES, is_scattered=True)
        self.assertEqual(self.fleet.proxy.cuts - before, 8)
        self.expect_no_blacklist()

    def test_paths_that_keep_failing(self) -> None:
        opened = self.fleet.open(rooms=14, pages=PAGES, is_scattered=True, chunks=4)
        done = threading.Event()
        self.fleet.proxy.rate = 4 * SLOW

        def cut() -> None:
            while not done.wait(0.5):
                self.fleet.proxy.cut_all()

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            self.see_through(opened)
        finally:
            done.set()
            thread.join()
        self.expect_no_blacklist()

    def test_an_abort_is_final_when_its_pages_are_released(self) -> None:
        self.fleet.proxy.rate = SLOW
        opened = self.fleet.open(rooms=4, pages=PAGES, is_scattered=True, chunks=4)
        time.sleep(0.5)
        self.fleet.decode.call("abort", rooms=[there["room"] for _, there in opened])
        sent, received = self.fleet.ends(opened)
        self.assertEqual({end["status"] for end in sent + received}, {"Failed"})
        for end in received:
            self.assertTrue(end["drained"], end)
        held = [end["held"] for end in received]
        print(f"{self.id()}: pages held {min(held)} to {max(held)} s", flush=True)
        time.sleep(1.0)
        self.expect_nothing_elsewhere()
        self.fleet.proxy.rate = None
        self.move(rooms=2, pages=PAGES)
        self.expect_no_blacklist()


class Deaths(FleetCase):
    """A side is killed while rooms are on their way to it, or from it."""

    settings = {"is_proxied": True, "pages": 513}

    def setUp(self) -> None:
        self.fleet.proxy.rate = SLOW
        self.opened = self.fleet.open(rooms=4, pages=PAGES, is_scattered=True)
        time.sleep(0.5)

    def test_decode_is_killed(self) -> None:
        fleet = self.fleet
        for rank in fleet.decode.ranks:
            rank.kill()
        killed = time.monotonic()
        rooms = [here["room"] for here, _ in self.opened]
        (ends,) = fleet.prefill.call("ends", rooms=rooms, seconds=10.0)
        told = time.monotonic() - killed
        self.assertEqual({end["status"] for end in ends}, {"Failed"}, ends)
        # Its daemon notices within a second, and tells. One transfer that begins after that may ask for 5 s whether
        # it is back; the rest are not tried.
        self.assertLess(told, 8.0)
        print(f"{self.id()}: {len(ends)} rooms failed within {told:.2f} s", flush=True)
        for here, _ in self.opened:
            fleet.prefill.give(here)
        fleet.decode = fleet.new_decode()
        fleet.decode.started()
        fleet.proxy.rate = None
        self.move(rooms=4, pages=PAGES, is_scattered=True)

    def test_prefill_is_killed(self) -> None:
        fleet = self.fleet
        for rank in fleet.prefill.ranks:
            rank.kill()
        killed = time.monotonic()
        rooms = [there["room"] for _, there in self.opened]
        (ends,) = fleet.decode.call("ends", rooms=rooms, seconds=30.0)
        self.assertEqual({end["status"] for end in ends}, {"Failed"}, ends)
        print(
            f"{self.id()}: {len(ends)} rooms failed and their pages released within"
            f" {time.monotonic() - killed:.2f} s",
            flush=True,
        )
        # The pages are others' now.
        time.sleep(1.0)
        self.expect_nothing_elsewhere()
        for _, there in self.opened:
            fleet.decode.give(there)
        fleet.prefill = fleet.new_prefill()
        fleet.prefill.started()
        fleet.proxy.rate = None
        self.move(rooms=4, pages=PAGES, is_scattered=True)


class Restarts(FleetCase):
    """Both daemons are restarted, one after the other, while rooms come and go."""

    settings = {"pages": 513}

    def test_a_rolling_restart_fails_no_room(self) -> None:
        fleet, done, ends = self.fleet, threading.Event(), []

        def load() -> None:
            while not done.is_set():
                sent, received = fleet.ends(fleet.open(rooms=6, pages=PAGES, is_scattered=True, chunks=2))
                ends.extend(sent + received)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for daemon in (fleet.here, fleet.there):
                time.sleep(2.0)
                daemon.restart()
                time.sleep(2.0)
        finally:
            done.set()
            thread.join()
        for end in ends:
            self.assertEqual((end["status"], end.get("wrong", 0)), ("Success", 0), end)
        slowest = max(end["seconds"] for end in ends)
        print(f"{self.id()}: {len(ends) // 2} rooms, slowest {slowest} s", flush=True)
        self.expect_nothing_elsewhere()
        self.expect_no_blacklist()


if __name__ == "__main__":
    unittest.main()
