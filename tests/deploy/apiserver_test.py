#!/usr/bin/env python3
"""The chart against a real API server: helm installs, upgrades, rolls back and uninstalls every values file. The server
validates, defaults and admits each object, with the definitions of custom resources that their projects publish, and
every pod that a template would make is admitted under Pod Security `restricted`. No kubelet: nothing runs.

Needs build/tools with a server (deploy/tools --apiserver). Standard library only.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))
sys.path.insert(0, str(ROOT / "tests/deploy"))

from chart_test import CHART, EVERYTHING, RANKS, TOOLS  # noqa: E402
from cluster import free_port, wait_until  # noqa: E402
from kube_objects import pod_templates  # noqa: E402
from kube_server import KubeServer  # noqa: E402

RELEASE = "r"
# The one thing that `restricted` does not allow; a runtime that lets containers lock memory does not need it.
NO_LOCK = ("--set", "rdma.ipcLock=false")
CUSTOM = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "GRPCRoute"}


class ServerTest(unittest.TestCase):
    """One server for the tests of a class; each test works in namespaces of its own."""

    definitions = False

    @classmethod
    def setUpClass(cls):
        if cls is ServerTest:
            raise unittest.SkipTest("only what its subclasses share")
        cls.server = cls.enterClassContext(KubeServer(TOOLS / "bin", free_port))
        cls.dir = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="zeroc-helm-")))
        (cls.dir / "none.yaml").write_text("{}\n")
        (cls.dir / "everything.yaml").write_text(EVERYTHING)
        (cls.dir / "ranks.yaml").write_text(RANKS)
        cls.values = {path.stem: path for path in (cls.dir / "none.yaml", *sorted(CHART.glob("values-*.yaml")),
                                                   cls.dir / "everything.yaml")}
        if cls.definitions:
            cls.define_custom_resources()
        cls.collections = list(cls.server.collections())
        print(f"Kubernetes {cls.server.get('/version')['gitVersion']}: {len(cls.collections)} kinds")

    @classmethod
    def define_custom_resources(cls):
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        files = sorted((TOOLS / "crds").glob("*.yaml"))
        for file in files:
            cls.server.create(path, file.read_text(), "application/yaml")

        def established():
            return [item for item in cls.server.get(path)["items"]
                    for condition in item["status"].get("conditions") or ()
                    if condition["type"] == "Established" and condition["status"] == "True"]

        wait_until(lambda: len(established()) == len(files), 60, "the definitions are established")
        groups = {item["spec"]["group"] for item in established()}
        wait_until(lambda: groups <= {group["name"] for group in cls.server.get("/apis")["groups"]}, 60,
                   "their groups are served")
        for collection in cls.server.collections():
            collection = collection.format("default")
            wait_until(lambda c=collection: cls.server.request("GET", c)[0] == 200, 60, f"{collection} is served")

    def namespace(self, name, level="restricted"):
        labels = {f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "warn")}
        self.server.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        return name

    def helm(self, *args):
        env = {**os.environ, "KUBECONFIG": str(self.server.kubeconfig), "HOME": str(self.dir), "no_proxy": "127.0.0.1"}
        return subprocess.run([TOOLS / "bin/helm", *map(str, args)], capture_output=True, text=True, timeout=300,
                              env=env)

    def helm_ok(self, *args):
        """Succeeds, and the server had nothing to warn of: no unknown field, no old version, no pod it would refuse."""
        result = self.helm(*args)
        self.assertEqual(result.returncode, 0, f"{args}: {result.stderr}")
        self.assertEqual(result.stderr, "", args)
        return result.stdout

    def objects(self, namespace):
        """Everything in the namespace but what helm remembers."""
        for path in self.collections:
            path = path.format(namespace)
            for item in self.server.get(path)["items"]:
                if item.get("type") != "helm.sh/release.v1":
                    yield path, item

    def generations(self, namespace):
        return {(path, item["metadata"]["name"]): item["metadata"].get("generation")
                for path, item in self.objects(namespace)}

    def admit(self, namespace, template):
        """(status, message) of making a pod of the template, which is not kept."""
        metadata = {key: template.get("metadata", {}).get(key, {}) for key in ("labels", "annotations")}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**metadata, "generateName": "p-"},
               "spec": template["spec"]}
        path = f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict"
        status, answer, warnings = self.server.request("POST", path, pod)
        return status, answer.get("message", "") + "".join(warnings)

    def templates(self, namespace):
        return [template for _, item in self.objects(namespace) for template in pod_templates(item.get("spec", {}))]

    def admitted(self, namespace):
        """How many pods the release's templates would make; all are admitted."""
        templates = self.templates(namespace)
        for template in templates:
            self.assertEqual(self.admit(namespace, template), (201, ""), template["metadata"])
        hook = self.helm_ok("get", "hooks", RELEASE, "--namespace", namespace)
        path = f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict"
        self.server.create(path, hook, "application/yaml")
        return len(templates) + 1

    def life(self, namespace, values, *more):
        """Installs, upgrades to the same, uninstalls. Returns the kinds that the server stored."""
        where = ("--namespace", namespace, "--values", values, *more)
        self.helm_ok("install", RELEASE, CHART, *where)
        stored = self.generations(namespace)
        kinds = {item["kind"] for path, item in self.typed(namespace)}
        n_pods = self.admitted(namespace)
        self.assertGreaterEqual(n_pods, 4)  # router, prefill, decode, helm test
        self.helm_ok("upgrade", RELEASE, CHART, *where)
        self.assertEqual(self.generations(namespace), stored, "an upgrade that changes nothing touched something")
        self.helm_ok("uninstall", RELEASE, "--namespace", namespace)
        left = [path.rsplit("/", 1)[1] for path, _ in self.objects(namespace)]
        # A model is kept (helm.sh/resource-policy).
        self.assertEqual(left, ["persistentvolumeclaims"] * ("PersistentVolumeClaim" in kinds))
        print(f"{namespace}: {len(stored)} objects of {len(kinds)} kinds, {n_pods} pods admitted")
        return kinds

    def typed(self, namespace):
        for path, item in self.objects(namespace):
            yield path, {"kind": self.server.kinds[path.split("/namespaces/")[0], path.rsplit("/", 1)[1]], **item}


class BareTest(ServerTest):
    """A cluster without the custom resources that the chart knows."""

    def test_runs_without_them(self):
        for name in ("none", "values-cpu"):
            kinds = self.life(self.namespace(f"bare-{name}"), self.values[name])
            self.assertLessEqual({"Deployment", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"}, kinds)

    def test_says_which_are_missing_and_leaves_nothing(self):
        for name in ("values-gpu-rdma", "everything"):
            namespace = self.namespace(f"bare-{name}")
            result = self.helm("install", RELEASE, CHART, "--namespace", namespace, "--values", self.values[name],
                               *NO_LOCK)
            self.assertNotEqual(result.returncode, 0)
            for word in ("ScaledObject", "PodMonitor", "ensure CRDs are installed first"):
                self.assertIn(word, result.stderr)
            self.assertEqual(list(self.objects(namespace)), [])


class DefinedTest(ServerTest):
    """A cluster with all of them."""

    definitions = True

    def test_every_values_file(self):
        kinds = set()
        for name, values in self.values.items():
            for kind in ("LeaderWorkerSet", "StatefulSet"):
                namespace = self.namespace(f"{name}-{kind}".lower())
                # auto: the chart finds the definition itself.
                choice = "auto" if kind == "LeaderWorkerSet" else kind
                found = self.life(namespace, values, "--set", f"prefill.kind={choice}", *NO_LOCK)
                self.assertEqual("LeaderWorkerSet" in found, kind == "LeaderWorkerSet")
                kinds |= found
        self.life(self.namespace("ranks"), self.dir / "ranks.yaml")
        self.assertLessEqual(CUSTOM | {"Job", "Ingress", "HorizontalPodAutoscaler"}, kinds)

    def test_upgrades_from_one_to_the_next_and_back(self):
        for kind in ("LeaderWorkerSet", "StatefulSet"):
            namespace = self.namespace(f"upgrade-{kind}".lower())
            more = ("--namespace", namespace, "--set", f"prefill.kind={kind}", *NO_LOCK)
            order = list(self.values)
            self.helm_ok("install", RELEASE, CHART, "--values", self.values[order[0]], *more)
            first = set(self.generations(namespace))
            for name in [*order[1:], *reversed(order[:-1])]:
                self.helm_ok("upgrade", RELEASE, CHART, "--values", self.values[name], *more)
                self.admitted(namespace)
            kept = {key for key in self.generations(namespace) if key[0].endswith("persistentvolumeclaims")}
            self.assertEqual(set(self.generations(namespace)) - kept, first)
            self.helm_ok("rollback", RELEASE, order.index("values-gpu-rdma") + 1, "--namespace", namespace)
            self.assertGreater(len(self.generations(namespace)), len(first))
            # The claim that was kept is the release's again; `helm rollback` would refuse that.
            self.helm_ok("upgrade", RELEASE, CHART, "--values", self.values["everything"], *more)
            self.assertLessEqual(kept, set(self.generations(namespace)))
            self.helm_ok("uninstall", RELEASE, "--namespace", namespace)
            print(f"{namespace}: upgraded {2 * len(order) - 1} times and rolled back")

    def test_what_scales_can_be_scaled(self):
        """HPA and KEDA go through the scale subresource of what they name."""
        namespace = self.namespace("scales")
        self.helm_ok("install", RELEASE, CHART, "--namespace", namespace, "--values", self.values["everything"],
                     *NO_LOCK)
        n = 0
        for path, item in self.typed(namespace):
            target = item.get("spec", {}).get("scaleTargetRef")
            if target:
                prefix = f"/apis/{target['apiVersion']}"
                plural = next(name for (where, name), kind in self.server.kinds.items()
                              if (where, kind) == (prefix, target["kind"]))
                scale = self.server.get(f"{prefix}/namespaces/{namespace}/{plural}/{target['name']}/scale")
                self.assertIn("replicas", scale["spec"])
                n += 1
        self.assertEqual(n, 4)  # router, two groups of prefill, decode

    def test_locked_memory_is_what_restricted_refuses(self):
        restricted, privileged = self.namespace("lock-restricted"), self.namespace("lock-privileged", "privileged")
        values = self.values["values-gpu-rdma"]
        self.helm_ok("install", RELEASE, CHART, "--namespace", privileged, "--values", values)
        self.admitted(privileged)
        result = self.helm("install", RELEASE, CHART, "--namespace", restricted, "--values", values)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("would violate PodSecurity", result.stderr)
        refused = [message for status, message in (self.admit(restricted, template) for template in
                                                   self.templates(restricted)) if status == 403]
        self.assertEqual(len(refused), 2, refused)  # the workers
        for message in refused:
            self.assertRegex(message, r'violates PodSecurity "restricted:latest": unrestricted capabilities '
                                      r'\(container "\w+" must not include "IPC_LOCK" in '
                                      r'securityContext.capabilities.add\)$')

    def test_the_server_refuses_what_is_wrong(self):
        """So that the tests above can fail."""
        namespace = self.namespace("wrong")
        where = ("--namespace", namespace)
        result = self.helm("install", "a", CHART, *where, "--set", "router.nodeSelector.pool=not a label")
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("Invalid value", result.stderr)
        unknown = json.dumps([{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"},
                               "spec": {"ports": [{"port": 1}], "noSuchField": 1}}])
        result = self.helm("install", "b", CHART, *where, "--set-json", f"extraObjects={unknown}")
        self.assertRegex(result.stderr, r'Warning: unknown field \W+spec.noSuchField')
        root = json.dumps({"runAsUser": 0, "runAsNonRoot": False})
        result = self.helm("install", RELEASE, CHART, *where, "--set-json", f"podSecurityContext={root}")
        self.assertIn("would violate PodSecurity", result.stderr)
        pods = [template for template in self.templates(namespace)
                if template["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE]
        self.assertEqual([self.admit(namespace, template)[0] for template in pods], [403] * 3)


if __name__ == "__main__":
    unittest.main()
