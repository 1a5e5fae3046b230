#!/usr/bin/env python3
"""The policy on real processes: which profile requests get, and why, follows the budget, the measured link and the room
at decode; the audit scores served requests again and shows what it found.
"""

import math
import re
import unittest

import texts
from cluster import REQUEST_S, wait_until
from drills import SLOW, DrillTest

ADAPTIVE = ["--adaptive-profiles", "true"]
FIELDS = {"max_tokens": 8, "ignore_eos": True}
N_MEASURED = 4  # transfers make an estimate, and one to spare


class PolicyTest(DrillTest):
    def complete(self, **fields):
        return self.cluster.complete(texts.LONG, **{**FIELDS, **fields})["zeroc"]

    def measure(self):
        """Requests whose profiles are stated, so that links and workers are known in every size."""
        self.assertEqual(self.complete()["reason"], "budget", "nothing is measured yet")
        for i in range(N_MEASURED):
            told = self.complete(profile="q4" if i % 2 else "bf16")
            self.assertEqual(told["reason"], "requested")

    def decisions(self, reason):
        samples = self.router.metrics()
        return sum(v for name, have, v in samples
                   if name == "zeroc_policy_decisions_total" and have.get("reason") == reason)

    def test_a_fast_link_needs_no_compression(self):
        self.start(router_args=ADAPTIVE)
        self.measure()
        # A neighbour's load can make decode or the wire look slow for once.
        wait_until(lambda: self.complete()["reason"] == "link_fast", REQUEST_S, "bf16 is as fast as anything")
        self.assertGreater(self.decisions("link_fast"), 0)

    def test_a_slow_link_needs_as_much_as_the_budget_allows(self):
        self.start_slow(router_args=ADAPTIVE)
        self.faults.set(SLOW)
        self.measure()
        usual, tight, wide = (self.complete(**budget) for budget in (
            {}, {"max_ppl_increase": 0.0}, {"max_ppl_increase": 1000.0}))
        self.assertEqual((usual["reason"], wide["reason"]), ("wire", "wire"))
        self.assertLessEqual(usual["ppl_increase"], 0.1)
        self.assertGreater(wide["ppl_increase"], 0.1)
        self.assertEqual((tight["profile"], tight["reason"]), ("bf16", "budget"), "nothing else is allowed")
        sent = [told["kv_bytes"]["wire"] for told in (wide, usual, tight)]
        self.assertEqual(sent, sorted(set(sent)), "a wider budget sends less")
        decided = re.findall(r"policy request=.* reason=wire .* wire_s=(\S+)", self.router.log())
        self.assertTrue(decided, "every decision is told with its prediction")
        self.assertEqual(self.decisions("wire"), 2)

    def test_a_small_pool_needs_compression(self):
        # 2,000 tokens are 4 MB of bf16, and two more for the answer: they never fit.
        self.start(router_args=ADAPTIVE, decode_args=["--kv-memory-mib", 5])
        for _ in range(N_MEASURED):
            self.complete(profile="q4")
        told = self.cluster.complete(texts.LONG, max_tokens=1000, stop=[" "])["zeroc"]
        self.assertEqual(told["reason"], "kv_pressure")
        self.assertNotEqual(told["profile"], "bf16")

    def test_the_audit_scores_served_requests_again(self):
        self.start(router_args=["--audit-share", 1])
        answers = [self.cluster.complete(texts.prose(4000, start=500 * i), max_tokens=40, ignore_eos=True)
                   for i in range(3)]

        def audits():
            return re.findall(r"audit profile=(\S+) n_tokens=(\d+) kl=(\S+) .*ppl_increase=(\S+)", self.router.log())
        wait_until(lambda: len(audits()) == len(answers), REQUEST_S, "every request is scored again")
        for profile, n_tokens, kl, increase in audits():
            self.assertEqual(profile, answers[0]["zeroc"]["profile"])
            self.assertEqual(int(n_tokens), 40)
            self.assertTrue(0 < float(kl) < 1 and math.isfinite(float(increase)), (kl, increase))
        self.assertAlmostEqual(self.router.metric("zeroc_ppl_increase", kind="audited"), float(audits()[-1][3]), 4)
        self.assertEqual(self.router.metric("vllm:request_success_total"), len(answers), "audits are no client's")
        self.assert_settled()


if __name__ == "__main__":
    unittest.main()
