#!/usr/bin/env python3
"""zeroc calibrate, stopped and asked again, from outside: the same texts make the same plan. Standard library only."""

import pathlib
import subprocess
import time
import unittest

from zeroc_testing import MODEL, PROGRAM, TIMEOUT_S, CliTest, text_file, zeroc_json

SIZES = ["--context", 128, "--max-windows", 4, "--score-context", 128, "--score-stride", 64, "--score-windows", 1,
         "--probe-windows", 1, "--rungs", 4, 2, "--no-standard"]


class CalibrateTest(CliTest):
    """The smallest calibration that still searches, measures and bisects."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.text = text_file(cls.dir, "prose.txt", 20000)
        cls.whole = cls.path("whole.plan")
        cls.calibrate(cls.whole)

    @classmethod
    def path(cls, name):
        return pathlib.Path(cls.dir) / name

    @classmethod
    def arguments(cls, out, text=None):
        text = text or cls.text
        return ["calibrate", "--model", MODEL, "--text", f"{text}@0:50", "--heldout", f"{text}@50:100", "--out", out,
                *SIZES]

    @classmethod
    def calibrate(cls, out, *more, text=None):
        return zeroc_json(*cls.arguments(out, text), *more)

    def kill_at(self, out, n_lines):
        """kill -9 as soon as this many measurements are kept; how many were."""
        log = pathlib.Path(f"{out}.partial")
        process = subprocess.Popen([PROGRAM, *map(str, self.arguments(out))], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + TIMEOUT_S
            while not log.exists() or log.read_bytes().count(b"\n") < n_lines:
                self.assertIsNone(process.poll(), "ended before it was killed")
                self.assertLess(time.monotonic(), end, "nothing was kept")
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        return log.read_bytes().count(b"\n")

    def test_asked_twice(self):
        again = self.path("again.plan")
        self.calibrate(again)
        self.assertEqual(again.read_bytes(), self.whole.read_bytes())

    def test_goes_on_where_it_was_killed(self):
        out = self.path("killed.plan")
        self.path("killed.plan.partial.probe.tmp-1").write_bytes(b"half of what a killed process wrote")
        lines = 2
        for _ in range(3):
            kept = self.kill_at(out, lines)
            self.assertFalse(out.exists())
            lines = 2 * kept
        self.calibrate(out)
        self.assertEqual(out.read_bytes(), self.whole.read_bytes())
        self.assertEqual([p.name for p in self.path("").iterdir() if p.name.startswith("killed.plan.")], [])

    def test_a_torn_line_is_measured_again(self):
        out = self.path("torn.plan")
        self.kill_at(out, 20)
        log = pathlib.Path(f"{out}.partial")
        log.write_bytes(log.read_bytes()[:-3])  # a line that was cut while it was written
        self.calibrate(out)
        self.assertEqual(out.read_bytes(), self.whole.read_bytes())

    def test_another_text_does_not_go_on_with_it(self):
        other = text_file(self.dir, "other.txt", 15000)
        out, fresh = self.path("other.plan"), self.path("fresh.plan")
        self.kill_at(out, 20)
        self.calibrate(out, text=other)
        self.calibrate(fresh, text=other)
        self.assertEqual(out.read_bytes(), fresh.read_bytes())
        self.assertNotEqual(out.read_bytes(), self.whole.read_bytes())


if __name__ == "__main__":
    unittest.main()
