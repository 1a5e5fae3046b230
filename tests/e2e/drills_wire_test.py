#!/usr/bin/env python3
"""Drills on what lies between: bytes corrupted, connections cut, links slow, workers of another plan or at an address
that nobody reaches."""

import shutil
import socket
import tempfile
import time
import unittest

from cluster import MODEL_DIR, SETTLE_S, free_port, wait_until
from drills import DrillTest

FIELDS = {"max_tokens": 30, "profile": "bf16"}


class WireDrills(DrillTest):
    def setUp(self):
        self.start_slow()
        self.expected = self.reference(**FIELDS)

    def test_a_corrupted_block_is_never_decoded(self):
        for profile in ("bf16", "q4"):
            with self.subTest(profile=profile):
                fields = {**FIELDS, "profile": profile}
                expected = self.reference(**fields)
                before = self.decode.metric("zeroc_kv_checksum_failures_total")
                self.faults.set(f"corrupt 1 {profile}")
                answer = self.ask(**fields)
                self.assert_ends(answer, 20, statuses={502})
                self.assertEqual(self.decode.metric("zeroc_kv_checksum_failures_total"), before + 1)
                self.assert_settled()
                n = self.retried_behind()[-1] if answer.done else len(answer.tokens)
                self.assert_right(answer, n, expected, profile)
                self.assert_serves(expected, **fields)

    def test_a_connection_cut_in_the_transfer(self):
        self.faults.set("cut 1")
        self.assert_ends(self.ask(**FIELDS), 20, self.expected)
        self.faults.set("none")
        self.assert_settled()
        self.assert_serves(self.expected, **FIELDS)
        self.assert_settled()

    def test_every_connection_cut_until_the_network_heals(self):
        self.faults.set("cut 1000000")
        for _ in range(3):
            self.assert_ends(self.ask(**FIELDS), 20, self.expected)
            self.assert_settled()
        self.faults.set("none")
        self.assert_serves(self.expected, **FIELDS)
        self.assert_settled()

    def test_the_transfer_cannot_reach_decode(self):
        """RPCs arrive, the second port does not: first nobody listens there, then somebody who says nothing."""
        ports = free_port(), self.enterContext(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        for port in ports:
            self.prefill.kill()
            self.faults.set(f"redirect {self.router.grpc_port} {port}")
            self.prefill = self.cluster.start_prefill()
            self.remember(self.prefill)
            self.assert_ends(self.ask(**FIELDS), 45, self.expected)  # three attempts of 10 s at most
            self.assert_settled()
            self.faults.set("none")
            self.assert_recovers()
            self.assert_settled()

    def assert_recovers(self):
        """Soon, but not always at once: an end-point of UCX that was given up while it connected may come to life when
        the network does, and takes a new connection to the same peer with it when it is closed."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            answer = self.ask(**FIELDS)
            self.assert_ends(answer, 45, self.expected)  # as above
            if answer.done:
                return
        self.fail("no request was served after the network had healed")

    def test_a_slow_link_only_takes_longer(self):
        self.faults.set("delay 10000")
        answer = self.ask(**FIELDS)
        self.assert_ends(answer, 30, self.expected, whole=True)
        self.faults.set("none")
        self.assert_settled()


class StrangerDrills(DrillTest):
    """Workers that do not fit in are kept out, say why, and disturb nobody."""

    def start_with(self):
        self.start()
        self.expected = self.reference(**FIELDS)

    def assert_kept_out(self, worker, because):
        wait_until(lambda: because in worker.log() or because in self.router.log(), SETTLE_S, f"'{because}' is told")
        for _ in range(3):
            self.assert_serves(self.expected, **FIELDS)
        self.assertEqual(self.router.metric("zeroc_workers", role="prefill"), 1)

    def test_a_worker_with_another_plan(self):
        self.start_with()
        folder = self.enterContext(tempfile.TemporaryDirectory())
        for path in MODEL_DIR.iterdir():
            if path.name != "zeroc.plan":
                shutil.copy(path, folder)
        self.assert_kept_out(self.cluster.start_prefill("--model", folder), "plan")

    def test_a_worker_that_cannot_be_reached(self):
        self.start_with()
        # Reserved for documentation: packets go nowhere, or are refused at once.
        self.assert_kept_out(self.cluster.start_prefill("--advertise", "192.0.2.1"), "192.0.2.1")


if __name__ == "__main__":
    unittest.main()
