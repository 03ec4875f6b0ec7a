"""What every test of a fleet looks at."""

from __future__ import annotations

import unittest

from fleet import Fleet


class FleetCase(unittest.TestCase):
    """One fleet for all tests of a class: importing sglang takes longer than what most of them do."""

    settings: dict = {}

    @classmethod
    def setUpClass(cls) -> None:
        cls.fleet = Fleet(**cls.settings)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.fleet.stop()

    def run(self, result=None):
        before = len(result.failures) + len(result.errors)
        super().run(result)
        if len(result.failures) + len(result.errors) > before:
            for rank in self.fleet.prefill.ranks + self.fleet.decode.ranks:
                print(f"--- {rank.log.name}:\n{rank.tail()}", flush=True)

    def move(self, **rooms) -> list[dict]:
        """Opens rooms and sees every one of them through."""
        return self.see_through(self.fleet.open(**rooms))

    def see_through(self, opened: list[tuple], seconds: float = 60.0) -> list[dict]:
        """Every room succeeds on every rank of both sides, with every byte, and no byte lands elsewhere."""
        sent, received = self.fleet.ends(opened, seconds)
        for end in sent + received:
            self.assertEqual(end["status"], "Success", end)
        self.assertEqual(sum(end["wrong"] for end in received), 0, received)
        self.expect_nothing_elsewhere()
        total, slowest = sum(end["bytes"] for end in received), max(end["seconds"] for end in received)
        print(f"{self.id()}: {len(opened)} rooms, {total / 1e6:.1f} MB, slowest {slowest} s", flush=True)
        return received

    def expect_nothing_elsewhere(self) -> None:
        for fact in self.fleet.decode.facts():
            self.assertEqual(fact["strangers"], 0, "bytes landed in pages of nobody")

    def expect_no_blacklist(self) -> None:
        for fact in self.fleet.prefill.facts():
            self.assertEqual((fact["blacklisted"], fact["failures"]), ([], 0))
