#!/usr/bin/env python3
"""TLS, client certificates, API keys and limits through real processes, with certificates that openssl makes here."""

import http.client
import json
import os
import pathlib
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import unittest

import texts
from cluster import BIN_DIR, MODEL_DIR, SETTLE_S, Cluster, ClusterTest, Process, Stream, http_request, wait_until

ALICE, BOB, CAROL = "alice-0123456789abcdef", "bob-0123456789abcdef", "carol-0123456789abcdef"
CLUSTER_KEY = "cluster-0123456789abcdef"
EC_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


class Certificates:
    """An authority and what it signed, as PEM files of one folder."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self._openssl("req", "-x509", *EC_KEY, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
        (self.folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        for name in ("service", "client"):
            self._openssl("req", *EC_KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
            self._openssl("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                          "-CAcreateserial", "-extfile", "names", "-out", f"{name}.pem")

    def _openssl(self, *args):
        subprocess.run(["openssl", *args], cwd=self.folder, check=True, capture_output=True, timeout=60)

    def file(self, name):
        return self.folder / name

    def context(self, with_certificate=False):
        context = ssl.create_default_context(cafile=self.file("ca.pem"))
        if with_certificate:
            context.load_cert_chain(self.file("client.pem"), self.file("client.key"))
        return context


class SecurityTest(ClusterTest):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory(prefix="zeroc-tls-"))
        cls.certificates = Certificates(folder)
        cls.keys_file = cls.write_secret("keys", f"# comment\nalice {ALICE}\nbob {BOB}\n")
        peers = ["--tls-certificate-file", cls.certificates.file("service.pem"),
                 "--tls-key-file", cls.certificates.file("service.key"),
                 "--tls-ca-file", cls.certificates.file("ca.pem")]
        cls.peer_args = peers
        key = ["--cluster-key-file", cls.write_secret("cluster", CLUSTER_KEY + "\n")]
        workers = [*peers, *key, "--grpc-client-ca-file", cls.certificates.file("ca.pem"),
                   "--http-client-ca-file", cls.certificates.file("ca.pem")]
        router = [*peers, *key, "--api-keys-file", cls.keys_file, "--max-in-flight-per-key", 3,
                  "--max-prompt-tokens", 3000, "--max-output-tokens", 2500, "--http-body-bytes-max", 100_000]
        # The probes of all services are asked with a certificate, which the router does not look at.
        cls.cluster = cls.enterClassContext(Cluster(
            router_args=router, decode_args=workers, prefill_args=workers,
            tls=cls.certificates.context(with_certificate=True)))
        cls.cluster.wait_ready()
        cls.port = cls.cluster.router.http_port
        cls.tls = cls.certificates.context()

    @classmethod
    def write_secret(cls, name, text):
        path = cls.certificates.file(name)
        new = path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(text)
        os.replace(new, path)
        return path

    def post(self, body, key=ALICE, path="/v1/completions"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return http_request(self.port, "POST", path, {"model": "zeroc-demo", "temperature": 0, **body}, tls=self.tls,
                            headers=headers)

    def stream(self, **fields):
        body = {"model": "zeroc-demo", "temperature": 0, "stream": True, "ignore_eos": True, **fields}
        return Stream(self.port, body, tls=self.tls, headers={"Authorization": f"Bearer {ALICE}"})

    def wait_idle(self):
        wait_until(lambda: self.cluster.router.metric("vllm:num_requests_running") == 0, SETTLE_S, "nothing runs")

    def test_whole_and_streamed_answers_are_the_same(self):
        status, _, text = self.post({"prompt": texts.LONG, "max_tokens": 20, "ignore_eos": True})
        self.assertEqual(status, 200, text)
        stream = self.stream(prompt=texts.LONG, max_tokens=20)
        streamed = "".join(choice["text"] for event in stream.events() for choice in event["choices"])
        self.assertTrue(stream.done)
        self.assertEqual(streamed, json.loads(text)["choices"][0]["text"])

    def test_no_key_no_answer(self):
        for key in (None, "wrong-0123456789abcdef", ALICE[:-1], CLUSTER_KEY):
            status, headers, text = self.post({"prompt": "x", "max_tokens": 2}, key=key)
            self.assertEqual(status, 401, text)
            self.assertEqual(headers["WWW-Authenticate"], "Bearer")
            self.assertEqual(json.loads(text)["error"]["code"], "invalid_api_key")
        for path in ("/v1/models", "/tokenize", "/nothing"):
            self.assertEqual(http_request(self.port, "GET", path, tls=self.tls)[0], 401, path)
        for path in ("/healthz", "/readyz", "/metrics"):
            self.assertEqual(http_request(self.port, "GET", path, tls=self.tls)[0], 200, path)

    def test_large_bodies_get_their_answer_before_they_are_read(self):
        self.assertEqual(self.post({"prompt": "x " * 100_000, "max_tokens": 2})[0], 413)
        self.assertEqual(self.post({"prompt": "x " * 40_000, "max_tokens": 2}, key=None)[0], 401)

    def test_a_changed_key_file_is_read_again(self):
        self.assertEqual(self.post({"prompt": "x", "max_tokens": 2}, key=BOB)[0], 200)
        self.write_secret("keys", f"alice {ALICE}\ncarol {CAROL}\n")
        wait_until(lambda: self.post({"prompt": "x", "max_tokens": 2}, key=CAROL)[0] == 200, SETTLE_S, "a new key")
        self.assertEqual(self.post({"prompt": "x", "max_tokens": 2}, key=BOB)[0], 401)
        self.write_secret("keys", f"alice {ALICE}\nbob {BOB}\n")
        wait_until(lambda: self.post({"prompt": "x", "max_tokens": 2}, key=BOB)[0] == 200, SETTLE_S, "the old key")

    def test_a_key_has_so_many_requests_at_a_time(self):
        streams = [self.stream(prompt=texts.SHORT, max_tokens=2000) for _ in range(3)]
        for stream in streams:
            self.assertEqual(stream.status, 200)
            next(stream.events())
        self.cluster.decode[0].signal(signal.SIGSTOP)  # or the streams could be over before the next request comes
        try:
            status, headers, text = self.post({"prompt": "x", "max_tokens": 2})
        finally:
            self.cluster.decode[0].signal(signal.SIGCONT)
        self.assertEqual(status, 429, text)
        self.assertGreaterEqual(int(headers["Retry-After"]), 1)
        self.assertEqual(self.post({"prompt": "x", "max_tokens": 2}, key=BOB)[0], 200)
        for stream in streams:
            stream.close()
        wait_until(lambda: self.post({"prompt": "x", "max_tokens": 2})[0] == 200, SETTLE_S, "a place is free again")
        self.wait_idle()
        wait_until(lambda: self.cluster.decode[0].used_blocks() == 0, SETTLE_S, "the blocks of the cut streams")

    def test_token_limits(self):
        for body in ({"prompt": [5] * 3001, "max_tokens": 2}, {"prompt": "x", "max_tokens": 2501}):
            status, _, text = self.post(body)
            self.assertEqual(status, 400, text)
            self.assertIn("allowed here", text)

    def test_plain_http_on_the_tls_port_is_cut_off(self):
        with self.assertRaises((http.client.HTTPException, OSError)):
            http_request(self.port, "GET", "/healthz")
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as raw:
            raw.sendall(os.urandom(4096))
        self.assertEqual(http_request(self.port, "GET", "/healthz", tls=self.tls)[0], 200)

    def test_workers_let_in_only_signed_clients(self):
        for worker in (*self.cluster.decode, *self.cluster.prefill):
            self.assertEqual(worker.status("/healthz"), 200)
            with self.assertRaises((ssl.SSLError, OSError)):
                http_request(worker.http_port, "GET", "/healthz", tls=self.tls)

    def test_a_worker_without_the_clusters_key_does_not_get_in(self):
        before = self.cluster.router.metric("zeroc_workers")
        rogue = Process("zeroc-prefill", [*self.peer_args, "--model", MODEL_DIR, "--router",
                                          f"127.0.0.1:{self.cluster.router.grpc_port}", "--kv-memory-mib", 16,
                                          "--threads", 1], self.cluster.log_dir.name)
        try:
            wait_until(lambda: "the cluster's key is missing" in rogue.log(), SETTLE_S, "the refusal")
            self.assertEqual(self.cluster.router.metric("zeroc_workers"), before)
        finally:
            rogue.end()

    def test_grpc_asks_for_the_same_keys(self):
        def request(*flags):
            command = [BIN_DIR / "zeroc", "request", "--router", f"127.0.0.1:{self.cluster.router.grpc_port}",
                       "--prompt", "x", "--max-tokens", "2", "--timeout-s", "20", "--json", *map(str, flags)]
            return subprocess.run(command, capture_output=True, text=True, timeout=60)

        ca = ["--tls-ca-file", self.certificates.file("ca.pem")]
        alice = ["--api-key-file", self.write_secret("alice", ALICE + "\n")]
        good = request(*ca, *alice)
        self.assertEqual(good.returncode, 0, good.stderr)
        self.assertEqual(json.loads(good.stdout)["completion_tokens"], 2)
        for flags, why in ((ca, "UNAUTHENTICATED"), (alice, "UNAVAILABLE"), ([], "UNAVAILABLE")):
            bad = request(*flags)
            self.assertEqual(bad.returncode, 1)
            self.assertIn(why, bad.stderr)
            self.assertNotIn(ALICE, bad.stderr)

    def test_requests_of_a_minute_are_counted(self):
        with Cluster(n_decode=0, n_prefill=0, router_args=["--requests-per-minute", 12]) as cluster:
            wait_until(lambda: cluster.router.status("/healthz") == 200, SETTLE_S, "the router is up")
            ask = lambda: http_request(cluster.router.http_port, "GET", "/v1/models")  # noqa: E731
            self.assertEqual([ask()[0] for _ in range(2)], [200, 200])
            status, headers, _ = ask()
            self.assertEqual(status, 429)
            self.assertLessEqual(int(headers["Retry-After"]), 5)
            time.sleep(5.1)
            self.assertEqual(ask()[0], 200)
        Cluster.latest = self.cluster

    def test_zz_no_log_has_a_secret(self):
        private = self.certificates.file("service.key").read_text().splitlines()[1]
        for process in self.cluster.processes:
            log = process.log()
            self.assertIn("security http=", log)
            for secret in (ALICE, BOB, CAROL, CLUSTER_KEY, "wrong-0123456789abcdef", private):
                self.assertNotIn(secret, log, process.program)
        self.assertIn("client=alice", self.cluster.router.log())


if __name__ == "__main__":
    unittest.main()
