"""Runs the real zeroc program for tests. Standard library only.

Environment: ZEROC_BIN_DIR (folder of the program), ZEROC_MODEL_DIR (default models/zeroc-demo), ZEROC_TEST_TIME_SCALE
(every bound is multiplied by it).
"""

import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(os.environ.get("ZEROC_BIN_DIR", ROOT / "build/release/bin")) / "zeroc"
MODEL = pathlib.Path(os.environ.get("ZEROC_MODEL_DIR", ROOT / "models/zeroc-demo"))
TIME_SCALE = float(os.environ.get("ZEROC_TEST_TIME_SCALE", "1"))
TIMEOUT_S = 300 * TIME_SCALE  # one command


def zeroc(*args):
    """The finished process; stdout and stderr are bytes."""
    return subprocess.run([PROGRAM, *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S,
                          check=False)


def zeroc_json(*args):
    """The one object that --json prints. Fails on any other exit code than 0, and when anything else is on stdout."""
    done = zeroc(*args, "--json")
    if done.returncode != 0:
        raise AssertionError(f"zeroc {args[0]} ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
    lines = done.stdout.decode("utf-8").splitlines()
    if len(lines) != 1:
        raise AssertionError(f"zeroc {args[0]} --json printed {len(lines)} lines")
    return json.loads(lines[0])
