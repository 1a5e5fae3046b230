#!/usr/bin/env python3
"""Drills on the prefill worker: killed, stopped and told to end, before, during and after the transfer."""

import signal
import unittest

import texts
from cluster import EXIT_S, SETTLE_S, TIME_SCALE, wait_until
from drills import DrillTest

FIELDS = {"max_tokens": 60, "profile": "bf16"}


class PrefillDrills(DrillTest):
    def start_slow(self):
        """Returns the tokens of a run without faults."""
        super().start_slow(decode_args=["--lease-expiry-ms", int(2000 * TIME_SCALE)])
        return self.reference(**FIELDS)

    def test_killed_before_the_transfer(self):
        self.start()
        expected = self.reference(**FIELDS)
        self.prefill.signal(signal.SIGSTOP)
        answer = self.ask(**FIELDS)
        self.wait_leased()
        self.prefill.kill()
        self.assert_ends(answer, 10, expected)
        self.assert_settled(self.decode)
        self.remember(self.cluster.start_prefill())
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()

    def test_killed_in_the_transfer(self):
        expected = self.start_slow()
        answer = self.ask_in_transfer(**FIELDS)
        self.prefill.kill()
        self.assert_ends(answer, 10, expected)
        self.assert_settled(self.decode)
        self.faults.set("none")
        self.remember(self.cluster.start_prefill())
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()

    def test_killed_after_the_transfer(self):
        self.start()
        fields = {**FIELDS, "max_tokens": 400}
        expected = self.reference(**fields)
        answer = self.ask(**fields)
        answer.wait_tokens(4)
        self.prefill.kill()
        self.assert_ends(answer, 30, expected, whole=True)
        self.assert_settled(self.decode)

    def test_stopped_before_the_transfer(self):
        self.start(decode_args=["--lease-expiry-ms", int(2000 * TIME_SCALE)])
        expected = self.reference(**FIELDS)
        self.prefill.signal(signal.SIGSTOP)
        answer = self.ask(**FIELDS)
        self.assert_ends(answer, 15, expected)
        self.assert_settled(self.decode)
        self.prefill.signal(signal.SIGCONT)
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()

    def test_stopped_in_the_transfer_and_woken_when_the_blocks_are_anothers(self):
        """Late writes: the lease is over and its blocks hold other prompts when the writer wakes up."""
        expected = self.start_slow()
        answer = self.ask_in_transfer(**FIELDS)
        self.prefill.signal(signal.SIGSTOP)
        self.assert_ends(answer, 15, expected)
        self.assert_settled(self.decode)
        self.remember(self.cluster.start_prefill())
        self.faults.set("none")
        self.router.wait_ready()
        others = [self.ask(texts.prose(9000, start=1000 * i), **FIELDS) for i in range(1, 4)]
        self.prefill.signal(signal.SIGCONT)
        for other in others:
            self.assert_ends(other, 30, whole=True)
        for i, other in enumerate(others, 1):
            self.assertEqual(other.tokens, self.reference(texts.prose(9000, start=1000 * i), **FIELDS))
        self.assertEqual(self.decode.metric("zeroc_kv_checksum_failures_total"), 0)
        self.assert_settled()

    def test_stopped_after_the_transfer(self):
        self.start(decode_args=["--lease-expiry-ms", int(2000 * TIME_SCALE)])
        fields = {**FIELDS, "max_tokens": 400}
        expected = self.reference(**fields)
        answer = self.ask(**fields)
        answer.wait_tokens(4)
        self.prefill.signal(signal.SIGSTOP)
        self.assert_ends(answer, 30, expected, whole=True)
        self.assert_settled(self.decode)
        self.prefill.signal(signal.SIGCONT)
        self.assert_serves(expected, **fields)
        self.assert_settled()

    def test_sigterm_with_unsent_blocks(self):
        expected = self.start_slow()
        answer = self.ask_in_transfer(**FIELDS)
        self.prefill.signal(signal.SIGTERM)
        wait_until(lambda: self.prefill.status("/readyz") != 200, SETTLE_S, "it says that it drains")
        self.faults.set("delay 5000")
        self.assert_ends(answer, 30, expected, whole=True)
        self.assertEqual(self.prefill.wait_exit(EXIT_S), 0)
        self.assert_settled(self.decode)


if __name__ == "__main__":
    unittest.main()
