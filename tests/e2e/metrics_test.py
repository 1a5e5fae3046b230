#!/usr/bin/env python3
"""The metrics that the design promises are there, and they tell what happened."""

import math
import re
import unittest

import texts
from cluster import SETTLE_S, Cluster, ClusterTest, wait_until

# Base names; a histogram shows as _bucket, _sum and _count.
PROMISED = """
zeroc_request_jct_seconds zeroc_jct_phase_seconds zeroc_kv_bytes_total zeroc_kv_compression_ratio
zeroc_kv_transfer_seconds zeroc_policy_decisions_total zeroc_ppl_increase zeroc_kv_blocks zeroc_kv_leases_expired_total
zeroc_kv_checksum_failures_total zeroc_retries_total
vllm:time_to_first_token_seconds vllm:inter_token_latency_seconds vllm:e2e_request_latency_seconds
vllm:request_queue_time_seconds vllm:request_prefill_time_seconds vllm:request_decode_time_seconds
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc vllm:prompt_tokens_total
vllm:generation_tokens_total vllm:request_success_total vllm:iteration_tokens_total vllm:num_preemptions_total
vllm:num_requests_swapped
""".split()
PHASES = ("queue", "reserve", "prefill", "wire", "admit", "decode")


class MetricsTest(ClusterTest):
    @classmethod
    def setUpClass(cls):
        cls.cluster = cls.enterClassContext(Cluster())
        cls.cluster.wait_ready()
        cls.bodies = [cls.cluster.complete(prompt, max_tokens=16, ignore_eos=True)
                      for prompt in (texts.SHORT, texts.LONG, texts.LONG)]
        # The books are closed just behind the last byte of an answer.
        wait_until(lambda: cls.cluster.router.metric("vllm:num_requests_running") == 0, SETTLE_S, "the router is idle")
        cls.samples = {p.program: p.metrics() for p in cls.cluster.processes}

    def total(self, program, name, **labels):
        values = [v for n, have, v in self.samples[program] if n == name and labels.items() <= have.items()]
        self.assertTrue(values, f"{program}: no {name}{labels}")
        return sum(values)

    def test_promised_names_are_there(self):
        have = {re.sub(r"_(bucket|sum|count)$", "", n) for samples in self.samples.values() for n, _, _ in samples}
        self.assertEqual([name for name in PROMISED if name not in have], [])

    def test_every_value_is_sane(self):
        for program, samples in self.samples.items():
            for name, labels, value in samples:
                self.assertFalse(math.isnan(value), f"{program} {name}{labels}")
                self.assertNotRegex(name, r"_(ms|us|milliseconds|kib|mib|percent)(_|$)", "base units only")
                if name.endswith(("_total", "_count", "_bucket")):
                    self.assertGreaterEqual(value, 0, f"{program} {name}{labels}")

    def test_tokens_and_requests_add_up(self):
        prompt = sum(body["usage"]["prompt_tokens"] for body in self.bodies)
        generated = sum(body["usage"]["completion_tokens"] for body in self.bodies)
        self.assertEqual(self.total("zeroc-router", "vllm:prompt_tokens_total"), prompt)
        self.assertEqual(self.total("zeroc-router", "vllm:generation_tokens_total"), generated)
        self.assertEqual(self.total("zeroc-router", "vllm:request_success_total"), len(self.bodies))
        self.assertEqual(self.total("zeroc-router", "zeroc_policy_decisions_total"), len(self.bodies))
        self.assertEqual(self.total("zeroc-router", "vllm:num_requests_running"), 0)

    def test_phases_add_up_to_the_completion_time(self):
        jct = self.total("zeroc-router", "zeroc_request_jct_seconds_sum")
        phases = sum(self.total("zeroc-router", "zeroc_jct_phase_seconds_sum", phase=p) for p in PHASES)
        self.assertGreater(jct, 0)
        self.assertAlmostEqual(phases, jct, delta=0.02 * jct + 0.001)
        ttft = self.total("zeroc-router", "vllm:time_to_first_token_seconds_sum")
        self.assertTrue(0 < ttft < jct, f"time to first token {ttft}, completion {jct}")

    def test_kv_bytes_are_fewer_on_the_wire(self):
        def stage(name):
            return sum(v for samples in self.samples.values() for n, labels, v in samples
                       if n == "zeroc_kv_bytes_total" and labels.get("stage") == name)

        raw, packed, wire = stage("raw"), stage("packed"), stage("wire")
        n_tokens = sum(body["usage"]["prompt_tokens"] for body in self.bodies)
        self.assertGreaterEqual(raw, n_tokens * 2048, "4 layers x 2 KV heads x 64 x 2 sides x 2 bytes, by token")
        self.assertGreater(packed, 0)
        self.assertLess(packed, raw)
        self.assertGreater(wire, 0)
        self.assertLess(wire, raw)

    def test_nothing_failed(self):
        for program in ("zeroc-decode", "zeroc-prefill"):
            for name in ("zeroc_kv_leases_expired_total", "zeroc_kv_checksum_failures_total"):
                if any(n == name for n, _, _ in self.samples[program]):
                    self.assertEqual(self.total(program, name), 0)


if __name__ == "__main__":
    unittest.main()
