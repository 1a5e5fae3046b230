#!/usr/bin/env python3
"""The images: built from deploy/docker/Dockerfile with buildah, run with podman as deploy/compose.yaml runs them, and a
request streamed through them. The programs are those of build/release/bin; the base is a Debian 12 from debootstrap.

Needs root and the Debian packages buildah, podman, runc and debootstrap; says so and is skipped otherwise. Containers,
their network and their logs are gone afterwards; the images stay as a cache. Standard library only.
"""

import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))

from cluster import TIME_SCALE  # noqa: E402

BASE = "debian:bookworm-slim"  # the name in the Dockerfile
ROLES = ("router", "prefill", "decode")
TOOLS = ("buildah", "podman", "runc", "debootstrap")
MISSING = [tool for tool in TOOLS if not shutil.which(tool)] + (["root"] if os.geteuid() != 0 else [])
SIZE_MAX = 400 << 20
NETWORK = "zeroc-images-test"
SUBNET = "10.231.77"
# Where the hard limit cannot be raised, the runtime's own wish for more files fails.
LIMIT = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 16)
ULIMITS = ["--ulimit", f"nofile={LIMIT}:{LIMIT}", "--ulimit", "nproc=4096:4096"]


def run(*command, timeout=600, **kwargs):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout * TIME_SCALE,
                            **kwargs)
    if result.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: {result.returncode}\n{result.stdout[-2000:]}"
                             f"{result.stderr[-3000:]}")
    return result.stdout


def apt_mirror():
    """The first mirror of this machine's own sources."""
    for path in [*pathlib.Path("/etc/apt/sources.list.d").glob("*"), pathlib.Path("/etc/apt/sources.list")]:
        if path.is_file():
            found = re.search(r"^(?:URIs:\s*|deb\s+(?:\[.*?\]\s+)?)(https?://\S+)", path.read_text(), re.M)
            if found:
                return found.group(1)
    raise AssertionError("no mirror in this machine's apt sources")


def import_base():
    if subprocess.run(["podman", "image", "exists", BASE]).returncode == 0:
        return
    with tempfile.TemporaryDirectory(prefix="zeroc-base-", dir="/var/tmp") as folder:
        root = pathlib.Path(folder) / "root"
        run("debootstrap", "--variant=minbase", "bookworm", root, apt_mirror())
        # The machine's own sources and apt settings, as it needs them to reach its mirror.
        for path in pathlib.Path("/etc/apt").glob("sources.list*"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, root / "etc/apt" / path.name, **(
                {"dirs_exist_ok": True} if path.is_dir() else {}))
        for path in pathlib.Path("/etc/apt/apt.conf.d").iterdir():
            if path.is_file() and "Acquire" in path.read_text(errors="replace"):
                shutil.copy(path, root / "etc/apt/apt.conf.d")
        pack = 'tar -C "$0" --exclude="./var/cache/apt/archives/*.deb" -c . | podman import - "$1"'
        run("bash", "-c", pack, root, BASE)


def build(role, tag, *more):
    run("buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers", "--force-rm", "--timestamp", "0",
        "--build-arg", f"BASE={BASE}", "--build-arg", "PROGRAMS=prebuilt", "--target", role, "--tag", tag, *ULIMITS,
        *more, "--file", ROOT / "deploy/docker/Dockerfile", ROOT, timeout=1800)


def inspect(tag):
    return json.loads(run("podman", "image", "inspect", tag))[0]


@unittest.skipIf(MISSING, f"SKIPPED: images need {', '.join(MISSING)}")
class ImagesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        import_base()
        for role in ROLES:
            build(role, f"zeroc-{role}:test")

    def test_small_and_not_root(self):
        for role in ROLES:
            image = inspect(f"zeroc-{role}:test")
            self.assertEqual(image["Config"]["User"], "10001:10001")
            self.assertEqual(image["Config"]["Entrypoint"], [f"/usr/bin/zeroc-{role}"])
            print(f"{role}: {image['Size'] >> 20} MiB")
            self.assertLess(image["Size"], SIZE_MAX)

    def test_built_again_it_is_the_same(self):
        build("decode", "zeroc-decode:again", "--no-cache")
        self.assertEqual(inspect("zeroc-decode:again")["RootFS"], inspect("zeroc-decode:test")["RootFS"])

    def test_cuda_is_compiled(self):
        """The target `cuda`, as far as it goes without a GPU: NVIDIA's compiler is installed and takes all kernels, and
        their tests start and say that there is none."""
        # The authorities that this machine trusts, for the registry that it reaches.
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory(prefix="zeroc-pip-")))
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", folder / "ca.crt")
        (folder / "pip.conf").write_text("[global]\ncert = /opt/pip/ca.crt\n")
        build("cuda", "zeroc-cuda:test", "--volume", f"{folder}:/opt/pip:ro", "--volume",
              f"{folder}/pip.conf:/etc/pip.conf:ro")
        result = subprocess.run(["podman", "run", "--rm", *self.flags(), "--network", "none", "zeroc-cuda:test"],
                                capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, 77, result.stdout + result.stderr)

    def test_every_program_finds_its_libraries(self):
        for role in ROLES:
            self.start(role, "--help", wait=True)

    def test_a_request_through_containers(self):
        self.addCleanup(run, "podman", "network", "rm", "--force", NETWORK)
        run("podman", "network", "create", "--subnet", f"{SUBNET}.0/24", NETWORK)
        address = {"router": f"{SUBNET}.10", "prefill": f"{SUBNET}.11", "decode": f"{SUBNET}.12"}
        names = {}
        for role in ROLES:
            more = [] if role == "router" else ["--name", role, "--advertise", address[role]]
            names[role] = self.start(role, "--config", f"/etc/zeroc/config/{role}.yaml", *more, address=address)
        deadline = time.monotonic() + 120 * TIME_SCALE
        while True:
            result = subprocess.run(
                ["podman", "run", "--rm", *self.flags(), "--network", NETWORK, "--entrypoint", "/usr/bin/zeroc",
                 "zeroc-prefill:test", "request", "--router", f"{address['router']}:9000", "--prompt",
                 "Everyone is permitted to", "--max-tokens", "8", "--timeout-s", "30", "--json"],
                capture_output=True, text=True, timeout=90)
            if result.returncode == 0:
                break
            if time.monotonic() > deadline:
                logs = "".join(subprocess.run(["podman", "logs", "--tail", "20", name], capture_output=True,
                                              text=True).stderr for name in names.values())
                self.fail(f"no answer: {result.stderr}\n{logs}")
            time.sleep(1)
        answer = json.loads(result.stdout)
        self.assertEqual(answer["completion_tokens"], 8)
        for role in reversed(ROLES):  # SIGTERM drains: exit code 0, well before the kill
            run("podman", "stop", "--time", "30", names[role])
            state = json.loads(run("podman", "container", "inspect", names[role]))[0]["State"]
            self.assertEqual(state["ExitCode"], 0, role)

    @staticmethod
    def flags():
        """What compose.yaml says of every service."""
        return ["--runtime", "runc", *ULIMITS, "--read-only", "--cap-drop", "ALL", "--security-opt",
                "no-new-privileges", "--tmpfs", "/tmp", "--shm-size", "256m"]

    def start(self, role, *args, address=None, wait=False):
        name = f"zeroc-images-test-{role}"
        subprocess.run(["podman", "rm", "--force", "--ignore", name], capture_output=True)
        if not wait:
            self.addCleanup(run, "podman", "rm", "--force", "--ignore", name)
        network = ["--network", "none"]
        if address:
            network = ["--network", NETWORK, "--ip", address[role], "--add-host", f"router:{address['router']}"]
        config = ROOT / f"deploy/compose/{role}.yaml"
        run("podman", "run", "--name", name, "--rm" if wait else "--detach", *self.flags(), *network, "--volume",
            f"{config}:/etc/zeroc/config/{role}.yaml:ro", f"zeroc-{role}:test", *args, timeout=60)
        return name


if __name__ == "__main__":
    unittest.main()
