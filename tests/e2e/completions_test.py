#!/usr/bin/env python3
"""Completions over HTTP through router, prefill and decode: streamed, whole, many at once."""

import threading
import unittest

import texts
from cluster import SETTLE_S, Cluster, ClusterTest, http_request, text_of, wait_until


class CompletionsTest(ClusterTest):
    @classmethod
    def setUpClass(cls):
        cls.cluster = cls.enterClassContext(Cluster())
        cls.cluster.wait_ready()

    def test_stream_and_whole_agree(self):
        for prompt in (texts.SHORT, texts.LONG):
            with self.subTest(prompt_chars=len(prompt)):
                stream = self.cluster.stream(prompt, max_tokens=24, ignore_eos=True,
                                             stream_options={"include_usage": True})
                self.assertEqual(stream.status, 200)
                events = list(stream.events())
                self.assertTrue(stream.done, "the stream did not end with [DONE]")
                text_events = [e for e in events if e.get("choices") and e["choices"][0]["text"]]
                self.assertGreater(len(text_events), 4, "the text did not come piece by piece")
                usage = events[-1]["usage"]
                self.assertEqual(usage["completion_tokens"], 24)
                self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])

                whole = self.cluster.complete(prompt, max_tokens=24, ignore_eos=True)
                self.assertEqual(whole["choices"][0]["text"], text_of(events))
                self.assertEqual(whole["choices"][0]["finish_reason"], "length")
                self.assertEqual(whole["usage"]["prompt_tokens"], usage["prompt_tokens"])
                self.assertEqual(whole["usage"]["completion_tokens"], 24)

    def test_seed_repeats_a_sampled_completion(self):
        fields = {"max_tokens": 24, "temperature": 1.0, "ignore_eos": True}
        one = self.cluster.complete(texts.SHORT, seed=7, **fields)["choices"][0]["text"]
        again = self.cluster.complete(texts.SHORT, seed=7, **fields)["choices"][0]["text"]
        other = self.cluster.complete(texts.SHORT, seed=8, **fields)["choices"][0]["text"]
        self.assertEqual(one, again)
        self.assertNotEqual(one, other)

    def test_stop_string_ends_the_text_before_it(self):
        text = self.cluster.complete(texts.SHORT, max_tokens=24, ignore_eos=True)["choices"][0]["text"]
        stop = text[len(text) // 2:len(text) // 2 + 3]
        stopped = self.cluster.complete(texts.SHORT, max_tokens=24, ignore_eos=True, stop=[stop])["choices"][0]
        self.assertEqual(stopped["text"], text[:text.index(stop)])
        self.assertEqual(stopped["finish_reason"], "stop")

    def test_concurrent_requests_answer_as_alone(self):
        prompts = [texts.prose(1500 + 700 * i, start=4000 * i) for i in range(6)]
        alone = [self.cluster.complete(p, max_tokens=16, ignore_eos=True)["choices"][0]["text"] for p in prompts]
        together = [None] * len(prompts)

        def run(i):
            together[i] = self.cluster.complete(prompts[i], max_tokens=16, ignore_eos=True)["choices"][0]["text"]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(together, alone)

    def test_blocks_come_back(self):
        self.cluster.complete(texts.LONG, max_tokens=4)
        for service in (*self.cluster.decode, *self.cluster.prefill):
            wait_until(lambda s=service: s.used_blocks() == 0, SETTLE_S, f"{service.program} holds no block when idle")

    def test_models_and_health(self):
        status, _, text = http_request(self.cluster.router.http_port, "GET", "/v1/models")
        self.assertEqual(status, 200)
        self.assertIn("zeroc-demo", text)
        for service in self.cluster.processes:
            self.assertEqual(service.status("/healthz"), 200, service.program)


if __name__ == "__main__":
    unittest.main()
