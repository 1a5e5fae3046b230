#!/usr/bin/env python3
"""deploy/compose.yaml, run: podman-compose starts router, two prefill and two decode workers and Prometheus as the file
says, a request goes through the published port, and Prometheus finds all services by the names of the file.

Of the file only images are replaced: ours by those of images_test.py, Prometheus' by one made of Debian's package.
Grafana is left out, as Debian has none. Needs what images_test.py needs, podman's name service, and podman-compose in
build/tools/compose (deploy/test makes it); ports 8000, 9000 and 9090 of loopback must be free. Standard library only.
"""

import json
import os
import pathlib
import socket
import sys
import tempfile
import unittest
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))
sys.path.insert(0, str(ROOT / "tests/deploy"))

from cluster import TIME_SCALE, http_request, parse_metrics, wait_until  # noqa: E402
from images_test import BASE, LIMIT, MISSING, ROLES, ULIMITS, build, import_base, run  # noqa: E402

PODMAN_COMPOSE = ROOT / "build/tools/compose/bin/podman-compose"
COMPOSE = ROOT / "deploy/compose.yaml"
WORKERS = ("prefill-1", "prefill-2", "decode-1", "decode-2")
SERVICES = ("router", *WORKERS, "prometheus")
PROMETHEUS = f"""
FROM {BASE}
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/*
USER nobody
ENTRYPOINT ["/usr/bin/prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/tmp/data"]
"""
# netavark: the network backend that resolves names.
CONTAINERS_CONF = f"""
[network]
network_backend = "netavark"
[engine]
runtime = "runc"
[containers]
default_ulimits = ["nofile={LIMIT}:{LIMIT}", "nproc=4096:4096"]
"""
MISSING = [*MISSING, *(str(path) for path in (PODMAN_COMPOSE, pathlib.Path("/usr/lib/podman/netavark"),
                                               pathlib.Path("/usr/lib/podman/aardvark-dns")) if not path.exists())]
START_S = 60 * TIME_SCALE


@unittest.skipIf(MISSING, f"SKIPPED: compose needs {', '.join(MISSING)}")
class ComposeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        for port in (8000, 9000, 9090):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))  # says which one is taken
        import_base()
        for role in ROLES:
            build(role, f"zeroc-{role}:test")
        folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="zeroc-compose-")))
        (folder / "Dockerfile").write_text(PROMETHEUS)
        run("buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers", "--force-rm",
            "--timestamp", "0", "--tag", "zeroc-prometheus:test", *ULIMITS, folder)
        images = {service: {"image": f"zeroc-{service.split('-')[0]}:test"} for service in SERVICES}
        (folder / "images.yaml").write_text(json.dumps({"services": images}))
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        cls.env = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf")}
        cls.files = ["--file", COMPOSE, "--file", folder / "images.yaml"]
        cls.addClassCleanup(cls.compose, "down")
        cls.compose("up", "--detach", "--no-build", *SERVICES)

    @classmethod
    def compose(cls, *args):
        return run(PODMAN_COMPOSE, *cls.files, *args, env=cls.env, timeout=180)

    @classmethod
    def inspect(cls, service):
        return json.loads(run("podman", "container", "inspect", f"zeroc_{service}_1", env=cls.env))[0]

    @staticmethod
    def get(port, path):
        """The body, or None while nobody answers."""
        try:
            status, _, text = http_request(port, "GET", path, timeout_s=5)
        except OSError:
            return None
        return text if status == 200 else None

    def workers(self):
        samples = parse_metrics(self.get(8000, "/metrics") or "")
        return {labels["role"]: value for name, labels, value in samples if name == "zeroc_workers"}

    def test_a_request_through_the_published_port(self):
        wait_until(lambda: self.workers() == {"prefill": 2, "decode": 2}, START_S, "all workers are registered")
        body = {"model": "zeroc-demo", "prompt": "Everyone is permitted to copy. " * 100, "max_tokens": 8,
                "ignore_eos": True}
        status, _, text = http_request(8000, "POST", "/v1/completions", body)
        self.assertEqual(status, 200, text)
        answer = json.loads(text)
        self.assertEqual(answer["usage"]["completion_tokens"], 8)
        self.assertIn(answer["zeroc"]["prefill_worker"], WORKERS)
        self.assertIn(answer["zeroc"]["decode_worker"], WORKERS)
        self.assertIn("tcp", answer["zeroc"]["transport"])  # the KV went over the network of the file

    def test_prometheus_finds_every_service_by_its_name(self):
        query = "/api/v1/query?" + urllib.parse.urlencode({"query": 'count by (zeroc_role) (up{job="zeroc"} == 1)'})

        def up():
            text = self.get(9090, query)
            return {sample["metric"]["zeroc_role"]: int(sample["value"][1])
                    for sample in json.loads(text)["data"]["result"]} if text else None

        wait_until(lambda: up() == {"router": 1, "prefill": 2, "decode": 2}, START_S, "every service is scraped")
        groups = json.loads(self.get(9090, "/api/v1/rules"))["data"]["groups"]
        self.assertGreater(sum(len(group["rules"]) for group in groups), 20)

    def test_containers_are_closed_as_the_file_says(self):
        for service in ("router", *WORKERS):
            container = self.inspect(service)
            self.assertTrue(container["HostConfig"]["ReadonlyRootfs"], service)
            self.assertEqual(container["EffectiveCaps"] or [], [], service)
            self.assertEqual(container["Config"]["User"], "10001:10001")

    def test_stopped_workers_leave_in_peace(self):
        for worker, role in (("prefill-2", "prefill"), ("decode-2", "decode")):
            wait_until(lambda r=role: self.workers().get(r) == 2, START_S, f"both {role} workers are registered")
            run("podman", "stop", "--time", "45", f"zeroc_{worker}_1", env=self.env)
            self.assertEqual(self.inspect(worker)["State"]["ExitCode"], 0, worker)
            wait_until(lambda r=role: self.workers().get(r) == 1, START_S, f"the router knows one {role} worker")
            status, _, text = http_request(8000, "POST", "/v1/completions", {"model": "zeroc-demo", "prompt": "x",
                                                                             "max_tokens": 2})
            self.assertEqual(status, 200, text)
            run("podman", "start", f"zeroc_{worker}_1", env=self.env)


if __name__ == "__main__":
    unittest.main()
