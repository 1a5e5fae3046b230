"""A Kubernetes API server and its etcd on loopback, with certificates that openssl makes for them: no kubelet, no
controllers, so objects are admitted, defaulted, validated and stored, and nothing runs. Standard library only.

    with KubeServer("build/tools/bin") as server:
        server.request("POST", "/api/v1/namespaces", {...})
        helm --kubeconfig server.kubeconfig

Not thread-safe. Leaving the `with` block ends both processes and removes what they wrote.
"""

import http.client
import json
import pathlib
import signal
import ssl
import subprocess
import tempfile
import time

START_S = 120  # an API server writes its roles and priority classes before it is ready
EXIT_S = 20
EC_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


class KubeServer:
    def __init__(self, programs, free_port):
        self.folder_owner = tempfile.TemporaryDirectory(prefix="zeroc-kube-")
        self.folder = pathlib.Path(self.folder_owner.name)
        self.programs = pathlib.Path(programs)
        self.port, self.etcd_port, self.etcd_peer_port = free_port(), free_port(), free_port()
        self.processes = []
        self.kinds = {}  # (prefix of the group and version, plural name) -> kind
        self.kubeconfig = self.folder / "kubeconfig.json"

    def __enter__(self):
        try:
            self._make_certificates()
            self._start_etcd()
            self._start_apiserver()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes = []
        self.folder_owner.cleanup()

    def request(self, method, path, body=None, content_type="application/json"):
        """(status, decoded JSON or text, warnings). `body`: text as it is, or an object that is sent as JSON."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.tls)
        try:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode() if body is not None else None
            connection.request(method, path, data, {"Content-Type": content_type, "Accept": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            is_json = "json" in response.headers.get("Content-Type", "")
            return response.status, json.loads(text) if is_json else text, response.headers.get_all("Warning") or []
        finally:
            connection.close()

    def get(self, path):
        status, value, _ = self.request("GET", path)
        if status != 200:
            raise AssertionError(f"GET {path}: {status} {value}")
        return value

    def create(self, path, body, content_type="application/json"):
        status, value, _ = self.request("POST", path, body, content_type)
        if status != 201:
            raise AssertionError(f"POST {path}: {status} {value}")
        return value

    def collections(self):
        """Paths of everything namespaced that can be listed, with {} for the namespace; `kinds` says what they hold."""
        versions = ["/api/v1"]
        versions += [f"/apis/{group['preferredVersion']['groupVersion']}" for group in self.get("/apis")["groups"]]
        for prefix in versions:
            for resource in self.get(prefix)["resources"]:
                if resource["namespaced"] and "list" in resource["verbs"]:
                    self.kinds[prefix, resource["name"]] = resource["kind"]
                    yield f"{prefix}/namespaces/{{}}/{resource['name']}"

    def _openssl(self, *args):
        subprocess.run(["openssl", *args], cwd=self.folder, check=True, capture_output=True, timeout=60)

    def _make_certificates(self):
        self._openssl("req", "-x509", *EC_KEY, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
        (self.folder / "names").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
        # The group system:masters may do everything.
        for name, subject in (("server", "/CN=server"), ("admin", "/O=system:masters/CN=admin")):
            self._openssl("req", *EC_KEY, "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr")
            self._openssl("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                          "-CAcreateserial", "-extfile", "names", "-out", f"{name}.pem")
        self.tls = ssl.create_default_context(cafile=self.folder / "ca.pem")
        self.tls.load_cert_chain(self.folder / "admin.pem", self.folder / "admin.key")
        cluster = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.folder / "ca.pem")}
        user = {"client-certificate": str(self.folder / "admin.pem"), "client-key": str(self.folder / "admin.key")}
        self.kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}], "users": [{"name": "admin", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}]}))
        self.kubeconfig.chmod(0o600)

    def _start(self, program, *args):
        with open(self.folder / f"{program}.log", "wb") as log:
            self.processes.append(subprocess.Popen(
                [self.programs / program, *map(str, args)], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True))

    def _wait_ready(self, program, is_ready):
        deadline = time.monotonic() + START_S
        while True:
            try:
                if is_ready():
                    return
            except OSError:
                pass
            ended = self.processes[-1].poll() is not None
            if ended or time.monotonic() > deadline:
                log = (self.folder / f"{program}.log").read_text(errors="replace")
                raise AssertionError(f"{program} {'ended' if ended else 'is not ready'}:\n{log[-3000:]}")
            time.sleep(0.1)

    def _start_etcd(self):
        url, peer = f"https://127.0.0.1:{self.etcd_port}", f"https://127.0.0.1:{self.etcd_peer_port}"
        files = ("--cert-file=server.pem", "--key-file=server.key", "--trusted-ca-file=ca.pem", "--client-cert-auth",
                 "--peer-cert-file=server.pem", "--peer-key-file=server.key", "--peer-trusted-ca-file=ca.pem",
                 "--peer-client-cert-auth")
        # Nothing is kept: what a crash of this machine would lose needs no fsync.
        self._start("etcd", "--name=test", "--data-dir=etcd", "--unsafe-no-fsync", *files,
                    f"--listen-client-urls={url}", f"--advertise-client-urls={url}", f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=test={peer}")

        def is_ready():
            connection = http.client.HTTPSConnection("127.0.0.1", self.etcd_port, timeout=5, context=self.tls)
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            finally:
                connection.close()

        self._wait_ready("etcd", is_ready)

    def _start_apiserver(self):
        self._start(
            "kube-apiserver", "--bind-address=127.0.0.1", f"--secure-port={self.port}", "--cert-dir=.",
            "--tls-cert-file=server.pem", "--tls-private-key-file=server.key", "--client-ca-file=ca.pem",
            f"--etcd-servers=https://127.0.0.1:{self.etcd_port}", "--etcd-cafile=ca.pem", "--etcd-certfile=server.pem",
            "--etcd-keyfile=server.key", "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-key-file=server.pem", "--service-account-signing-key-file=server.key",
            "--authorization-mode=RBAC", "--anonymous-auth=false", "--service-cluster-ip-range=10.96.0.0/16",
            "--endpoint-reconciler-type=none")  # the default one demands an address that is no loopback
        self._wait_ready("kube-apiserver", lambda: self.request("GET", "/readyz")[0] == 200 and
                         self.request("GET", "/api/v1/namespaces/default")[0] == 200)
