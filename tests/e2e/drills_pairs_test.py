#!/usr/bin/env python3
"""Drills with two workers of each kind: one is stopped, killed or told to end at every phase of a request, the other
one takes over, and the client's stream is whole: no gap, nothing twice, no wrong token.
"""

import re
import signal
import time
import unittest

from cluster import EXIT_S, SETTLE_S, TIME_SCALE, wait_until
from drills import SLOW, TCP, DrillTest

FIELDS = {"max_tokens": 60, "profile": "bf16"}
LONG_RUN = {"max_tokens": 300, "profile": "bf16"}
# A dead process is noticed at once, one that stands still after the heartbeats' expiry (3 s); then the prompt is
# computed and sent again.
ENDS_S = 20


class PairDrills(DrillTest):
    def start_pairs(self, decode_args=()):
        """Two decode workers, and two prefill workers with a link of their own each, which can be slow."""
        links = [self.wire_faults() for _ in range(2)]
        self.start(n_decode=2, prefill_args=TCP, prefill_env=links[0].env,
                   decode_args=[*TCP, "--lease-expiry-ms", int(2000 * TIME_SCALE), *decode_args])
        self.remember(self.cluster.start_prefill(env=links[1].env))
        self.links = dict(zip(self.cluster.prefill, links))
        self.wait_all()
        self.expected = self.reference(**LONG_RUN)

    def wait_all(self):
        wait_until(lambda: self.router.metric("zeroc_workers") == 4, SETTLE_S, "the router knows all four workers")

    def decisions(self):
        return re.findall(r"policy request=.* prefill_worker=([^\s\"]+) decode_worker=([^\s\"]+)", self.router.log())

    def ask_and_see(self, **fields):
        """A request under way, and the prefill and the decode worker that the router has chosen for it."""
        n = len(self.decisions())
        answer = self.ask(**fields)
        wait_until(lambda: len(self.decisions()) > n, SETTLE_S, "the router has chosen workers")
        ports = [int(name.rsplit("-", 1)[1]) for name in self.decisions()[n]]
        workers = [*self.cluster.prefill, *self.cluster.decode]
        return answer, *(next(w for w in workers if w.grpc_port == port) for port in ports)

    def before_the_transfer(self):
        for worker in self.cluster.prefill:
            worker.signal(signal.SIGSTOP)
        asked = self.ask_and_see(**FIELDS)
        self.wait_leased(asked[2])
        return asked

    def in_the_transfer(self):
        for link in self.links.values():
            link.set(SLOW)
        asked = self.ask_and_see(**FIELDS)
        time.sleep(0.5 * TIME_SCALE)
        self.assertGreater(self.leased(asked[2]), 0, "the transfer is not over")
        return asked

    def while_decoding(self):
        asked = self.ask_and_see(**LONG_RUN)
        asked[0].wait_tokens(8)
        return asked

    def others_go_on(self, lost):
        """What held the request up for the drill's sake ends, but not for the lost worker."""
        for link in self.links.values():
            link.set("none")
        for worker in self.cluster.prefill:
            if worker is not lost and worker.popen.poll() is None:
                worker.signal(signal.SIGCONT)

    def assert_taken_over(self, answer, retries_before):
        self.assert_ends(answer, ENDS_S, whole=True)
        retries = self.retried_behind()[len(retries_before):]
        self.assertTrue(retries, "nothing was tried again")
        self.assert_right(answer, retries[-1], self.expected, "bf16")

    def lose(self, phase, *roles):
        """For each role stops and wakes the worker that serves a request, then kills the one that serves another."""
        self.start_pairs()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for role in roles:
                with self.subTest(signal=number.name, role=role):
                    before = self.retried_behind()
                    answer, prefill, decode = phase()
                    lost = prefill if role == "prefill" else decode
                    lost.signal(number)
                    self.others_go_on(lost)
                    self.assert_taken_over(answer, before)
                    if number == signal.SIGSTOP:
                        lost.signal(signal.SIGCONT)
                        self.wait_all()
                    else:
                        lost.wait_exit()
                    self.assert_settled(within_s=15 * TIME_SCALE)

    def test_lost_before_the_transfer(self):
        self.lose(self.before_the_transfer, "prefill", "decode")

    def test_lost_in_the_transfer(self):
        self.lose(self.in_the_transfer, "prefill", "decode")

    def test_lost_while_decoding(self):
        self.lose(self.while_decoding, "decode")

    def test_decode_told_to_end(self):
        """It takes nothing new; what ends within the drain ends there, the rest goes on elsewhere."""
        self.start_pairs(["--drain-timeout-ms", int(300 * TIME_SCALE)])
        long, _, decode = self.ask_and_see(max_tokens=1900, profile="bf16")
        long.wait_tokens(8)
        started = time.monotonic()
        decode.signal(signal.SIGTERM)
        wait_until(lambda: decode.status("/readyz") != 200, SETTLE_S, "it says that it drains")
        during, _, other = self.ask_and_see(**FIELDS)
        self.assertIsNot(other, decode, "a draining worker is given nothing new")
        self.assertEqual(decode.wait_exit(EXIT_S), 0)
        self.assertLess(time.monotonic() - started, EXIT_S)
        self.assert_ends(during, ENDS_S, self.expected[:60], whole=True)
        self.assert_ends(long, 60, whole=True)
        n = self.retried_behind()[-1]
        self.assertGreater(n, 0)
        self.expected = self.reference(max_tokens=1900, profile="bf16")
        self.assert_right(long, n, self.expected, "bf16")
        self.assert_settled()


if __name__ == "__main__":
    unittest.main()
