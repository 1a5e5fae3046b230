#!/usr/bin/env python3
"""What nvcc makes of the packer, without a GPU: bytes equal to the reference's need single roundings and every bound.

    tests/gpu/ptx_test.py     after deploy/build --preset cuda; compiles kernels/cuda/kv.cu to PTX, some seconds
"""

import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOUND = ROOT / "build/cuda/CMakeFiles"


def compile_ptx(source):
    found = next(FOUND.glob("*/CMakeCUDACompiler.cmake")).read_text()
    compiler = re.search(r'set\(CMAKE_CUDA_COMPILER "(.+)"\)', found).group(1)
    with tempfile.TemporaryDirectory(prefix="zeroc-ptx-") as folder:
        out = pathlib.Path(folder) / "kernel.ptx"
        options = ["-std=c++20", "--expt-relaxed-constexpr", "--fmad=false", "-arch=sm_80", "-O3", f"-I{ROOT}"]
        subprocess.run([compiler, *options, "-ptx", str(ROOT / source), "-o", str(out)], check=True, timeout=300)
        return out.read_text()


def literal(value):
    """A float32 as PTX writes it, e.g. 0f3F800000."""
    return "0f%08X" % struct.unpack("<I", struct.pack("<f", value))[0]


class PackerTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.ptx = compile_ptx("kernels/cuda/kv.cu")

    def test_every_operation_rounds_by_itself(self):
        operations = set(re.findall(r"\b(?:fma|mad|div|sqrt|rcp|rsqrt)\.[a-z.0-9]*f32", self.ptx))
        self.assertTrue(operations <= {"div.rn.f32", "sqrt.rn.f32", "rcp.rn.f32"}, operations)
        self.assertIn("div.rn.f32", operations)
        self.assertNotIn(".ftz", self.ptx)

    def test_bounds_of_the_scale_rule_are_there(self):
        header = (ROOT / "kernels/scale_search.h").read_text()
        for name in ("kEighthMiddles", "kQuarterMiddles", "kQuarters"):
            values = re.search(name + r"\[\d\] = \{([^}]*)\}", header).group(1)
            bounds = [float(v.strip().rstrip("f")) for v in values.split(",")]
            self.assertGreaterEqual(len(bounds), 4)
            for bound in bounds:
                self.assertIn(literal(bound), self.ptx, f"{name}: {bound}")


if __name__ == "__main__":
    if not list(FOUND.glob("*/CMakeCUDACompiler.cmake")):
        sys.exit("build/cuda is missing: run deploy/build --preset cuda")
    unittest.main()
