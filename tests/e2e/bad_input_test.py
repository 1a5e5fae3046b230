#!/usr/bin/env python3
"""What is wrong from outside is refused, says what is wrong, and harms nobody."""

import json
import pathlib
import shutil
import socket
import tempfile
import unittest

import texts
from cluster import (MODEL_DIR, START_S, Cluster, ClusterTest, Process, free_port, http_request, listen_flags,
                     wait_until)


class BadRequestTest(ClusterTest):
    @classmethod
    def setUpClass(cls):
        cls.cluster = cls.enterClassContext(Cluster())
        cls.cluster.wait_ready()
        cls.port = cls.cluster.router.http_port

    def tearDown(self):
        self.cluster.complete(texts.SHORT, max_tokens=2)  # whatever was sent, the cluster still serves

    def post(self, body, path="/v1/completions"):
        """(status, error message) of a request that must be refused."""
        status, _, text = http_request(self.port, "POST", path, body)
        self.assertIn("error", json.loads(text), text)
        return status, json.loads(text)["error"]["message"]

    def test_prompt_over_the_limit(self):
        status, message = self.post({"model": "zeroc-demo", "prompt": texts.prose(60000), "max_tokens": 4})
        self.assertEqual(status, 400)
        self.assertIn("8192", message)

    def test_prompt_and_completion_over_the_limit(self):
        status, message = self.post({"model": "zeroc-demo", "prompt": texts.SHORT, "max_tokens": 8192})
        self.assertEqual(status, 400)
        self.assertIn("max_tokens", message)

    def test_fields_out_of_range(self):
        for field, value in [("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "many"), ("temperature", -0.1),
                             ("temperature", 1e9), ("top_p", 0), ("top_p", 1.5), ("logprobs", 10000), ("stop", 7),
                             ("stop", ["x"] * 1000), ("prompt", {}), ("prompt", None), ("prompt", [999999]),
                             ("prompt", []), ("model", "another-model"), ("stream", "perhaps")]:
            with self.subTest(field=field, value=str(value)[:20]):
                body = {"model": "zeroc-demo", "prompt": texts.SHORT, "max_tokens": 4, field: value}
                status, message = self.post(body)
                self.assertIn(status, (400, 404) if field == "model" else (400,))
                self.assertIn(field, message)

    def test_bodies_that_are_no_request(self):
        for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100000,
                     b'{"prompt": "a", "prompt_": 1' + b" " * 1000):
            with self.subTest(body=body[:20]):
                self.assertEqual(self.post(body)[0], 400)

    def test_body_too_large(self):
        try:
            status, _, _ = http_request(self.port, "POST", "/v1/completions", b" " * (64 << 20))
        except (BrokenPipeError, ConnectionResetError):
            return  # refused while the body was still being sent
        self.assertEqual(status, 413)

    def test_unknown_path_and_method(self):
        self.assertEqual(http_request(self.port, "GET", "/v1/nothing")[0], 404)
        self.assertEqual(http_request(self.port, "GET", "/v1/completions")[0], 405)

    def test_bytes_that_are_no_http(self):
        for data in (b"\0" * 4096, b"GET / HTTP/9.9\r\n\r\n", b"A" * (1 << 20), b"POST /v1/completions HTTP/1.1\r\n"):
            with self.subTest(data=data[:12]), socket.create_connection(("127.0.0.1", self.port), timeout=10) as peer:
                try:
                    peer.sendall(data)
                    peer.shutdown(socket.SHUT_WR)
                    answer = peer.recv(4096)
                except ConnectionError:
                    continue
                self.assertFalse(answer.startswith(b"HTTP/1.1 200"), answer)


class NoWorkerTest(ClusterTest):
    def test_router_alone_is_not_ready_and_refuses(self):
        with Cluster(n_decode=0, n_prefill=0) as cluster:
            wait_until(lambda: cluster.router.status("/healthz") == 200, START_S, "the router answers")
            self.assertEqual(cluster.router.status("/readyz"), 503)
            refused = cluster.complete(texts.SHORT, expect_status=503, max_tokens=2)
            self.assertTrue(refused["error"]["message"])


class StartTest(unittest.TestCase):
    """Programs that cannot start end by themselves, with the cause in their last words."""

    def setUp(self):
        self.dir = self.enterContext(tempfile.TemporaryDirectory(prefix="zeroc-e2e-"))

    def run_program(self, program, *args):
        """(exit code, output) of a program that must end by itself."""
        process = Process(program, args, self.dir)
        try:
            code = process.wait_exit()
        finally:
            process.end()
        return code, process.log()

    def worker_flags(self, model):
        return ["--model", model, "--router", "127.0.0.1:1", *listen_flags(free_port(), free_port())]

    def test_unknown_config_key(self):
        config = pathlib.Path(self.dir) / "config.yaml"
        config.write_text("no_such_setting: 1\n")
        for program in ("zeroc-router", "zeroc-prefill", "zeroc-decode"):
            with self.subTest(program=program):
                code, log = self.run_program(program, "--config", config)
                self.assertEqual(code, 2, log)
                self.assertIn("no_such_setting", log)
                self.assertIn("config.yaml", log)

    def test_config_that_is_no_yaml(self):
        config = pathlib.Path(self.dir) / "config.yaml"
        for text in ("{", "[1, 2]", "a: b: c\n", "&a [*a, *a]\n", "\0"):
            config.write_text(text)
            with self.subTest(text=text):
                code, log = self.run_program("zeroc-decode", "--config", config)
                self.assertEqual(code, 2, log)
                self.assertIn("config.yaml", log)

    def test_unknown_flag(self):
        for program, *command in (["zeroc-router"], ["zeroc-prefill"], ["zeroc-decode"],
                                  ["zeroc", "plan", "zeroc.plan"]):
            with self.subTest(program=program):
                code, log = self.run_program(program, *command, "--no-such-flag")
                self.assertEqual(code, 2, log)
                self.assertIn("no-such-flag", log)

    def test_port_in_use(self):
        for flag in ("--grpc-listen", "--http-listen"):
            with self.subTest(flag=flag), socket.socket() as taken:
                # A server that sets this option too, as gRPC does by default, would share the port in silence.
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                taken.bind(("127.0.0.1", 0))
                taken.listen()
                port = taken.getsockname()[1]
                args = listen_flags(free_port(), free_port())
                args[args.index(flag) + 1] = f"127.0.0.1:{port}"
                code, log = self.run_program("zeroc-router", "--model", MODEL_DIR, *args)
                self.assertEqual(code, 1, log)
                self.assertIn(str(port), log)

    def test_missing_model(self):
        code, log = self.run_program("zeroc-decode", *self.worker_flags(f"{self.dir}/nothing"))
        self.assertEqual(code, 1, log)
        self.assertIn("nothing", log)

    def changed_model(self):
        """A copy of the model whose configuration, and so whose fingerprint, is another."""
        model = pathlib.Path(self.dir) / "model"
        shutil.copytree(MODEL_DIR, model)
        config = json.loads((model / "config.json").read_text())
        config["rope_theta"] *= 2
        (model / "config.json").write_text(json.dumps(config))
        return model

    def test_plan_of_another_model(self):
        model = self.changed_model()
        self.assertTrue((model / "zeroc.plan").is_file(), "the demo model has a plan")
        code, log = self.run_program("zeroc-decode", *self.worker_flags(model))
        self.assertEqual(code, 1, log)
        self.assertIn("zeroc.plan", log)

    def test_plan_that_is_cut_short(self):
        model = pathlib.Path(self.dir) / "model"
        shutil.copytree(MODEL_DIR, model)
        plan = model / "zeroc.plan"
        whole = plan.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            with self.subTest(size=size):
                plan.write_bytes(whole[:size])
                code, log = self.run_program("zeroc", "plan", plan, "--json")
                self.assertEqual(code, 1, log)
                self.assertIn("zeroc.plan", log)


if __name__ == "__main__":
    unittest.main()
