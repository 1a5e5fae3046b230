#!/usr/bin/env python3
"""Drills on the decode worker and the router: killed and stopped while reserved, receiving and decoding, restarted."""

import signal
import unittest

from cluster import SETTLE_S, TIME_SCALE, wait_until
from drills import LOST, DrillTest

FIELDS = {"max_tokens": 60, "profile": "bf16"}
LONG_RUN = {"max_tokens": 1500, "profile": "bf16"}


class DecodeDrills(DrillTest):
    def replace_decode(self, expected):
        self.decode = self.cluster.start_decode()
        self.remember(self.decode)
        self.decode.wait_ready()
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()

    def test_killed_while_reserved(self):
        self.start()
        expected = self.reference(**FIELDS)
        self.prefill.signal(signal.SIGSTOP)
        answer = self.ask(**FIELDS)
        self.wait_leased()
        self.decode.kill()
        self.prefill.signal(signal.SIGCONT)
        self.assert_ends(answer, 10, expected)
        self.assert_settled(self.prefill)
        self.replace_decode(expected)

    def test_killed_while_receiving(self):
        self.start_slow()
        expected = self.reference(**FIELDS)
        answer = self.ask_in_transfer(**FIELDS)
        self.decode.kill()
        self.assert_ends(answer, 10, expected)
        self.faults.set("none")
        self.assert_settled(self.prefill)
        self.replace_decode(expected)

    def test_killed_while_decoding(self):
        self.start()
        expected = self.reference(**FIELDS)
        answer = self.ask(**LONG_RUN)
        answer.wait_tokens(8)
        self.decode.kill()
        self.assert_ends(answer, 10)
        self.assertEqual(answer.tokens[:len(expected)], expected[:len(answer.tokens)])
        self.assert_settled(self.prefill)
        self.replace_decode(expected)

    def test_stopped_while_receiving(self):
        self.start_slow()
        expected = self.reference(**FIELDS)
        answer = self.ask_in_transfer(**FIELDS)
        self.decode.signal(signal.SIGSTOP)
        self.assert_ends(answer, 15, expected)
        self.assert_settled(self.prefill, within_s=15 * TIME_SCALE)
        self.faults.set("none")
        self.decode.signal(signal.SIGCONT)
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()

    def test_stopped_while_decoding(self):
        self.start()
        expected = self.reference(**FIELDS)
        answer = self.ask(**LONG_RUN)
        answer.wait_tokens(8)
        self.decode.signal(signal.SIGSTOP)
        self.assert_ends(answer, 15)
        self.assert_settled(self.prefill)
        self.decode.signal(signal.SIGCONT)
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()

    def test_restarted_at_the_same_address(self):
        """The old connection of the prefill worker must not be taken for one to the new process."""
        self.start()
        expected = self.reference(**FIELDS)
        ports = self.decode.grpc_port, self.decode.http_port
        self.decode.kill()
        self.decode = self.cluster.start_decode(ports=ports)
        self.remember(self.decode)
        self.decode.wait_ready()
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()


class RouterDrills(DrillTest):
    def test_router_killed_and_restarted(self):
        self.start()
        expected = self.reference(**FIELDS)
        answers = [self.ask(**LONG_RUN) for _ in range(2)]
        for answer in answers:
            answer.wait_tokens(4)
        self.router.kill()
        for answer in answers:
            answer.join(SETTLE_S)
            self.assertFalse(answer.is_alive())
            self.assertFalse(answer.done, "a stream that was cut off looks whole")
        for worker in (self.decode, self.prefill):
            wait_until(lambda w=worker: w.used_blocks() == self.baseline[w], SETTLE_S, "blocks are back")
        self.router = self.cluster.restart_router()
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()

    def test_router_told_to_end_drains(self):
        self.start(router_args=["--drain-timeout-ms", 500])
        short, long = self.ask(max_tokens=4), self.ask(max_tokens=1900, profile="bf16")
        long.wait_tokens(4)
        short.join(SETTLE_S)
        self.router.signal(signal.SIGTERM)
        refused = self.ask(max_tokens=4)
        refused.join(SETTLE_S)
        self.assertFalse(refused.done)
        self.assertTrue(refused.broken is not None or refused.status in LOST, refused.status)
        long.join(SETTLE_S)
        self.assertNotEqual(long.done, long.failed(), "whole within the drain, or told why not")
        self.assertEqual(self.router.wait_exit(), 0)
        for worker in (self.decode, self.prefill):
            wait_until(lambda w=worker: w.used_blocks() == self.baseline[w], SETTLE_S, "blocks are back")


if __name__ == "__main__":
    unittest.main()
