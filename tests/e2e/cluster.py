"""A ZeroC cluster of real processes on loopback, for end-to-end tests. Standard library only.

    with Cluster() as cluster:
        cluster.wait_ready()
        body = cluster.complete("Everyone is permitted to", max_tokens=8)

Environment: ZEROC_BIN_DIR (folder of the programs), ZEROC_MODEL_DIR (default models/zeroc-demo),
ZEROC_TEST_TIME_SCALE (every bound is multiplied by it; sanitizer builds are slower).
Not thread-safe. Leaving the `with` block ends every process, whatever happened. A failed ClusterTest prints their logs.
"""

import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN_DIR = pathlib.Path(os.environ.get("ZEROC_BIN_DIR", ROOT / "build/release/bin"))
MODEL_DIR = pathlib.Path(os.environ.get("ZEROC_MODEL_DIR", ROOT / "models/zeroc-demo"))
TIME_SCALE = float(os.environ.get("ZEROC_TEST_TIME_SCALE", "1"))

START_S = 30 * TIME_SCALE  # load the demo model, connect, register
REQUEST_S = 60 * TIME_SCALE  # one request of a few thousand tokens
SETTLE_S = 10 * TIME_SCALE  # a lost peer is noticed, blocks are back
EXIT_S = 15 * TIME_SCALE  # drain after SIGTERM

_ports_given = set()


def free_port():
    """A loopback TCP port that is free now. Never given twice, so that a test cannot collide with itself; below those
    that the kernel gives to outgoing connections, so that it stays free while a service is started again."""
    for _ in range(1000):
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _ports_given:
            _ports_given.add(port)
            return port
    raise RuntimeError("found no free TCP port")


def listen_flags(grpc_port, http_port):
    return ["--grpc-listen", f"127.0.0.1:{grpc_port}", "--http-listen", f"127.0.0.1:{http_port}"]


def wait_until(condition, timeout_s, what):
    """Returns the first true value of condition(). Fails naming `what` and the last value after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what} (last value: {value!r})")
        time.sleep(0.05)


def connect_http(port, timeout_s=REQUEST_S, tls=None):
    """`tls`: the ssl.SSLContext to use, None for plain HTTP."""
    if tls is not None:
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=timeout_s, context=tls)
    return http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)


def http_request(port, method, path, body=None, timeout_s=REQUEST_S, tls=None, headers=None):
    """Returns (status, headers, text). `body` is bytes, or an object that is sent as JSON."""
    connection = connect_http(port, timeout_s, tls)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body=data,
                           headers={"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse_metrics(text):
    """A Prometheus text page as a list of (name, labels, value)."""
    samples = []
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if match:
            samples.append((match.group(1), dict(LABEL.findall(match.group(2) or "")), float(match.group(3))))
    return samples


class Process:
    """One of our programs. Its output goes to a log file; it leads a process group of its own."""

    def __init__(self, program, args, log_dir, env=None):
        self.program = program
        self.log_path = pathlib.Path(log_dir) / f"{program}-{time.monotonic_ns()}.log"
        with open(self.log_path, "wb") as log:
            self.popen = subprocess.Popen([BIN_DIR / program, *map(str, args)], stdin=subprocess.DEVNULL, stdout=log,
                                          stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                                          env={**os.environ, "no_proxy": "127.0.0.1",  # gRPC heeds http_proxy
                                               **(env or {})})

    def log(self):
        return self.log_path.read_text(errors="replace")

    def signal(self, number):
        self.popen.send_signal(number)

    def kill(self):
        """SIGKILL, and waits until the process is gone."""
        self.popen.kill()
        self.popen.wait(SETTLE_S)

    def wait_exit(self, timeout_s=START_S):
        """The exit code; fails with the log when the process does not end."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            message = f"{self.program} did not end within {timeout_s:.0f} s:\n{self.log()[-2000:]}"
            raise AssertionError(message) from None

    def end(self):
        """SIGTERM, bounded wait, SIGKILL. Returns the exit code, or None when it had to be killed."""
        if self.popen.poll() is not None:
            return self.popen.returncode
        self.popen.send_signal(signal.SIGCONT)  # a stopped process cannot drain
        self.popen.terminate()
        try:
            return self.popen.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            return None


class Service(Process):
    """zeroc-router, zeroc-prefill or zeroc-decode with a gRPC and an HTTP port. `tls` as in connect_http."""

    tls = None

    def __init__(self, program, args, log_dir, env=None, ports=None):
        self.args = args
        self.grpc_port, self.http_port = ports or (free_port(), free_port())
        super().__init__(program, [*listen_flags(self.grpc_port, self.http_port), *args], log_dir, env)

    def status(self, path):
        """HTTP status of a GET, or None while nobody answers."""
        try:
            return http_request(self.http_port, "GET", path, timeout_s=5, tls=self.tls)[0]
        except OSError:
            return None

    def wait_ready(self, timeout_s=START_S):
        def ready():
            if self.popen.poll() is not None:
                raise AssertionError(f"{self.program} ended with {self.popen.returncode}:\n{self.log()[-2000:]}")
            return self.status("/readyz") == 200

        wait_until(ready, timeout_s, f"{self.program} is ready; log:\n{self.log()[-2000:]}")

    def metrics(self):
        status, _, text = http_request(self.http_port, "GET", "/metrics", timeout_s=SETTLE_S, tls=self.tls)
        if status != 200:
            raise AssertionError(f"{self.program}: /metrics answered {status}")
        return parse_metrics(text)

    def metric(self, name, **labels):
        """Sum of the samples of `name` whose labels include `labels`. Fails when there is none."""
        values = [v for n, have, v in self.metrics() if n == name and labels.items() <= have.items()]
        if not values:
            raise AssertionError(f"{self.program}: no metric {name}{labels}")
        return sum(values)

    def used_blocks(self):
        return self.metric("zeroc_kv_blocks", state="used")


class Stream:
    """A streamed completion. `events` grows as events() is walked; `done` tells whether [DONE] came."""

    def __init__(self, port, body, path="/v1/completions", tls=None, headers=None):
        self.connection = connect_http(port, tls=tls)
        self.connection.request("POST", path, body=json.dumps(body),
                                headers={"Content-Type": "application/json", **(headers or {})})
        self.response = self.connection.getresponse()
        self.status = self.response.status
        self.done = False

    def events(self):
        """Yields the JSON of every event up to [DONE] or the end of the stream."""
        while True:
            line = self.response.readline()
            if not line:
                self.close()
                return
            if not line.startswith(b"data:"):
                continue
            data = line[len(b"data:"):].strip()
            if data == b"[DONE]":
                self.done = True
                self.close()
                return
            yield json.loads(data)

    def close(self):
        """Cuts the connection as a client that went away does."""
        self.response.close()
        self.connection.close()


def text_of(events):
    return "".join(choice["text"] for event in events for choice in event.get("choices", []))


# The same request is the same answer every time: what was measured meanwhile, or an audit, has no part in it.
SETTLED = {"--adaptive-profiles": "false", "--audit-share": 0}


class Cluster:
    """A router, and as many workers as asked for. Flags given as router_args and so on come after the usual ones.
    `tls` (as in connect_http) is how /readyz and /metrics of all services are asked for; `prefill_env` is added to the
    prefill workers' environment.
    """

    latest = None  # the cluster made last, for ClusterTest

    def __init__(self, n_decode=1, n_prefill=1, router_args=(), decode_args=(), prefill_args=(),
                 tls=None, prefill_env=None, n_routers=1):
        Cluster.latest = self
        self.tls = tls
        self.log_dir = tempfile.TemporaryDirectory(prefix="zeroc-e2e-")  # gone with this object
        self.processes = []
        self.decode, self.prefill = [], []
        self.decode_args, self.prefill_args = decode_args, prefill_args
        self.router_args = [*(x for flag, value in SETTLED.items() if flag not in router_args for x in (flag, value)),
                            *router_args]
        self.prefill_env = prefill_env
        try:
            self.routers = [self._start("zeroc-router", ["--model", MODEL_DIR, *self.router_args])
                            for _ in range(n_routers)]
            self.router = self.routers[0]
            for _ in range(n_decode):
                self.start_decode()
            for _ in range(n_prefill):
                self.start_prefill()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _start(self, program, args, **how):
        service = Service(program, args, self.log_dir.name, **how)
        service.tls = self.tls
        self.processes.append(service)
        return service

    def _worker_args(self, args):
        """The usual flags, but for those that `args` states itself, and `args`."""
        routers = ",".join(f"127.0.0.1:{router.grpc_port}" for router in self.routers)
        usual = {"--model": MODEL_DIR, "--router": routers, "--kv-memory-mib": 64, "--threads": 1}
        return [*(x for flag, value in usual.items() if flag not in args for x in (flag, value)), *args]

    def start_decode(self, ports=None):
        self.decode.append(self._start("zeroc-decode", self._worker_args(self.decode_args), ports=ports))
        return self.decode[-1]

    def start_prefill(self, *more_args, env=None):
        self.prefill.append(self._start("zeroc-prefill", self._worker_args([*self.prefill_args, *more_args]),
                                        env=env or self.prefill_env))
        return self.prefill[-1]

    def restart_router(self):
        """A new router where the old one was, which must have ended."""
        ports = self.router.grpc_port, self.router.http_port
        self.router = self._start("zeroc-router", ["--model", MODEL_DIR, *self.router_args], ports=ports)
        self.routers[0] = self.router
        return self.router

    def wait_ready(self, timeout_s=START_S):
        for service in [*self.decode, *self.prefill, *self.routers]:
            service.wait_ready(timeout_s)

    def restart(self, service, timeout_s=EXIT_S):
        """As a rolling update: SIGTERM, drain, the same again on the same ports, and a wait until that is ready."""
        service.signal(signal.SIGTERM)
        code = service.wait_exit(timeout_s)
        if code != 0:
            raise AssertionError(f"{service.program} ended with {code}:\n{service.log()[-2000:]}")
        again = self._start(service.program, service.args, ports=(service.grpc_port, service.http_port))
        for services in (self.routers, self.decode, self.prefill):
            if service in services:
                services[services.index(service)] = again
        self.router = self.routers[0]
        again.wait_ready()
        return again

    def complete(self, prompt, expect_status=200, **fields):
        """POST /v1/completions without streaming; the parsed body. Greedy unless told otherwise."""
        body = {"model": "zeroc-demo", "prompt": prompt, "temperature": 0, **fields}
        status, _, text = http_request(self.router.http_port, "POST", "/v1/completions", body)
        if status != expect_status:
            raise AssertionError(f"/v1/completions answered {status}, not {expect_status}: {text[:1000]}")
        return json.loads(text)

    def stream(self, prompt, **fields):
        return Stream(self.router.http_port,
                      {"model": "zeroc-demo", "prompt": prompt, "temperature": 0, "stream": True, **fields})

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc, traceback):
        # SIGTERM to all before waiting for any: workers that lose their router drain at the same time.
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)
                process.popen.terminate()
        for process in self.processes:
            process.end()

    def print_logs(self):
        for process in self.processes:
            print(f"--- {process.program}, exit code {process.popen.poll()}\n{process.log()[-3000:]}")


class ClusterTest(unittest.TestCase):
    """A test that shows what the processes of its cluster said when it fails."""

    def run(self, result=None):
        if result is None:
            result = self.defaultTestResult()
        before = len(result.failures) + len(result.errors)
        super().run(result)
        if len(result.failures) + len(result.errors) > before and Cluster.latest:
            Cluster.latest.print_logs()
        return result
