"""Runs the `zeroc` program for the benches: JSON answers, the machine's facts, and answers kept between runs."""

import hashlib
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
BINARY = "build/release/bin/zeroc"
COMMAND_S = 3600  # the longest that one command may take


def machine():
    """What a figure must be read beside."""
    cpu = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "commit": commit.stdout.strip(),
        "load_at_start": float(pathlib.Path("/proc/loadavg").read_text().split()[0]),
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_line(facts):
    return (
        f"{facts['date']}, commit {facts['commit'][:12]}: {facts['cpu']}, {facts['cores']} cores, "
        f"load {facts['load_at_start']} at the start"
    )


class Cli:
    """Answers are kept in build/bench, keyed by the command and by the bytes of every file that the command names, so
    that an interrupted bench goes on where it stopped. An answer of another build of the program is asked for again,
    unless any_build; each answer names the commit and the program that it is from."""

    def __init__(self, keep=True, any_build=False):
        self.keep = keep
        self.any_build = any_build
        self.folder = ROOT / "build/bench"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hashes = {}

    def program(self):
        """The hash of the program."""
        return self._hash(BINARY)

    def run(self, arguments, files=(), outputs=(), same_answer=()):
        """One command's JSON answer with `command` and `seconds` in it.

        files: inputs that the command finds by itself (the plan beside a model); outputs: options that name a file to
        write, whose path is in the answer under the option's name; same_answer: options that change how long the
        command takes and nothing else, left out of what is written down.
        """
        arguments = [str(a) for a in arguments]
        key = self._key(arguments, files)
        kept = self.folder / f"{key}.json"
        extra = []
        paths = {option: str((self.folder / f"{key}.{option.lstrip('-')}").relative_to(ROOT)) for option in outputs}
        for option, path in paths.items():
            extra += [option, path]
        command = [BINARY, *arguments, *extra, *same_answer, "--json"]
        if self.keep and kept.is_file():
            answer = json.loads(kept.read_text())
            if self.any_build or answer["program"] == self.program():
                return answer
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_S, check=False)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(command)} failed ({done.returncode}): {done.stderr.strip()}")
        answer = json.loads(done.stdout)
        answer["command"] = shlex.join([BINARY, *arguments, "--json"])
        answer.update(commit=machine()["commit"], program=self.program())
        answer["seconds"] = round(time.monotonic() - started, 1)
        answer.update({option.lstrip("-"): path for option, path in paths.items()})
        print(f"{answer['seconds']:7.1f} s  {answer['command']}", file=sys.stderr)
        kept.write_text(json.dumps(answer))
        return answer

    def _key(self, arguments, files):
        digest = hashlib.sha256()
        named = [a for a in [*arguments, *files] if (ROOT / a).is_file()]
        for part in arguments:
            digest.update(part.encode() + b"\0")
        for name in named:
            digest.update(self._hash(name).encode())
        return digest.hexdigest()[:24]

    def _hash(self, name):
        if name not in self.hashes:
            self.hashes[name] = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        return self.hashes[name]


def table(head, rows):
    """A Markdown table; cells are text."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
