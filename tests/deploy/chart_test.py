#!/usr/bin/env python3
"""The chart: lint, suites of helm-unittest, every values file against the schemas of several Kubernetes versions, and
its configuration files against the programs that read them. Needs build/tools (deploy/tools). Standard library only.

    chart_test.py [unittest arguments]
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
import unittest.mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))

from cluster import MODEL_DIR, Service  # noqa: E402

CHART = ROOT / "helm/zeroc"
TOOLS = ROOT / "build/tools"
BIN_DIR = pathlib.Path(os.environ.get("ZEROC_BIN_DIR", ROOT / "build/release/bin"))
VERSIONS = ("1.31", "1.34", "1.37")  # the oldest that is still patched somewhere, the usual one, the newest

# Every toggle on at once; values files are added as they are.
EVERYTHING = """
tls: {enabled: true, secretName: t, clusterKeySecretName: c}
apiKeys: {secretName: k, helmTestKeySecretName: k}
model: {source: pvc, name: m, path: /models/m}
prefill:
  groups: [{name: a, replicas: 2}, {name: b, config: {threads: 3}}]
  keda: {enabled: true}
decode: {keda: {enabled: true}}
router: {autoscaling: {enabled: true}}
monitoring:
  podMonitor: {enabled: true}
  serviceMonitor: {enabled: true}
  prometheusRule: {enabled: true}
  dashboards: {enabled: true}
networkPolicy:
  clients: [{namespaceSelector: {}}]
  monitoring: [{namespaceSelector: {matchLabels: {a: b}}}]
  dns: [{ipBlock: {cidr: 10.0.0.10/32}}]
ingress: {enabled: true, className: nginx, hosts: [{host: llm.test}]}
gateway: {enabled: true, parentRefs: [{name: gw}], hostnames: [llm.test], grpc: true}
calibration: {enabled: true, text: ["/models/a.txt@0:80"], heldout: "/models/a.txt@80:100"}
gpu: {enabled: true}
rdma: {enabled: true}
"""


# Prefill groups of several ranks, which no StatefulSet makes.
RANKS = """
prefill: {kind: LeaderWorkerSet, groups: [{name: a}, {name: g, replicas: 2, ranks: 3}]}
router: {config: {sp_min_tokens: 2048}}
"""


def run(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT)


def helm(*args):
    return run(TOOLS / "bin/helm", *args)


class ChartTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="zeroc-chart-")))
        (cls.dir / "everything.yaml").write_text(EVERYTHING)
        (cls.dir / "ranks.yaml").write_text(RANKS)
        (cls.dir / "none.yaml").write_text("{}\n")
        cls.values = [cls.dir / "none.yaml", *sorted(CHART.glob("values-*.yaml")), cls.dir / "everything.yaml"]

    def template(self, values, *more):
        result = helm("template", "r", CHART, "--namespace", "ns", "--values", values, *more)
        self.assertEqual(result.returncode, 0, f"{values.name}: {result.stderr}")
        return result.stdout

    def test_lint(self):
        self.assertGreaterEqual(len(self.values), 4)
        for values in self.values:
            result = helm("lint", "--strict", CHART, "--values", values)
            self.assertEqual(result.returncode, 0, f"{values.name}: {result.stdout}{result.stderr}")

    def test_suites(self):
        # --strict: an assertion on something that is not there fails too.
        result = run(TOOLS / "bin/helm-unittest", "--strict", CHART)
        print(result.stdout[-400:])
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_every_template_has_a_suite(self):
        suites = "".join(path.read_text() for path in (CHART / "tests").glob("*_test.yaml"))
        for path in (CHART / "templates").rglob("*.yaml"):
            name = str(path.relative_to(CHART / "templates"))
            self.assertIn(name, suites, f"no suite of helm-unittest names {name}")

    def test_objects_match_the_schemas_of_kubernetes(self):
        for version in VERSIONS:
            files = []
            for values in self.values:
                for kind in ("StatefulSet", "LeaderWorkerSet"):
                    rendered = self.dir / f"{values.stem}-{kind}-{version}.yaml"
                    rendered.write_text(self.template(values, "--kube-version", version, "--set",
                                                      f"prefill.kind={kind}"))
                    files.append(rendered)
            rendered = self.dir / f"ranks-{version}.yaml"
            rendered.write_text(self.template(self.dir / "ranks.yaml", "--kube-version", version))
            files.append(rendered)
            result = run(TOOLS / "venv/bin/python", ROOT / "tests/deploy/kube_schema.py", "--crds", TOOLS / "crds",
                         "--version", version, *files)
            print(result.stdout.splitlines()[-1] if result.stdout else result.stderr)
            self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_the_validator_refuses_what_is_wrong(self):
        good = self.template(self.dir / "everything.yaml")
        for wrong, right in (("terminationGracePeriodSeconds:", "terminationGraceSeconds:"),
                             ("minReplicaCount:", "minReplicas:"), ("clusterIP: None", "clusterIP: [1]")):
            self.assertIn(wrong, good)
            bad = self.dir / "bad.yaml"
            bad.write_text(good.replace(wrong, right, 1))
            result = run(TOOLS / "venv/bin/python", ROOT / "tests/deploy/kube_schema.py", "--crds", TOOLS / "crds",
                         "--version", VERSIONS[1], bad)
            self.assertEqual(result.returncode, 1, f"{wrong}: {result.stdout}{result.stderr}")

    def test_programs_take_the_configuration(self):
        """--help after --config reads the file first: an unknown key or a value out of range is exit code 2."""
        n = 0
        for values in self.values:
            rendered = self.template(values)
            for role, text in re.findall(r"^  (router|prefill|decode)\.yaml: \|\n((?:    .*\n)+)", rendered, re.M):
                path = self.dir / f"{role}.yaml"
                path.write_text(re.sub(r"(?m)^    ", "", text))
                result = run(BIN_DIR / f"zeroc-{role}", "--config", path, "--help")
                self.assertEqual(result.returncode, 0, f"{values.name}: {result.stderr}")
                n += 1
        self.assertGreaterEqual(n, 3 * len(self.values))
        path.write_text(path.read_text() + "no_such_setting: 1\n")
        self.assertEqual(run(BIN_DIR / f"zeroc-{role}", "--config", path, "--help").returncode, 2)

    def test_flags_of_the_test_pod_and_the_calibration_are_the_tools(self):
        rendered = self.template(self.dir / "everything.yaml")
        for command in ("request", "calibrate"):
            usage = run(BIN_DIR / "zeroc", command, "--help").stdout
            args = re.search(rf"^( +)- {command}\n((?:\1- --.*\n)+)", rendered, re.M)
            self.assertTrue(args, f"no arguments of zeroc {command}")
            for flag in re.findall(r"- (--[a-z-]+)", args.group(2)):
                self.assertIn(flag, usage)

    def test_prefill_groups_are_made_of_what_the_programs_know(self):
        rendered = self.template(self.dir / "ranks.yaml")
        for flag in re.findall(r"- (--[a-z-]+)=\$\(POD_NAME\)", rendered):
            self.assertIn(flag, run(BIN_DIR / "zeroc-prefill", "--help").stdout)
        self.assertIn("--sp-followers=$(POD_NAME)-1.", rendered)
        texts = re.findall(r"^  (follower|router)\.yaml: \|\n((?:    .*\n)+)", rendered, re.M)
        self.assertEqual(len(texts), 2)
        for name, text in texts:
            path = self.dir / f"ranks-{name}.yaml"
            path.write_text(re.sub(r"(?m)^    ", "", text))
            program = {"follower": "zeroc-prefill", "router": "zeroc-router"}[name]
            result = run(BIN_DIR / program, "--config", path, "--help")
            self.assertEqual(result.returncode, 0, result.stderr)

    def test_no_default_port_or_grace_is_lost_between_chart_and_programs(self):
        rendered = self.template(self.dir / "none.yaml")
        graces = [int(s) for s in re.findall(r"terminationGracePeriodSeconds: (\d+)", rendered)]
        drains = [int(ms) for ms in re.findall(r"drain_timeout_ms: (\d+)", rendered)]
        self.assertEqual(len(graces), 3)
        self.assertEqual(len(drains), 3)
        for drain in drains:
            self.assertTrue(any(grace * 1000 > drain for grace in graces))
        self.assertGreater(min(graces) * 1000, min(drains))

    def test_ucx_stays_on_the_ports_that_the_network_policy_opens(self):
        rendered = self.template(self.dir / "none.yaml")
        first, last = map(int, re.search(r'UCX_TCP_PORT_RANGE, value: "(\d+)-(\d+)"', rendered).groups())
        self.assertIn(f"endPort: {last}\n          port: {first}\n", rendered)
        with unittest.mock.patch.dict(os.environ, UCX_TCP_PORT_RANGE=f"{first}-{last}"):
            worker = Service("zeroc-decode", ["--model", MODEL_DIR, "--kv-memory-mib", 16, "--threads", 1,
                                              "--transport-tls", "tcp,self,sm"], self.dir)
        try:
            worker.wait_ready()
            ports = listening_ports(worker.popen.pid) - {worker.grpc_port, worker.http_port}
        finally:
            worker.end()
        self.assertTrue(ports, "UCX listens on no TCP port")
        self.assertTrue(all(first <= port <= last for port in ports), ports)


    @unittest.skipIf(any(pathlib.Path("/sys/class/infiniband").glob("*")), "SKIPPED: this machine has an RDMA device")
    def test_without_rdma_its_profile_ends_at_the_start(self):
        rendered = self.template(CHART / "values-gpu-rdma.yaml")
        tls, = set(re.findall(r'transport_tls: "(.+)"', rendered))
        result = run(BIN_DIR / "zeroc-decode", "--model", MODEL_DIR, "--transport-tls", tls, "--grpc-listen",
                     "127.0.0.1:0", "--http-listen", "127.0.0.1:0")
        self.assertEqual(result.returncode, 1)
        self.assertIn("ucx: no transport", result.stdout + result.stderr)


class ComposeTest(unittest.TestCase):
    @staticmethod
    def docker_reads(path):
        """The reader of docker compose: its schema, and what paths and merges come to."""
        return subprocess.run([TOOLS / "bin/compose-config", "-format", "json", path], capture_output=True, text=True,
                              timeout=60, cwd=ROOT / "deploy")

    def test_docker_takes_it(self):
        result = self.docker_reads(ROOT / "deploy/compose.yaml")
        self.assertEqual(result.returncode, 0, result.stderr)
        services = json.loads(result.stdout)["services"]
        self.assertEqual(set(services), set(self.compose["services"]))
        for name, service in services.items():
            self.assertEqual(service.get("read_only", False), "build" in service, name)  # the merges worked
            self.assertLessEqual(set(service.get("depends_on", {})), set(services), name)
            for volume in service["volumes"]:
                self.assertTrue(pathlib.Path(volume["source"]).exists(), volume)

    def test_docker_refuses_what_is_wrong(self):
        good = (ROOT / "deploy/compose.yaml").read_text()
        for right, wrong in (("cap_drop:", "cap_drops:"), ("shm_size: 256m", "shm_size: [256m]")):
            self.assertIn(right, good)
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                file.write(good.replace(right, wrong))
                file.flush()
                self.assertNotEqual(self.docker_reads(file.name).returncode, 0, wrong)

    @classmethod
    def setUpClass(cls):
        dump = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))"
        cls.compose, cls.prometheus = (
            json.loads(run(TOOLS / "venv/bin/python", "-c", dump, ROOT / "deploy" / name).stdout)
            for name in ("compose.yaml", "prometheus/prometheus.yaml"))

    def test_programs_take_their_files_and_flags(self):
        dockerfile = (ROOT / "deploy/docker/Dockerfile").read_text()
        n = 0
        for service in self.compose["services"].values():
            for volume in service.get("volumes", []):
                self.assertTrue((ROOT / "deploy" / volume.split(":")[0]).exists(), volume)
            if "build" not in service:
                continue
            role = service["build"]["target"]
            self.assertIn(f"AS {role}\n", dockerfile)
            source, inside = service["volumes"][0].split(":")[:2]
            command = service.get("command") or json.loads(re.search(rf'CMD (\[.*{role}.yaml"\])', dockerfile).group(1))
            self.assertIn(inside, command)
            args = [str(ROOT / "deploy" / source) if arg == inside else arg for arg in command]
            result = run(BIN_DIR / f"zeroc-{role}", *args, "--help")
            self.assertEqual(result.returncode, 0, result.stderr)
            n += 1
        self.assertEqual(n, 5)

    def test_images_have_the_libraries_of_the_programs(self):
        dockerfile = (ROOT / "deploy/docker/Dockerfile").read_text()
        listed = set(re.findall(r"lib[a-z0-9.+-]+", dockerfile.split("AS base")[1].split("rm -rf")[0]))
        listed |= {"libc6", "libgcc-s1", "libstdc++6"}  # in every Debian
        names = {}  # library -> what its file may be called; those of /usr/lib are known by their old names in /lib too
        for program in ("zeroc", "zeroc-router", "zeroc-prefill", "zeroc-decode"):
            where = dict(re.findall(r"(\S+) => (\S+)", run("ldd", BIN_DIR / program).stdout))
            for library in re.findall(r"NEEDED.*\[(lib.+)\]", run("readelf", "-d", BIN_DIR / program).stdout):
                path = pathlib.Path(where[library])
                names[library] = {str(path), str(path.resolve()), str(path.resolve()).removeprefix("/usr")}
        self.assertGreater(len(names), 10)
        owners = [line.split(": ") for line in run("dpkg", "-S", *set().union(*names.values())).stdout.splitlines()]
        for library, files in names.items():
            packages = {package.split(":")[0] for package, file in owners if file in files}
            self.assertTrue(packages & listed, f"{library} of {packages or 'no package'} is not in the Dockerfile")

    def test_prometheus_looks_for_names_that_there_are(self):
        names = set(self.compose["services"])
        for service in self.compose["services"].values():
            names |= set((service.get("networks") or {}).get("default", {}).get("aliases", []))
        for name in self.prometheus["scrape_configs"][0]["dns_sd_configs"][0]["names"]:
            self.assertIn(name, names)


def listening_ports(pid):
    """TCP ports on which the process listens."""
    inodes = set()
    for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd))
        if match:
            inodes.add(match.group(1))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports


if __name__ == "__main__":
    unittest.main()
