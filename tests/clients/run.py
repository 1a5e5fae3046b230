#!/usr/bin/env python3
"""Runs one client that nobody here wrote against a cluster of real processes.

    run.py NAME      NAME: curl grpcurl openai-python openai-js triton aiperf lm-eval

Installs the client in the version that this folder states, below build/clients (once: a later run finds it there),
starts a cluster with API keys on loopback and runs the client's script. Exit code: 0 passed, 1 failed, 77 skipped
because the client's language or its registry is not there; the last line says which.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/clients"
sys.path.insert(0, str(ROOT / "tests/e2e"))

from cluster import MODEL_DIR, SETTLE_S, TIME_SCALE, Cluster, wait_until  # noqa: E402

GRPCURL = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3"
OPENAI_JS = "openai@6.49.0"
API_KEY = "key-of-the-client-tests"
SKIPPED = 77
INSTALL_S = 1500  # hundreds of packages over a slow line
RUN_S = 600 * TIME_SCALE
START_S = 240 * TIME_SCALE  # what was just installed may still be on its way to the disk; nothing here is about speed

# What package managers say when nobody answers. Everything else that fails is a failure of ours.
NO_REGISTRY = ("NewConnectionError", "NameResolutionError", "Temporary failure in name resolution", "ConnectTimeout",
               "Connection refused", "Network is unreachable", "ProxyError", "ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT",
               "EAI_AGAIN", "ENETUNREACH", "dial tcp", "no such host", "i/o timeout")


class Skip(Exception):
    """The client cannot be had on this machine."""


def program(name):
    found = shutil.which(name)
    if not found:
        raise Skip(f"{name} is not installed")
    return found


def install(command, **kwargs):
    """Runs a package manager. Raises Skip when its registry does not answer."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=INSTALL_S, **kwargs)
    if done.returncode == 0:
        return
    said = done.stdout + done.stderr
    for mark in NO_REGISTRY:
        if mark in said:
            raise Skip(f"the registry does not answer: {mark}")
    raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{said[-4000:]}")


def installed(name, version_text, make):
    """build/clients/NAME as make(folder) filled it; made anew when version_text is not the one it was made for."""
    folder, mark = BUILD / name, BUILD / f"{name}.installed"
    wanted = hashlib.sha256(version_text.encode()).hexdigest()
    if mark.is_file() and mark.read_text() == wanted:
        return folder
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    mark.write_text(wanted)
    return folder


def virtual_environment(name):
    """The Python of a virtual environment with requirements_NAME.txt."""
    requirements = HERE / f"requirements_{name.replace('-', '_')}.txt"

    def make(folder):
        made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, text=True, timeout=300)
        if made.returncode:
            raise Skip("python3 has no venv module (Debian: python3-venv)")
        install([folder / "bin/python", "-m", "pip", "install", "--quiet", "--retries", "1", "-r", requirements])

    return installed(name, requirements.read_text() + sys.version, make) / "bin/python"


def openai_js():
    npm = program("npm")
    program("node")
    node_env = {**os.environ, "npm_config_fetch_retries": "1"}

    def make(folder):
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        install([npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--save-exact", OPENAI_JS],
                cwd=folder, env=node_env)

    folder = installed("openai-js", OPENAI_JS, make)
    script = folder / "openai_client.mjs"  # Node looks for packages beside the script
    shutil.copyfile(HERE / script.name, script)
    return [program("node"), script]


def grpcurl():
    go = program("go")

    def make(folder):
        install([go, "install", GRPCURL], env={**os.environ, "GOBIN": str(folder), "GOFLAGS": "-modcacherw"})

    return [sys.executable, HERE / "grpcurl_client.py", installed("grpcurl", GRPCURL, make) / "grpcurl"]


COMMANDS = {
    "curl": lambda: [sys.executable, HERE / "curl_client.py", program("curl")],
    "grpcurl": grpcurl,
    "openai-python": lambda: [virtual_environment("openai"), HERE / "openai_client.py"],
    "openai-js": openai_js,
    "triton": lambda: [virtual_environment("triton"), HERE / "triton_client.py"],
    "aiperf": lambda: [virtual_environment("aiperf"), HERE / "aiperf_client.py"],
    "lm-eval": lambda: [virtual_environment("lm-eval"), HERE / "lm_eval_client.py"],
}


def run(command):
    with tempfile.TemporaryDirectory(prefix="zeroc-clients-") as folder:
        keys = pathlib.Path(folder) / "keys"
        keys.touch(mode=0o600)
        keys.write_text(f"tests {API_KEY}\n")
        with Cluster(router_args=["--api-keys-file", keys]) as cluster:
            cluster.wait_ready(START_S)
            url = f"http://127.0.0.1:{cluster.router.http_port}"
            environment = {**os.environ, "ZEROC_URL": url, "ZEROC_GRPC": f"127.0.0.1:{cluster.router.grpc_port}",
                           "ZEROC_WORK": folder, "ZEROC_MODEL_DIR": str(MODEL_DIR), "OPENAI_BASE_URL": url + "/v1",
                           "OPENAI_API_KEY": API_KEY, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
                           "HF_HOME": str(BUILD / "cache")}
            code = subprocess.run(list(map(str, command)), env=environment, cwd=folder, timeout=RUN_S).returncode
            try:
                if code == 0:  # what a client has left early must be over, its memory free
                    wait_until(lambda: cluster.router.metric("vllm:num_requests_running") == 0, SETTLE_S, "all is over")
                    wait_until(lambda: cluster.decode[0].used_blocks() == 0, SETTLE_S, "no block is held")
            except AssertionError as error:
                print(error)
                code = 1
            if code:
                cluster.print_logs()
            return 1 if code else 0


def main():
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    try:
        command = COMMANDS[sys.argv[1]]()
    except Skip as skip:
        print(f"SKIPPED {sys.argv[1]}: {skip}")
        return SKIPPED
    code = run(command)
    print(f"{sys.argv[1]}: {'failed' if code else 'passed'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
