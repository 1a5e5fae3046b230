#!/usr/bin/env python3
"""The configure step refuses an edge that points up or sideways, and a compiler that is not there."""

import pathlib
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(rules LANGUAGES CXX)
list(APPEND CMAKE_MODULE_PATH "{root}/cmake")
include(ZerocToolchain)
include(ZerocCuda)
include(ZerocLayers)
file(WRITE "${{CMAKE_CURRENT_BINARY_DIR}}/a.cc" "")
set(source "${{CMAKE_CURRENT_BINARY_DIR}}/a.cc")
zeroc_library(zeroc_low LAYER 1 SOURCES "${{source}}")
zeroc_library(zeroc_high LAYER 3 SOURCES "${{source}}" DEPS zeroc_low)
{extra}
"""


class CMakeRulesTest(unittest.TestCase):
    def configure(self, extra="", *options):
        """(exit code, messages) of a small project with `extra` at its end."""
        with tempfile.TemporaryDirectory(prefix="zeroc-cmake-") as folder:
            (pathlib.Path(folder) / "CMakeLists.txt").write_text(PROJECT.format(root=ROOT, extra=extra))
            done = subprocess.run(["cmake", "-G", "Ninja", "-S", folder, "-B", f"{folder}/build", *options],
                                  capture_output=True, text=True, timeout=60)
            return done.returncode, " ".join((done.stdout + done.stderr).split())

    def assert_refused(self, part, *args):
        code, messages = self.configure(*args)
        self.assertNotEqual(code, 0, messages)
        self.assertIn(part, messages)

    def test_edges_point_down(self):
        self.assertEqual(self.configure()[0], 0)
        self.assert_refused("uses point down", 'zeroc_library(zeroc_x LAYER 2 SOURCES "${source}" DEPS zeroc_high)')
        self.assert_refused("uses point down", 'zeroc_library(zeroc_x LAYER 1 SOURCES "${source}" DEPS zeroc_low)')
        self.assert_refused("uses point down", 'zeroc_executable(x LAYER 2 SOURCES "${source}" DEPS zeroc_high)')

    def test_layer_and_dependency_must_be_stated(self):
        self.assert_refused("LAYER is missing", 'zeroc_library(zeroc_x SOURCES "${source}")')
        self.assert_refused("there is no target", 'zeroc_library(zeroc_x LAYER 2 SOURCES "${source}" DEPS zeroc_no)')

    def test_missing_cuda_compiler_is_refused(self):
        self.assert_refused("there is no CUDA compiler", "", "-DZEROC_CUDA=ON", "-DZEROC_CUDA_ROOT=/nonexistent")

    def test_fuzzers_need_clang(self):
        self.assert_refused("needs clang", "", "-DZEROC_BUILD_FUZZERS=ON", "-DCMAKE_CXX_COMPILER=g++")


if __name__ == "__main__":
    unittest.main()
