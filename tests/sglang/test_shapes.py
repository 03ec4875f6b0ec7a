"""What sglang moves, in its own shapes: layers, pages, heads and states, and both roles."""

from __future__ import annotations

import unittest

from cases import FleetCase
from fleet import ENGINES, WAY, free_port


class Attention(FleetCase):
    """Multi-head attention, as many ranks here as there."""

    def test_it_is_sglang_over_kvferry(self) -> None:
        for side in (self.fleet.prefill, self.fleet.decode):
            for fact in side.facts():
                self.assertIn(ENGINES[WAY], fact["engine"])
                self.assertEqual(fact["manager"], "sglang.srt.disaggregation.mooncake.conn")

    def test_a_byte_that_lands_elsewhere_is_seen(self) -> None:
        for side in (self.fleet.prefill, self.fleet.decode):
            self.assertEqual(side.call("spoil"), [[0, 1, 0]])

    def test_pages_that_changed_places_are_seen(self) -> None:
        for side in (self.fleet.prefill, self.fleet.decode):
            self.assertEqual(side.call("confuse"), [[True, False]])

    def test_contiguous_pages(self) -> None:
        self.move(pages=128)

    def test_scattered_pages(self) -> None:
        self.move(pages=128, is_scattered=True)

    def test_chunks_of_a_long_prefill(self) -> None:
        self.move(pages=128, is_scattered=True, chunks=8)

    def test_rooms_at_once(self) -> None:
        self.move(rooms=48, pages=5, is_scattered=True, chunks=2)
        self.expect_no_blacklist()

    def test_roles_are_switched_and_switched_back(self) -> None:
        fleet = self.fleet
        for _ in range(2):
            bootstrap = fleet.bootstrap = free_port()
            # Prefill first: whoever is prefill has the bootstrap server.
            fleet.decode.call("switch", role="prefill", bootstrap=bootstrap)
            fleet.prefill.call("switch", role="decode", bootstrap=bootstrap)
            fleet.prefill, fleet.decode = fleet.decode, fleet.prefill
            self.move(rooms=4, pages=16, is_scattered=True)


class Latent(FleetCase):
    """Multi-head latent attention: one buffer a layer, and every rank has all of it."""

    settings = {"kind": "mla", "layers": 6}

    def test_pages(self) -> None:
        self.move(pages=128)
        self.move(rooms=4, pages=32, is_scattered=True, chunks=3)


class SlidingWindow(FleetCase):
    """State by pages beside the KV."""

    settings = {"state": "swa"}

    def test_state_by_pages(self) -> None:
        self.move(rooms=6, pages=24, is_scattered=True, chunks=2)


class Recurrent(FleetCase):
    """State of one item a request beside the KV."""

    settings = {"state": "mamba"}

    def test_state_by_request(self) -> None:
        self.move(rooms=6, pages=24, is_scattered=True, chunks=2)


class TwoRanksToOne(FleetCase):
    """Each prefill rank sends its heads: a slice a token."""

    settings = {"prefill_tp": 2}

    def test_heads_come_together(self) -> None:
        self.move(rooms=4, pages=16, is_scattered=True, chunks=2)


class OneRankToTwo(FleetCase):
    """The prefill rank sends each decode rank its heads."""

    settings = {"decode_tp": 2}

    def test_heads_go_apart(self) -> None:
        self.move(rooms=4, pages=16, is_scattered=True, chunks=2)


if __name__ == "__main__":
    unittest.main()
