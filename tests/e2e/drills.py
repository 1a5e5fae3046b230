"""What the drills share: a cluster that notices losses fast, requests in the background, and what must hold after every
drill: the request has ended in bounded time, whole or with a clear error, and every block is back.
"""

import json
import os
import pathlib
import re
import tempfile
import threading
import time

import texts
from cluster import (REQUEST_S, ROOT, SETTLE_S, TIME_SCALE, Cluster, ClusterTest, Stream, http_request,
                     wait_until)

FAULTS_LIBRARY = pathlib.Path(os.environ.get("ZEROC_WIRE_FAULTS_LIBRARY",
                                             ROOT / "build/release/tests/e2e/libzeroc_wire_faults.so"))
# Fast, but long enough that a worker on a busy machine is not taken for a dead one.
HEARTBEAT_MS = 100
HEARTBEATS = ["--heartbeat-ms", HEARTBEAT_MS, "--heartbeat-expiry-ms", int(3000 * TIME_SCALE)]
# What a request may end with when a worker was lost and nobody could take over.
LOST = {502, 503, 504}


class Answer(threading.Thread):
    """A streamed completion in the background. After join(): status, done ([DONE] came), tokens, error (the object of
    the error body or event, None when there was none), seconds."""

    def __init__(self, cluster, prompt, **fields):
        super().__init__(daemon=True)
        self.port = cluster.router.http_port
        self.body = {"model": "zeroc-demo", "prompt": prompt, "temperature": 0, "stream": True, "ignore_eos": True,
                     "return_token_ids": True, **fields}
        self.status, self.done, self.tokens, self.error, self.seconds = None, False, [], None, None
        self.broken = None  # the connection ended in the middle
        self.start()

    def run(self):
        started = time.monotonic()
        try:
            stream = Stream(self.port, self.body)
            if stream.status != 200:
                self.error = json.loads(stream.response.read())["error"]
            self.status = stream.status
            for event in stream.events() if stream.status == 200 else ():
                self.error = event.get("error", self.error)
                for choice in event.get("choices", ()):
                    self.tokens += choice.get("token_ids", [])
            self.done = stream.done
        except (OSError, ValueError) as error:
            self.broken = error
        self.seconds = time.monotonic() - started

    def wait_tokens(self, n):
        wait_until(lambda: len(self.tokens) >= n or self.seconds is not None, REQUEST_S, f"{n} tokens came")

    def failed(self):
        return self.error is not None


class DrillTest(ClusterTest):
    """Subclasses make their cluster with start()."""

    def start(self, router_args=(), decode_args=(), prefill_args=(), **options):
        # Drills ask the same prompt again and again; with the prefix cache nothing would be left to compute or to send.
        always = ["--prefix-cache=false"]
        self.cluster = self.enterContext(Cluster(
            router_args=[*HEARTBEATS, *router_args], decode_args=[*always, *decode_args],
            prefill_args=[*always, *prefill_args], **options))
        self.cluster.wait_ready()
        self.router, self.decode, self.prefill = self.cluster.router, self.cluster.decode[0], self.cluster.prefill[0]
        self.baseline = {}
        for worker in [*self.cluster.decode, *self.cluster.prefill]:
            self.remember(worker)

    def start_slow(self, decode_args=(), **options):
        """As start(); ask_in_transfer() can slow the KV transfer of the prefill worker down."""
        self.faults = self.wire_faults()
        self.start(decode_args=[*TCP, *decode_args], prefill_args=TCP, prefill_env=self.faults.env, **options)

    def wire_faults(self):
        if not FAULTS_LIBRARY.is_file():
            self.skipTest("ZEROC_WIRE_FAULTS_LIBRARY is not there: ctest builds it")
        return WireFaults(self.enterContext(tempfile.TemporaryDirectory()))

    def ask_in_transfer(self, **fields):
        """A request whose blocks are on their way: some sent, the rest held up by a slow link."""
        self.faults.set(SLOW)
        answer = self.ask(**fields)
        self.wait_leased()
        time.sleep(0.5 * TIME_SCALE)
        self.assertGreater(self.leased(), 0, "the transfer is not over")
        return answer

    def remember(self, worker):
        worker.wait_ready()
        self.baseline[worker] = worker.used_blocks()

    def ask(self, prompt=texts.LONG, **fields):
        return Answer(self.cluster, prompt, **fields)

    def reference(self, prompt=texts.LONG, **fields):
        """The tokens of an uninterrupted run."""
        answer = self.ask(prompt, **fields)
        answer.join(REQUEST_S)
        self.assertTrue(answer.done, answer.error)
        return answer.tokens

    def leased(self, decode=None):
        return (decode or self.decode).metric("zeroc_kv_blocks", state="leased")

    def wait_leased(self, decode=None):
        wait_until(lambda: self.leased(decode) > 0, SETTLE_S, "decode has leased blocks to the request")

    def assert_ends(self, answer, within_s, reference=None, whole=False, statuses=LOST):
        """Ended in time: whole and equal to the uninterrupted run, or with a clear error and never with [DONE]."""
        answer.join(within_s * TIME_SCALE)
        self.assertFalse(answer.is_alive(), f"no end within {within_s} s; {len(answer.tokens)} tokens so far")
        self.assertIsNone(answer.broken, answer.broken)
        self.assertNotEqual(answer.done, answer.failed(), "neither whole nor an error, or both")
        if whole:
            self.assertTrue(answer.done, answer.error)
        if answer.done:
            self.assertEqual(answer.tokens, reference or answer.tokens)
            return
        self.assertTrue(answer.error["message"], answer.error)
        if answer.status != 200:
            self.assertIn(answer.status, statuses, answer.error)
        if reference:
            self.assertEqual(answer.tokens, reference[:len(answer.tokens)], "what was streamed before is right")

    def retried_behind(self):
        """How many tokens were out when the router tried again, for each time."""
        return [int(n) for n in re.findall(r"retry request=.* n_streamed=(\d+)", self.router.log())]

    def assert_right(self, answer, n, expected, profile):
        """The first n tokens are those of the undisturbed run, the others those of a run that was prefilled so far:
        where a token's KV was computed, in a chunk or by itself, may change its last bit, and a close choice by it."""
        self.assertEqual(answer.tokens[:n], expected[:n])
        if n == 0:
            return self.assertEqual(answer.tokens, expected[:len(answer.tokens)])
        if n == len(answer.tokens):
            return None
        status, _, text = http_request(self.router.http_port, "POST", "/tokenize", {"prompt": texts.LONG})
        self.assertEqual(status, 200)
        so_far = json.loads(text)["tokens"] + answer.tokens[:n]
        rest = self.reference(so_far, max_tokens=len(answer.tokens) - n, profile=profile)
        return self.assertEqual(answer.tokens[n:], rest)

    def assert_settled(self, *workers, within_s=SETTLE_S):
        """Nothing runs and every block is back on the workers (default: all that live)."""
        live = [w for w in [*self.cluster.decode, *self.cluster.prefill] if w.popen.poll() is None]
        for worker in workers or live:
            wait_until(lambda w=worker: w.used_blocks() == self.baseline[w], within_s,
                       f"{worker.program} has its {self.baseline[worker]:.0f} used blocks of before")
        for worker in workers or live:
            if worker in self.cluster.decode:
                for state in ("leased", "resident", "quarantined"):
                    self.assertEqual(worker.metric("zeroc_kv_blocks", state=state), 0, state)
            wait_until(lambda w=worker: w.metric("vllm:num_requests_running") == 0, within_s,
                       f"{worker.program} has nothing under way")
        wait_until(lambda: self.router.metric("vllm:num_requests_running") == 0, SETTLE_S, "no request runs")

    def assert_serves(self, reference=None, prompt=texts.LONG, **fields):
        """The cluster works as before."""
        self.router.wait_ready()
        answer = self.ask(prompt, **(fields or {"max_tokens": 4}))
        self.assert_ends(answer, 30, reference, whole=True)


SLOW = "delay 50000"  # a prompt of 2,000 tokens takes seconds


class WireFaults:
    """A file that tells the preloaded library what to do to the KV transfer of prefill workers."""

    def __init__(self, folder):
        self.path = pathlib.Path(folder) / "wire_faults"
        self.set("none")
        self.env = {"LD_PRELOAD": str(FAULTS_LIBRARY), "ZEROC_WIRE_FAULTS": str(self.path),
                    "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"}

    def set(self, what):
        new = self.path.with_suffix(".new")
        new.write_text(what)
        new.replace(self.path)  # never half written


TCP = ["--transport-tls", "tcp"]
