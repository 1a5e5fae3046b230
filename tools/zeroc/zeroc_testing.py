"""Runs the real zeroc program for tests, and checks on how it ends. Standard library only.

Environment: ZEROC_BIN_DIR (folder of the program), ZEROC_MODEL_DIR (default models/zeroc-demo), ZEROC_TEST_TIME_SCALE
(every bound is multiplied by it).
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(os.environ.get("ZEROC_BIN_DIR", ROOT / "build/release/bin")) / "zeroc"
MODEL = pathlib.Path(os.environ.get("ZEROC_MODEL_DIR", ROOT / "models/zeroc-demo"))
PROSE = ROOT / "LICENSE"
PROMPT = "The road to the mill ran along the river"
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


def text_file(folder, name, n_chars):
    """English prose that is always there, repeated to a length."""
    text = PROSE.read_text()
    path = pathlib.Path(folder) / name
    path.write_text((text * (n_chars // len(text) + 1))[:n_chars])
    return path


class CliTest(unittest.TestCase):
    """A folder for files, and checks on how a command ends."""

    @classmethod
    def setUpClass(cls):
        cls.dir = tempfile.mkdtemp(prefix="zeroc-cli-")
        cls.addClassCleanup(shutil.rmtree, cls.dir)

    def write(self, name, content):
        path = pathlib.Path(self.dir) / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def check_ends(self, code, expected, *args):
        """Exit code `code`, nothing on stdout, one line on stderr that holds every string of `expected`."""
        done = zeroc(*args)
        error = done.stderr.decode("utf-8", errors="replace")
        self.assertEqual(done.returncode, code, error)
        self.assertEqual(done.stdout, b"")
        self.assertEqual(error.count("\n"), 1, error)
        for part in expected:
            self.assertIn(part, error)

    def check_fails(self, expected, *args):
        self.check_ends(1, expected, *args)

    def check_usage(self, expected, *args):
        self.check_ends(2, expected, *args)
