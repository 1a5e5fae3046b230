#!/usr/bin/env python3
"""Clients and workers that go away: the other side ends in bounded time and every block comes back."""

import signal
import threading
import time
import unittest

import texts
from cluster import EXIT_S, SETTLE_S, Cluster, ClusterTest, wait_until

ENDLESS = {"max_tokens": 4000, "ignore_eos": True}  # seconds of decoding: long enough to interfere with


class FaultsTest(ClusterTest):
    def setUp(self):
        self.cluster = self.enterContext(Cluster())
        self.cluster.wait_ready()
        self.workers = [*self.cluster.decode, *self.cluster.prefill]
        self.baseline = {w: w.used_blocks() for w in self.workers}

    def start_stream(self, n_events=4):
        """A running stream that has shown n_events events."""
        stream = self.cluster.stream(texts.LONG, **ENDLESS)
        self.assertEqual(stream.status, 200)
        events = stream.events()
        for _ in range(n_events):
            self.assertIn("choices", next(events))
        return stream, events

    def assert_blocks_back(self, *workers):
        for worker in workers:
            wait_until(lambda w=worker: w.used_blocks() == self.baseline[w], SETTLE_S,
                       f"{worker.program} has its {self.baseline[worker]:.0f} used blocks of before")

    def test_client_goes_away(self):
        stream, _ = self.start_stream()
        self.assertGreater(self.cluster.decode[0].used_blocks(), self.baseline[self.cluster.decode[0]])
        stream.close()
        self.assert_blocks_back(*self.workers)
        self.cluster.complete(texts.SHORT, max_tokens=4)

    def test_decode_dies_in_mid_stream(self):
        _, events = self.start_stream()
        self.cluster.decode[0].kill()
        started = time.monotonic()
        rest = list(events)
        self.assertLess(time.monotonic() - started, SETTLE_S, "the client waited too long for the end")
        self.assertTrue(rest and "error" in rest[-1], f"no error event at the end: {rest[-1:]}")
        self.assertTrue(rest[-1]["error"]["message"])
        self.assert_blocks_back(self.cluster.prefill[0])
        wait_until(lambda: self.cluster.router.status("/readyz") == 503, SETTLE_S,
                   "the router says that it has no decode worker")
        refused = self.cluster.complete(texts.SHORT, expect_status=503, max_tokens=4)
        self.assertIn("decode", refused["error"]["message"])
        # A new worker heals the cluster.
        self.cluster.start_decode().wait_ready()
        self.cluster.router.wait_ready()
        self.cluster.complete(texts.SHORT, max_tokens=4)

    def test_prefill_dies_after_its_part(self):
        stream = self.cluster.stream(texts.LONG, max_tokens=200, ignore_eos=True,
                                     stream_options={"include_usage": True})
        events = stream.events()
        for _ in range(4):
            next(events)
        self.cluster.prefill[0].kill()
        rest = list(events)
        self.assertTrue(stream.done, f"the stream ended early: {rest[-1:]}")
        self.assertEqual(rest[-1]["usage"]["completion_tokens"], 200)
        self.assert_blocks_back(self.cluster.decode[0])

    def test_prefill_dies_during_the_prompt(self):
        prefill, decode = self.cluster.prefill[0], self.cluster.decode[0]
        result = {}

        def request():
            stream = self.cluster.stream(texts.LONG, max_tokens=8, ignore_eos=True)
            result.update(status=stream.status, events=list(stream.events()), done=stream.done)

        prefill.signal(signal.SIGSTOP)  # so that the request is surely there when it dies
        thread = threading.Thread(target=request)
        thread.start()
        try:
            wait_until(lambda: decode.used_blocks() > self.baseline[decode], SETTLE_S, "decode holds the leased blocks")
        finally:
            prefill.kill()
        thread.join(SETTLE_S * 2)
        self.assertFalse(thread.is_alive(), "the client still waits for a prefill worker that is dead")
        # Prefilled elsewhere (decode can do it), or a clear error; never a completion cut short with status 200.
        failed = result["status"] in (502, 503) or any("error" in event for event in result["events"])
        self.assertNotEqual(failed, result["done"], result)
        self.assert_blocks_back(decode)

    def test_sigterm_drains(self):
        stream = self.cluster.stream(texts.SHORT, max_tokens=100, ignore_eos=True,
                                     stream_options={"include_usage": True})
        events = stream.events()
        next(events)
        self.cluster.decode[0].signal(signal.SIGTERM)
        rest = list(events)
        self.assertTrue(stream.done, f"the running request was not let finish: {rest[-1:]}")
        self.assertEqual(rest[-1]["usage"]["completion_tokens"], 100)
        self.assertEqual(self.cluster.decode[0].wait_exit(EXIT_S), 0)
        for service in (self.cluster.prefill[0], self.cluster.router):
            service.signal(signal.SIGTERM)
            self.assertEqual(service.wait_exit(EXIT_S), 0, service.program)

    def test_sigterm_of_prefill_lets_its_kv_arrive(self):
        prefill, decode = self.cluster.prefill[0], self.cluster.decode[0]
        result = {}

        def request():
            stream = self.cluster.stream(texts.LONG, max_tokens=50, ignore_eos=True,
                                         stream_options={"include_usage": True})
            result.update(status=stream.status, events=list(stream.events()), done=stream.done)

        # One after the other, so that the prompt is surely computed while nobody takes its KV.
        prefill.signal(signal.SIGSTOP)
        thread = threading.Thread(target=request)
        thread.start()
        try:
            wait_until(lambda: decode.used_blocks() > self.baseline[decode], SETTLE_S, "decode holds the leased blocks")
            time.sleep(1)  # the lease goes to the router after its blocks are taken, and nothing shows its arrival
            decode.signal(signal.SIGSTOP)
            prefill.signal(signal.SIGCONT)
            wait_until(lambda: prefill.used_blocks() > self.baseline[prefill], SETTLE_S, "prefill computes the prompt")
            prefill.signal(signal.SIGTERM)
            time.sleep(1)
            self.assertIsNone(prefill.popen.poll(), "prefill left with KV that nobody else has")
        finally:
            prefill.signal(signal.SIGCONT)
            decode.signal(signal.SIGCONT)
            thread.join(SETTLE_S * 2)
        self.assertFalse(thread.is_alive())
        self.assertTrue(result["done"], result["events"][-1:])
        self.assertEqual(result["events"][-1]["usage"]["completion_tokens"], 50)
        self.assertEqual(prefill.wait_exit(EXIT_S), 0)


if __name__ == "__main__":
    unittest.main()
