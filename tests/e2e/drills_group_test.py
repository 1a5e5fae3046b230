#!/usr/bin/env python3
"""A prefill group of three processes: long prompts on all ranks, with the tokens of one rank and the bytes of the
formula; and every rank is killed and stopped before it computes, while the ranks exchange blocks, and while they send
to decode. ZEROC_DRILLS_ALL=1: all cases, not one for every rank, fault and phase.
"""

import itertools
import json
import os
import re
import signal
import time
import unittest

import texts
from cluster import MODEL_DIR, SETTLE_S, START_S, TIME_SCALE, free_port, http_request, wait_until
from drills import DrillTest

FIELDS = {"max_tokens": 16, "profile": "bf16"}
RANKS = 3
PATIENCE_MS = int(3000 * TIME_SCALE)
PHASES = ("before", "exchange", "sending")
# A stopped rank is noticed when the others' patience is over, a stopped leader by its heartbeats.
ENDS_S = 25
CONFIG = json.loads((MODEL_DIR / "config.json").read_text())
ACTIVATION_BYTES = 2  # bfloat16 queries and outputs on the wire


def bf16_bytes(scheme, n_tokens):
    """Mean over the ranks of what one sends, in closed form (docs/sequence_parallel.md)."""
    n_layers, n_heads, n_kv = (CONFIG[f"num_{name}"] for name in ("hidden_layers", "attention_heads",
                                                                  "key_value_heads"))
    dim = CONFIG.get("head_dim") or CONFIG["hidden_size"] // n_heads
    per_token = n_layers * n_kv * 2 * dim * 2
    share = (RANKS - 1) / RANKS * n_tokens
    if scheme in ("allgather", "ring"):
        return share * per_token
    row = dim + 4 if scheme == "ulysses8" else dim * ACTIVATION_BYTES
    copies = max(n_kv, RANKS) / n_kv
    # The last layer has no queries but the last token's.
    return share / RANKS * ((n_layers - 1) * n_heads * (row + row + 4) + copies * per_token)


class GroupTest(DrillTest):
    def start_group(self, scheme="auto"):
        """The tokens of one rank, computed by the leader before its followers came."""
        self.places = [(free_port(), free_port()) for _ in range(RANKS - 1)]
        followers = ",".join(f"127.0.0.1:{grpc}" for grpc, _ in self.places)
        self.start(router_args=["--sp-min-tokens", 512], decode_args=["--lease-expiry-ms", int(4000 * TIME_SCALE)],
                   prefill_args=["--sp-followers", followers, "--sp-scheme", scheme,
                                 "--sp-patience-ms", PATIENCE_MS])
        expected = self.reference(**FIELDS)
        self.followers = [self.start_follower(rank) for rank in range(1, RANKS)]
        self.wait_formed()
        return expected

    def start_follower(self, rank):
        follower = self.cluster._start(
            "zeroc-prefill", ["--model", MODEL_DIR, "--kv-memory-mib", 64, "--threads", 1, "--prefix-cache=false"],
            ports=self.places[rank - 1])
        self.remember(follower)
        return follower

    def start_leader(self, scheme=None):
        if scheme:
            args = self.cluster.prefill_args
            args[args.index("--sp-scheme") + 1] = scheme
        self.prefill = self.cluster.start_prefill()
        self.remember(self.prefill)

    @property
    def ranks(self):
        return [self.prefill, *self.followers]

    def complete_long(self, **fields):
        status, _, text = http_request(self.router.http_port, "POST", "/v1/completions", {
            "model": "zeroc-demo", "prompt": texts.prose(3000, 500), "temperature": 0, "max_tokens": 2,
            "ignore_eos": True, **fields})
        self.assertEqual(status, 200, text)
        return json.loads(text)

    def wait_formed(self):
        wait_until(lambda: self.complete_long(profile="bf16")["zeroc"]["sp_ranks"] == RANKS, START_S,
                   "the group serves long prompts")

    def assert_group_serves(self, expected):
        self.wait_formed()
        self.assert_serves(expected, **FIELDS)
        self.assert_settled()
        for follower in self.followers:
            wait_until(lambda f=follower: f.used_blocks() == self.baseline[f], SETTLE_S,
                       "the follower's blocks are back")


class Groups(GroupTest):
    def sent(self):
        """Bytes to other ranks so far, by rank and scheme."""
        return [{labels["scheme"]: value for name, labels, value in rank.metrics() if name == "zeroc_sp_bytes_total"}
                for rank in self.ranks]

    def assert_bytes(self, scheme, profile):
        """One prompt, the bytes that every rank counted, and the formula, within 2 %."""
        before = self.sent()
        answer = self.complete_long(profile=profile, prompt=texts.LONG)
        self.assertEqual(answer["zeroc"]["sp_ranks"], RANKS)
        n_tokens = answer["usage"]["prompt_tokens"]
        lines = re.findall(r"prefill group prompt request=\S+ ranks=(\d+) scheme=(\S+) tokens=(\d+) "
                           r"predicted_bytes_per_rank=(\d+)", self.prefill.log())
        self.assertEqual(lines[-1][:3], (str(RANKS), scheme, str(n_tokens)))
        predicted = int(lines[-1][3])
        if profile == "bf16":
            self.assertAlmostEqual(predicted / bf16_bytes(scheme, n_tokens), 1, delta=0.001)

        def mean():
            return sum(now.get(scheme, 0) - then.get(scheme, 0) for now, then in zip(self.sent(), before)) / RANKS
        # A follower counts when its share has ended, perhaps after the answer.
        wait_until(lambda: mean() >= 0.98 * predicted, SETTLE_S, f"{scheme} {profile}: {predicted} bytes were sent")
        self.assertAlmostEqual(mean() / predicted, 1, delta=0.02, msg=f"{scheme} {profile}")
        return mean()

    def test_tokens_of_one_rank_and_bytes_of_the_formula(self):
        expected = self.start_group("allgather")
        for scheme in ("allgather", "ring", "ulysses", "ulysses8"):
            if scheme != "allgather":
                self.prefill.end()
                self.start_leader(scheme)
                self.wait_formed()
            exact = self.assert_bytes(scheme, "bf16")
            self.assertLess(self.assert_bytes(scheme, "q4"), exact)
            if scheme != "ulysses8":
                self.assert_serves(expected, **FIELDS)
        self.assert_group_serves(None)
        short = self.cluster.complete(texts.SHORT * 20, max_tokens=2)
        self.assertEqual(short["zeroc"]["sp_ranks"], 1)


class GroupDrills(GroupTest):
    def strike(self, rank, how, phase, delay_s):
        """A long prompt, and a signal to one of the ranks that compute it."""
        struck = self.ranks[rank]
        if phase == "before":
            struck.signal(how)
            return self.ask(**FIELDS)
        answer = self.ask(**FIELDS)
        self.wait_leased()
        if phase == "exchange":
            time.sleep(delay_s)
            struck.signal(how)
            return answer
        # Decode acknowledges nothing for a moment, so that the ranks have sent but are not done. In slices: a decode
        # worker without heartbeats is taken for lost.
        try:
            while True:
                self.decode.signal(signal.SIGSTOP)
                time.sleep(0.2)
                if answer.tokens or answer.seconds is not None:
                    break
                self.decode.signal(signal.SIGCONT)
                time.sleep(0.2)
            struck.signal(how)
            time.sleep(0.2)
        finally:
            self.decode.signal(signal.SIGCONT)
        return answer

    def heal(self, rank, how):
        if how == signal.SIGSTOP:
            self.ranks[rank].signal(signal.SIGCONT)
            return
        self.ranks[rank].wait_exit()
        if rank == 0:
            self.start_leader()
        else:
            self.followers[rank - 1] = self.start_follower(rank)

    def drill(self, scheme, cases):
        expected = self.start_group(scheme)
        for i, (rank, how, phase) in enumerate(cases):
            with self.subTest(rank=rank, how=how.name, phase=phase):
                answer = self.strike(rank, how, phase, delay_s=0.05 * (1 + i % 8))
                self.assert_ends(answer, ENDS_S, expected)
                if rank != 0:
                    self.assert_serves(expected, **FIELDS)  # on one rank
                self.heal(rank, how)
                self.assert_group_serves(expected)

    def test_any_rank_at_any_point(self):
        if os.environ.get("ZEROC_DRILLS_ALL"):
            for scheme in ("allgather", "ring", "ulysses"):
                self.drill(scheme, list(itertools.product(range(RANKS), (signal.SIGKILL, signal.SIGSTOP), PHASES)))
                self.cluster.__exit__(None, None, None)
            return
        kill, stop = signal.SIGKILL, signal.SIGSTOP
        self.drill("auto", [(1, kill, "before"), (2, kill, "exchange"), (1, stop, "exchange"), (2, stop, "sending"),
                            (0, kill, "exchange"), (0, stop, "sending")])


if __name__ == "__main__":
    unittest.main()
