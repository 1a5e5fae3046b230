#!/usr/bin/env python3
"""Drills under load: many cancels, a full decode pool, leases in a long queue, a client that does not read."""

import json
import random
import socket
import time
import unittest

import texts
from cluster import SETTLE_S, TIME_SCALE, wait_until
from drills import DrillTest


class LoadDrills(DrillTest):
    def test_cancel_storms(self):
        self.start()
        fields = {"max_tokens": 30, "ignore_eos": True}
        expected = self.reference(texts.SHORT, **fields)
        draw = random.Random(3)
        for _ in range(4):
            streams = []
            for i in range(24):
                body = {"model": "zeroc-demo", "prompt": texts.prose(200 + 250 * (i % 12), start=10 * i),
                        "max_tokens": 1000, "ignore_eos": True, "stream": True}
                connection = socket.create_connection(("127.0.0.1", self.router.http_port), timeout=30)
                data = json.dumps(body).encode()
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                                   b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
                streams.append(connection)
                time.sleep(draw.uniform(0, 0.02))
            draw.shuffle(streams)
            for connection in streams:
                time.sleep(draw.uniform(0, 0.01))
                connection.close()
            self.assert_settled()
        self.assert_serves(expected, texts.SHORT, **fields)
        self.assert_settled()

    def test_decode_pool_full(self):
        """2,000-token prompts at 2 KB a token and room for few: the others are refused and may come again."""
        self.start(decode_args=["--kv-memory-mib", 16])
        fields = {"max_tokens": 200, "profile": "bf16"}
        prompts = [texts.prose(9000, start=700 * i) for i in range(10)]
        answers = [self.ask(prompt, **fields) for prompt in prompts]
        for answer in answers:
            self.assert_ends(answer, 60, statuses={429})
        self.assertTrue(any(a.done for a in answers), "nobody was served")
        refused = [a for a in answers if not a.done]
        for answer in refused:
            self.assertEqual(answer.status, 429, answer.error)
        self.assert_settled()
        for prompt, answer in zip(prompts, answers):
            again = self.ask(prompt, **fields)
            self.assert_ends(again, 30, answer.tokens if answer.done else None, whole=True)
        self.assert_settled()

    def test_leases_outlive_a_long_queue(self):
        """A lease ends without a sign of life, not because its prompt waits for its turn."""
        self.start(decode_args=["--lease-expiry-ms", int(600 * TIME_SCALE)], prefill_args=["--chunk-tokens", 64])
        answers = [self.ask(texts.prose(16000, start=300 * i), max_tokens=2) for i in range(8)]
        for answer in answers:
            self.assert_ends(answer, 60, whole=True)
        self.assertGreater(max(a.seconds for a in answers), 0.6 * TIME_SCALE, "the queue was not long enough")
        self.assertEqual(self.decode.metric("zeroc_kv_leases_expired_total"), 0)
        self.assert_settled()

    def test_a_client_that_does_not_read(self):
        self.start(router_args=["--http-write-timeout-ms", 1000, "--queued-bytes-max", 1 << 16])
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", self.router.http_port))
        # Several times the 4 MiB that the kernel may hold for a socket.
        body = json.dumps({"prompt": texts.SHORT, "max_tokens": 3000, "ignore_eos": True, "stream": True,
                           "logprobs": 20, "n": 4}).encode()
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        wait_until(lambda: self.decode.metric("vllm:num_requests_running") > 0, SETTLE_S, "it decodes")
        for other in [self.ask(texts.SHORT, max_tokens=30) for _ in range(3)]:
            self.assert_ends(other, 20, whole=True)
        self.assert_settled()
        self.assertEqual(self.router.metric("zeroc_request_jct_seconds_count", outcome="cancelled"), 4)
        slow.close()


if __name__ == "__main__":
    unittest.main()
