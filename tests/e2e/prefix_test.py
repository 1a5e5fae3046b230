#!/usr/bin/env python3
"""Prompts that begin alike: the second computes and sends only what is its own, and answers as a cold system does."""

import signal
import time
import unittest

import texts
from cluster import SETTLE_S, TIME_SCALE, Cluster, ClusterTest, wait_until
from drills import HEARTBEAT_MS, HEARTBEATS

CHUNK_TOKENS = 128
DOCUMENT = texts.LONG
QUESTIONS = [f"\n\nQuestion {i}: what does section {i} allow, and to whom?\nAnswer:" for i in range(3)]


def cached(body):
    return body["usage"]["prompt_tokens_details"]["cached_tokens"]


class PrefixTest(ClusterTest):
    def wire_bytes(self, cluster):
        return cluster.prefill[0].metric("zeroc_kv_bytes_total", stage="wire")

    def ask(self, cluster, prompt, profile):
        """The answer, and the KV bytes that it sent."""
        before = sum(v for n, have, v in cluster.prefill[0].metrics()
                     if n == "zeroc_kv_bytes_total" and have.get("stage") == "wire")
        body = cluster.complete(prompt, max_tokens=24, ignore_eos=True, profile=profile)
        wait_until(lambda: cluster.decode[0].used_blocks() + cluster.prefill[0].used_blocks() == 0, SETTLE_S,
                   "all blocks of requests are back")
        return body, self.wire_bytes(cluster) - before

    def test_only_the_suffix_is_computed_and_sent(self):
        chunk = ["--chunk-tokens", str(CHUNK_TOKENS)]
        off = ["--prefix-cache", "false"]
        with Cluster(prefill_args=chunk) as warm, Cluster(prefill_args=[*chunk, *off], decode_args=off) as cold:
            warm.wait_ready()
            cold.wait_ready()
            for profile in ("bf16", "q4"):
                for i, question in enumerate(QUESTIONS):
                    with self.subTest(profile=profile, question=i):
                        prompt = DOCUMENT + question
                        want, all_bytes = self.ask(cold, prompt, profile)
                        got, sent_bytes = self.ask(warm, prompt, profile)
                        self.assertEqual(got["choices"][0]["text"], want["choices"][0]["text"])
                        self.assertEqual(cached(want), 0)
                        self.assertEqual(cached(got) % CHUNK_TOKENS, 0)
                        n_prompt = got["usage"]["prompt_tokens"]
                        if i == 0:
                            self.assertEqual(cached(got), 0)
                            self.assertEqual(sent_bytes, all_bytes)
                        else:
                            self.assertLess(sent_bytes, 0.5 * all_bytes, "the document travels once")
                        if i == 2:  # the second prompt has shown where they part
                            self.assertGreater(cached(got), n_prompt - 3 * CHUNK_TOKENS)
            for worker in (warm.prefill[0], warm.decode[0]):
                queries = worker.metric("vllm:prefix_cache_queries_total")
                hits = worker.metric("vllm:prefix_cache_hits_total")
                self.assertTrue(0 < hits < queries, f"{worker.program}: {hits} of {queries}")
                self.assertGreater(worker.metric("zeroc_prefix_cache_bytes"), 0)
                self.assertEqual(worker.used_blocks(), 0)
                self.assertEqual(worker.end(), 0)

    def ask_at_home(self, cluster, prompt, home=None, measured=False):
        """measured: the router goes by the workers' measured speeds. Computing the document again costs more than they
        differ by chance; sending it again, on one host, does not."""
        time.sleep(5 * HEARTBEAT_MS / 1000 * TIME_SCALE)  # what workers have cached is with the router
        body = cluster.complete(prompt, max_tokens=4, ignore_eos=True, profile="q4")["zeroc"]
        if home is not None:
            self.assertEqual(body["prefill_worker"], home["prefill_worker"])
        if home is not None and not measured:
            self.assertEqual(body["decode_worker"], home["decode_worker"])
            self.assertLess(body["kv_bytes"]["wire"], 0.5 * home["kv_bytes"]["wire"], "the document travels once")
        return body

    def wait_workers(self, cluster, n):
        for role in ("prefill", "decode"):
            wait_until(lambda r=role: cluster.router.metric("zeroc_workers", role=r) == n, SETTLE_S, f"{n} {role}")

    @unittest.skipIf(TIME_SCALE >= 5, "instrumented programs are slower in other places: the fastest worker is another")
    def test_the_router_goes_where_the_beginning_is(self):
        first, second = texts.LONG, texts.prose(len(texts.LONG), start=20000)
        for adaptive in ("false", "true"):
            with (self.subTest(adaptive=adaptive),
                  Cluster(prefill_args=["--chunk-tokens", CHUNK_TOKENS],
                          router_args=[*HEARTBEATS, "--adaptive-profiles", adaptive]) as cluster):
                cluster.wait_ready()
                home = self.ask_at_home(cluster, first)
                self.ask_at_home(cluster, first + QUESTIONS[0])  # shows prefill where prompts leave the document
                # The first pair is away while the second one gets its document, and is the last to register then: of
                # equals the router takes the others.
                old = [*cluster.decode, *cluster.prefill]
                cluster.start_decode().wait_ready()
                cluster.start_prefill().wait_ready()
                for worker in old:
                    worker.signal(signal.SIGSTOP)
                self.wait_workers(cluster, 1)
                other = self.ask_at_home(cluster, second)
                self.assertNotEqual(other["prefill_worker"], home["prefill_worker"])
                self.assertNotEqual(other["decode_worker"], home["decode_worker"])
                self.ask_at_home(cluster, second + QUESTIONS[0])
                for worker in old:
                    worker.signal(signal.SIGCONT)
                self.wait_workers(cluster, 2)
                for question in QUESTIONS[1:]:
                    self.ask_at_home(cluster, first + question, home, adaptive == "true")
                    self.ask_at_home(cluster, second + question, other, adaptive == "true")
                self.assertGreater(cluster.router.metric("zeroc_policy_prefix_tokens_total", role="prefill"), 0)
                if adaptive == "true":
                    continue
                self.assertGreater(cluster.router.metric("zeroc_policy_prefix_tokens_total", role="decode"), 0)
                self.assertRegex(cluster.router.log(), r"prefill_cached_tokens=[1-9]\d* decode_cached_tokens=[1-9]")


if __name__ == "__main__":
    unittest.main()
