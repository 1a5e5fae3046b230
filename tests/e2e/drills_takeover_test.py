#!/usr/bin/env python3
"""Drills with another worker of each kind: whoever is lost, and whenever, the client's stream is whole and its tokens
are those of an uninterrupted run."""

import signal
import tempfile
import time
import unittest

import texts
from cluster import REQUEST_S, SETTLE_S, TIME_SCALE, wait_until
from drills import FAULTS_LIBRARY, TCP, DrillTest, WireFaults

FIELDS = {"max_tokens": 40, "profile": "bf16"}
LONG_RUN = {"max_tokens": 600, "profile": "bf16"}


class TakeoverDrills(DrillTest):
    def start_four(self):
        if not FAULTS_LIBRARY.is_file():
            self.skipTest("ZEROC_WIRE_FAULTS_LIBRARY is not there: ctest sets it")
        self.faults = WireFaults(self.enterContext(tempfile.TemporaryDirectory()))
        self.start(n_decode=2, n_prefill=2, decode_args=[*TCP, "--lease-expiry-ms", int(2000 * TIME_SCALE)],
                   prefill_args=TCP, prefill_env=self.faults.env)

    def busy(self, workers):
        """The worker that has the only request."""
        return wait_until(lambda: next((w for w in workers if w.used_blocks() > self.baseline[w]), None), SETTLE_S,
                          "a worker has the request")

    def ask_in_transfer(self):
        self.faults.set("delay 50000")
        answer = self.ask(**FIELDS)
        victims = self.busy(self.cluster.prefill), self.busy(self.cluster.decode)
        time.sleep(0.3 * TIME_SCALE)
        self.assertGreater(self.leased(victims[1]), 0, "the transfer is not over")
        return answer, *victims

    def assert_taken_over(self, answer, expected, within_s=20):
        self.assert_ends(answer, within_s, expected, whole=True)
        self.assertEqual(len(answer.tokens), len(expected))
        self.assert_settled()

    def test_prefill_lost_before_the_transfer(self):
        self.start_four()
        expected = self.reference(**FIELDS)
        self.cluster.prefill[0].signal(signal.SIGSTOP)
        answers = [self.ask(**FIELDS) for _ in range(2)]  # one on each
        wait_until(lambda: any(a.done for a in answers), REQUEST_S, "the one on the other worker is whole")
        self.cluster.prefill[0].kill()
        for answer in answers:
            self.assert_ends(answer, 20, expected, whole=True)
        self.assert_settled()

    def test_prefill_killed_in_the_transfer(self):
        self.start_four()
        expected = self.reference(**FIELDS)
        answer, prefill, _ = self.ask_in_transfer()
        prefill.kill()
        self.faults.set("none")
        self.assert_taken_over(answer, expected)

    def test_decode_killed_while_receiving(self):
        self.start_four()
        expected = self.reference(**FIELDS)
        answer, _, decode = self.ask_in_transfer()
        decode.kill()
        self.faults.set("none")
        self.assert_taken_over(answer, expected)

    def test_decode_killed_while_decoding(self):
        self.start_four()
        expected = self.reference(**LONG_RUN)
        answer = self.ask(**LONG_RUN)
        answer.wait_tokens(20)
        self.busy(self.cluster.decode).kill()
        self.assert_taken_over(answer, expected, 30)

    def test_decode_stopped_while_decoding(self):
        self.start_four()
        expected = self.reference(**LONG_RUN)
        answer = self.ask(**LONG_RUN)
        answer.wait_tokens(20)
        decode = self.busy(self.cluster.decode)
        decode.signal(signal.SIGSTOP)
        self.assert_ends(answer, 30, expected, whole=True)
        decode.signal(signal.SIGCONT)
        self.assert_settled()

    def test_a_corrupted_block_is_sent_again(self):
        self.start_four()
        expected = self.reference(**FIELDS)
        self.faults.set("corrupt 1")
        self.assert_taken_over(self.ask(**FIELDS), expected)
        self.assertEqual(sum(w.metric("zeroc_kv_checksum_failures_total") for w in self.cluster.decode), 1)

    def test_killed_again_and_again_under_load(self):
        """A prefill or decode worker dies every second and a new one comes: every stream ends, most of them whole."""
        self.start_four()
        prompts = [texts.prose(3000, start=500 * i) for i in range(4)]
        expected = [self.reference(p, **FIELDS) for p in prompts]
        answers = []
        for i in range(6):
            answers += [(self.ask(p, **FIELDS), e) for p, e in zip(prompts, expected)]
            time.sleep(0.3 * TIME_SCALE)
            pool, start = ((self.cluster.prefill, self.cluster.start_prefill) if i % 2 else
                           (self.cluster.decode, self.cluster.start_decode))
            live = [w for w in pool if w.popen.poll() is None]
            live[0].kill()
            self.remember(start())
        for answer, tokens in answers:
            self.assert_ends(answer, 40, tokens)
        self.assertGreater(sum(a.done for a, _ in answers), len(answers) * 0.8)
        self.assert_settled()


if __name__ == "__main__":
    unittest.main()
