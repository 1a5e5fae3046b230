#!/usr/bin/env python3
"""Dashboards and rules against the code and against a real Prometheus that scrapes a cluster under load.

Every expression of every dashboard and of every rule is evaluated: it must have data, and where something happened that
it shows, other data than zero. Needs the Debian package prometheus (promtool comes with it). Standard library only.

    observability_test.py [--render FOLDER] [unittest arguments]     --render: keep what the panels show, as JSON
"""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))

import texts  # noqa: E402
from cluster import (  # noqa: E402
    MODEL_DIR, SETTLE_S, TIME_SCALE, Cluster, ClusterTest, free_port, http_request, wait_until)
from drills import FAULTS_LIBRARY, TCP, Answer, WireFaults  # noqa: E402

DASHBOARDS = ROOT / "helm/zeroc/files/dashboards"
RULES = ROOT / "helm/zeroc/files/rules/zeroc.yaml"
LOAD_S = 12 * TIME_SCALE
# What may stay zero in all of this: expressions with these words need data, not other data than zero.
MAY_BE_ZERO = ('waiting{zeroc_cluster=~".*",zeroc_role="prefill"', "backlog", "ZerocTtft", 'phase="wire"')
# vLLM's names for what other metrics show already.
NOT_SHOWN = {"vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds",
             "vllm:request_decode_time_seconds"}
METRIC = re.compile(r"\b(?:zeroc_[a-z_]+|vllm:[a-z_]+)\b")
NO_METRIC = re.compile(r"^zeroc_(cluster|role|group)$")


def dashboard_targets():
    """(dashboard, panel, target), everywhere."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield path.stem, panel["title"], target


def dashboard_expressions():
    """(dashboard, panel, expression) of every target."""
    for dashboard, panel, target in dashboard_targets():
        yield dashboard, panel, target["expr"]


def rule_metrics():
    text = "\n".join(line for line in RULES.read_text().splitlines()
                     if not line.strip().startswith(("#", "summary", "{{", "- record")))
    return set(METRIC.findall(text))


def base(name):
    return re.sub(r"_(bucket|sum|count)$", "", name)


class NamesTest(unittest.TestCase):
    """Code, documentation, dashboards and rules speak of the same metrics."""

    @classmethod
    def setUpClass(cls):
        source = (ROOT / "services/common/metrics.cc").read_text()
        cls.in_code = set(re.findall(r'Make(?:Counter|Gauge|Histogram)\(\s*"([^"]+)"', source))
        cls.documented = set(re.findall(r"^\| `([^`]+)`", (ROOT / "docs/metrics.md").read_text(), re.M))

    def test_code_and_documentation(self):
        self.assertGreater(len(self.in_code), 20)
        self.assertEqual(sorted(self.in_code - self.documented), [], "in the code, not in docs/metrics.md")
        self.assertEqual(sorted(self.documented - self.in_code), [], "in docs/metrics.md, not in the code")

    def test_dashboards_and_rules(self):
        used = rule_metrics()
        for _, _, expression in dashboard_expressions():
            used |= set(METRIC.findall(expression))
        used = {base(name) for name in used if not NO_METRIC.match(name)}
        self.assertGreater(len(used), 20)
        self.assertEqual(sorted(used - self.in_code), [], "shown, but in no service")

    def test_every_metric_is_shown(self):
        shown = {base(name) for _, _, expression in dashboard_expressions() for name in METRIC.findall(expression)}
        self.assertEqual(sorted(self.documented - shown - NOT_SHOWN), [], "documented, on no dashboard")

    def test_the_chart_scales_by_metrics_that_exist(self):
        template = (ROOT / "helm/zeroc/templates/autoscaling.yaml").read_text()
        queries = "".join(line for line in template.splitlines() if "query:" in line)
        used = {name for name in METRIC.findall(queries) if not NO_METRIC.match(name)}
        self.assertEqual(used, {"zeroc_prefill_backlog_tokens", "vllm:kv_cache_usage_perc"})
        self.assertEqual(sorted(used - self.in_code), [])

    def test_dashboards_are_what_their_source_makes(self):
        result = subprocess.run([ROOT / "deploy/grafana/make_dashboards.py", "--check"], capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)

    def test_every_alert_has_a_runbook_and_a_test(self):
        alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
        self.assertGreater(len(alerts), 10)
        operations = (ROOT / "docs/operations.md").read_text()
        tests = (ROOT / "tests/deploy/rules_test.yaml").read_text()
        for alert in alerts:
            self.assertIn(f"### {alert}", operations, "docs/operations.md does not say what to do")
            self.assertIn(f'alertname="{alert}"', tests, "tests/deploy/rules_test.yaml does not make it fire")
            self.assertIn(f"#{alert.lower()}", RULES.read_text())


@unittest.skipUnless(shutil.which("promtool"), "SKIPPED: promtool is missing (Debian package prometheus)")
class PromtoolTest(unittest.TestCase):
    def promtool(self, *args):
        result = subprocess.run(["promtool", *map(str, args)], capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_rules_parse(self):
        self.promtool("check", "rules", RULES)

    def test_configuration_parses(self):
        self.promtool("check", "config", ROOT / "deploy/prometheus/prometheus.yaml")

    def test_alerts_fire_when_they_should(self):
        self.promtool("test", "rules", ROOT / "tests/deploy/rules_test.yaml")

    def test_dashboard_expressions_parse(self):
        """promtool parses rules: so each expression becomes one."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            rules = [{"record": f"r{i}", "expr": fill_in(expression)}
                     for i, (_, _, expression) in enumerate(dashboard_expressions())]
            json.dump({"groups": [{"name": "g", "rules": rules}]}, file)
            file.flush()
            self.promtool("check", "rules", file.name)


def fill_in(expression):
    """Grafana's variables as they are in the test."""
    return expression.replace("$cluster", ".*").replace("$__rate_interval", "30s")


class Prometheus:
    """A Prometheus that scrapes a cluster once a second."""

    def __init__(self, cluster, folder):
        self.port = free_port()
        targets = [("router", cluster.routers), ("prefill", cluster.prefill), ("decode", cluster.decode)]
        config = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [str(RULES)],
                  "scrape_configs": [{"job_name": "zeroc", "static_configs": [
                      {"targets": [f"127.0.0.1:{s.http_port}" for s in services],
                       "labels": {"zeroc_role": role, "zeroc_cluster": "test"}} for role, services in targets]}]}
        path = pathlib.Path(folder) / "prometheus.yml"
        path.write_text(json.dumps(config))
        self.log_path = pathlib.Path(folder) / "prometheus.log"
        with open(self.log_path, "wb") as log:
            self.popen = subprocess.Popen(
                ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address=127.0.0.1:{self.port}"], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self):
        wait_until(self.is_ready, SETTLE_S * 2, "Prometheus is ready")
        return self

    def __exit__(self, *exc):
        self.popen.terminate()
        try:
            self.popen.wait(SETTLE_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()

    def is_ready(self):
        if self.popen.poll() is not None:
            raise AssertionError(f"Prometheus ended:\n{self.log_path.read_text()[-2000:]}")
        try:
            return http_request(self.port, "GET", "/-/ready", timeout_s=5)[0] == 200
        except OSError:
            return False

    def get(self, path, **parameters):
        status, _, text = http_request(self.port, "GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(text)
        if status != 200 or answer["status"] != "success":
            raise AssertionError(f"{path} {parameters}: {text[:500]}")
        return answer["data"]

    def values(self, expression):
        """The values now; not a number counts as none."""
        samples = (float(sample["value"][1]) for sample in self.get("query", query=expression)["result"])
        return [value for value in samples if value == value]

    def history(self, expression, start):
        """All values since `start`, second by second."""
        data = self.get("query_range", query=expression, start=start, end=time.time(), step=1)
        values = (float(value) for series in data["result"] for _, value in series["values"])
        return [value for value in values if value == value]


@unittest.skipUnless(shutil.which("prometheus"), "SKIPPED: Prometheus is missing (Debian package prometheus)")
class LiveTest(ClusterTest):
    render = None

    @classmethod
    def setUpClass(cls):
        if not FAULTS_LIBRARY.is_file():
            raise AssertionError(f"{FAULTS_LIBRARY} is missing: deploy/build zeroc_wire_faults")
        cls.faults = WireFaults(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="zeroc-faults-")))
        cls.cluster = cls.enterClassContext(Cluster(
            n_decode=2, n_prefill=1, router_args=["--audit-share", 1, "--sp-min-tokens", 2500],
            decode_args=["--lease-expiry-ms", 1000, "--kv-memory-mib", 16, *TCP], prefill_args=TCP,
            prefill_env=cls.faults.env))
        # The second prefill worker leads a group of two; its follower is not scraped.
        follower = cls.cluster._start("zeroc-prefill", ["--model", MODEL_DIR, "--kv-memory-mib", 64, "--threads", 1,
                                                        *TCP])
        cls.cluster.start_prefill("--sp-followers", f"127.0.0.1:{follower.grpc_port}")
        cls.cluster.wait_ready()
        folder = cls.enterClassContext(tempfile.TemporaryDirectory(prefix="zeroc-prometheus-"))
        cls.prometheus = cls.enterClassContext(Prometheus(cls.cluster, folder))
        wait_until(lambda: cls.prometheus.values("count(up == 1)") == [5.0], SETTLE_S, "all services are scraped")
        cls.started = time.time()
        cls.load(LOAD_S)
        cls.ask_again()
        cls.compute_together()
        cls.hang_prefill()
        cls.corrupt_kv()
        cls.fill_decode()
        cls.lose_decode()
        cls.load(LOAD_S / 3)  # and all is well again
        wait_until(lambda: cls.prometheus.values('zeroc_ppl_increase{kind="audited"}'), SETTLE_S * 2,
                   "a request was audited")

    @classmethod
    def load(cls, seconds):
        """Requests of several kinds, two at a time."""
        until = time.monotonic() + seconds
        errors = []

        def client(number):
            n = 0
            while time.monotonic() < until or n < 12:
                n += 1
                fields = ({"profile": "bf16"}, {"max_ppl_increase": 0.5}, {})[n % 3]
                try:
                    # Each prompt twice with each of the fields: the prefix cache has it then.
                    cls.cluster.complete(texts.prose(3000, 100 * (n // 6) + 7 * number), max_tokens=16,
                                         ignore_eos=True, **fields)
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    @classmethod
    def ask_again(cls):
        """The same prompt, until the router has counted on what a worker has of it."""
        def counted_on(role):
            # More than the one token that prefill gives: decode keeps what it has received when it answers.
            cls.cluster.complete(texts.LONG, max_tokens=4, ignore_eos=True, profile="q4")
            return any(labels["role"] == role and value > 0 for name, labels, value in cls.cluster.router.metrics()
                       if name == "zeroc_policy_prefix_tokens_total")

        for role in ("prefill", "decode"):
            wait_until(lambda r=role: counted_on(r), SETTLE_S * 2, f"the choice of {role} goes by its cache")

    @classmethod
    def hang_prefill(cls):
        """A prefill worker that stands still: its lease ends by expiry, and its blocks wait in quarantine."""
        for worker in cls.cluster.prefill:
            worker.signal(signal.SIGSTOP)
        thread = threading.Thread(target=lambda: cls.cluster.stream(texts.LONG, max_tokens=4).close())
        thread.start()
        try:
            wait_until(lambda: sum(w.metric("zeroc_kv_leases_expired_total") for w in cls.cluster.decode) > 0,
                       SETTLE_S * 2, "a lease has expired")
            cls.wait_seen("zeroc_kv_leases_expired_total")
        finally:
            for worker in cls.cluster.prefill:
                worker.signal(signal.SIGCONT)
        thread.join(SETTLE_S * 3)

    @classmethod
    def fill_decode(cls):
        """More than decode has room for: some wait at the router; and answers that grow, so that some are preempted."""
        # Prometheus looks once a second, and may look away.
        wait_until(lambda: cls.ask_for_too_much() and any(cls.prometheus.history(
            "sum(vllm:num_requests_swapped)", cls.started)), SETTLE_S * 6, "requests are swapped")
        cls.wait_seen("vllm:num_preemptions_total")

    @classmethod
    def ask_for_too_much(cls):
        answers = []

        def ask(number):
            # Four prompts of 31 blocks fit into a worker's 128, with one block of each answer.
            prompt = [1000 + (number * 31 + i * 7) % 3000 for i in range(31 * 64)]
            answers.append(cls.cluster.complete(prompt, max_tokens=150, ignore_eos=True, profile="bf16"))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(14)]
        for thread in threads:
            thread.start()
        waiting = 'sum(vllm:num_requests_waiting{zeroc_role="router"})'
        wait_until(lambda: sum(cls.prometheus.values(waiting)) > 0, SETTLE_S * 2, "requests wait at the router")
        for thread in threads:
            thread.join()
        if len(answers) != len(threads):
            raise AssertionError(f"{len(answers)} of {len(threads)} requests were answered")
        return True

    @classmethod
    def compute_together(cls):
        """Long prompts on both ranks of the group."""
        starts = itertools.count(100, 100)  # prompts that no cache knows

        def ranks():
            return cls.cluster.complete(texts.prose(14000, next(starts)), max_tokens=1)["zeroc"]["sp_ranks"]

        wait_until(lambda: ranks() == 2, SETTLE_S * 2, "the group computes a long prompt")
        ranks()
        cls.wait_seen("zeroc_sp_bytes_total")

    @classmethod
    def corrupt_kv(cls):
        """A bit turns over on the wire: the block is refused."""
        starts = itertools.count(300, 100)  # prompts that no cache knows: all of them travels

        def refused():
            cls.faults.set("corrupt 1")
            Answer(cls.cluster, texts.prose(14000, next(starts)), max_tokens=4, profile="q4").join(SETTLE_S * 3)
            return any(d.metric("zeroc_kv_checksum_failures_total") for d in cls.cluster.decode)

        wait_until(refused, SETTLE_S * 3, "a block is refused")
        cls.faults.set("none")
        cls.wait_seen("zeroc_kv_checksum_failures_total")

    @classmethod
    def lose_decode(cls):
        """A decode worker dies under an answer, which goes on at the other one."""
        answers = [Answer(cls.cluster, "Once", max_tokens=1500) for _ in range(4)]
        for answer in answers:
            answer.wait_tokens(5)
        lost = wait_until(lambda: [worker for worker in cls.cluster.decode
                                   if worker.metric("vllm:num_requests_running") > 0], SETTLE_S, "decode runs them")[0]
        lost.kill()
        for answer in answers:
            answer.join(SETTLE_S * 3)
            if not answer.done:
                raise AssertionError(f"not taken over: {answer.error} {answer.broken}")
        cls.cluster.start_decode(ports=(lost.grpc_port, lost.http_port)).wait_ready()
        cls.cluster.decode.remove(lost)
        cls.wait_seen("zeroc_retries_total")
        wait_until(lambda: cls.prometheus.values("count(up == 1)") == [5.0], SETTLE_S, "it is back")

    @classmethod
    def wait_seen(cls, counter):
        """Until Prometheus has it, and long enough for a rate."""
        wait_until(lambda: sum(cls.prometheus.values(f"increase({counter}[30s])")) > 0, SETTLE_S,
                   f"Prometheus has seen {counter}")

    def check(self, what, expression):
        values = self.prometheus.history(expression, self.started)
        self.assertTrue(values, f"{what}: no data for {expression}")
        if not any(word in expression for word in MAY_BE_ZERO):
            self.assertTrue(any(value != 0 for value in values), f"{what}: nothing but zero for {expression}")

    def test_panels_have_data(self):
        n = 0
        for dashboard, panel, expression in dashboard_expressions():
            with self.subTest(dashboard=dashboard, panel=panel):
                self.check(f"{dashboard} / {panel}", fill_in(expression))
                n += 1
        print(f"{n} expressions of dashboards have data")

    def test_rules_are_evaluated_and_have_data(self):
        groups = self.prometheus.get("rules")["groups"]
        n = 0
        for rule in (rule for group in groups for rule in group["rules"]):
            with self.subTest(rule=rule["name"]):
                self.assertEqual(rule["health"], "ok", rule.get("lastError"))
                # An alert's condition is empty while all is well: what stands before its last comparison is not.
                expression = rule["query"]
                if rule["type"] == "alerting":
                    expression = re.sub(r" (==|>|<) [0-9.]+$", "", expression)
                    expression = re.sub(r' > max by \(zeroc_cluster\) \(zeroc_ppl_increase\{kind="budget"\}\)$', "",
                                        expression)
                    expression = re.sub(r" > 60 \* .*$", "", expression)
                    values = self.prometheus.values(expression)
                    # Outcomes that there were none of.
                    self.assertTrue(values or "outcome" in rule["query"], f"no data for {expression}")
                else:
                    self.check(rule["name"], expression)
                n += 1
        self.assertGreater(n, 20)
        print(f"{n} rules are evaluated")

    def test_alerts_fire_after_their_drills(self):
        for alert in ("ZerocLeasesExpire", "ZerocKvChecksumFailures"):
            firing = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
            wait_until(lambda e=firing: self.prometheus.values(e) == [1.0], SETTLE_S, f"{alert} fires")

    def test_what_scales_the_chart_has_data(self):
        self.check("prefill", 'sum(zeroc_prefill_backlog_tokens{zeroc_cluster="test"})')
        values = self.prometheus.values('max_over_time(sum(zeroc_prefill_backlog_tokens{zeroc_cluster="test"})[1m:1s])')
        self.assertGreater(values[0], 1000, "the backlog of tokens was never seen")
        self.check("decode", 'max_over_time(sum(vllm:kv_cache_usage_perc{zeroc_role="decode"})[1m:1s])')

    def test_keep_what_the_panels_show(self):
        if not LiveTest.render:
            self.skipTest("only with --render")
        folder = pathlib.Path(LiveTest.render)
        folder.mkdir(parents=True, exist_ok=True)
        for dashboard, panel, target in dashboard_targets():
            data = self.prometheus.get("query_range", query=fill_in(target["expr"]), start=self.started,
                                       end=time.time(), step=1)
            name = re.sub(r"\W+", "_", f"{dashboard}_{panel}").lower()
            with open(folder / f"{name}.jsonl", "a") as file:
                print(json.dumps({"panel": panel, "legend": target["legendFormat"], "series": data["result"]}),
                      file=file)


if __name__ == "__main__":
    if "--render" in sys.argv:
        at = sys.argv.index("--render")
        LiveTest.render = os.path.abspath(sys.argv[at + 1])
        del sys.argv[at:at + 2]
    unittest.main()
