#!/usr/bin/env python3
"""House style as a test: what a compiler and clang-format do not see. Standard library only.

    tests/style/check_style.py          every file that git tracks or would track
    tests/style/check_style.py FILE..   these files

Prints FILE:LINE: message for every violation; exit code 1 when there is one.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINES_MAX = 600
COLUMNS_MAX = 120
CPP = {".h", ".cc", ".cu", ".cuh"}
TEXT = CPP | {".py", ".sh", ".cmake", ".proto", ".md", ".yaml", ".yml", ".json", ".txt", ".supp", ""}
# Prose and data keep their own line lengths: a table row or a JSON line cannot be broken.
FREE_WIDTH = {".md", ".json"}
CHART_TEMPLATES = "helm/zeroc/templates/*.yaml"  # an expression in a template cannot be broken either
NOT_OURS = {"LICENSE"}
NOT_OURS_DIRS = {"models"}
FIXED_NAMES = {"CMakeLists.txt", "CMakePresets.json", "README.md", "LICENSE", "Dockerfile", "NOTES.txt", "Chart.yaml"}

# Folders of one machine: what a home, a scratch disk or a build agent is called there. System paths are fine.
MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(home|root|work|mnt|workspace|Users)/[\w.]")
# The colon of the last: the word is also the name of a published method.
MARKER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK(?=:))\b")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
# Generated files, and Highway's own, which its idiom includes with quotes.
FOREIGN_INCLUDE = re.compile(r"\.pb\.h$|^hwy/")
# Highway includes these once for each instruction set: no #pragma once, and the name that its users know.
PER_TARGET_HEADER = re.compile(r"^[a-z0-9_]+-inl\.h$")
# Helpers of tests and benches may print.
MAY_PRINT = re.compile(r"^test_|_(test|testing|contract|main)$")
STD_STREAM = re.compile(r"\bstd::(cout|cerr)\b|\bprintf\(")


def tracked_files():
    out = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, check=True,
                         capture_output=True).stdout.decode()
    return [pathlib.PurePosixPath(p) for p in out.split("\0") if p]


def check_name(path):
    if path.name in FIXED_NAMES or path.name.startswith("."):
        return
    if path.parts[0] in ("deploy", "helm", ".ci", "docs") and re.fullmatch(r"[a-z0-9][a-z0-9._-]*", path.name):
        return  # commands, charts and numbered pages are named with dashes, as their users type them
    if path.suffix == ".cmake" and re.fullmatch(r"Zeroc[A-Za-z]+", path.stem):
        return
    if PER_TARGET_HEADER.match(path.name):
        return
    if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", path.name):
        yield 1, f"file name is not snake_case: {path.name}"


def check_lines(path, lines):
    for number, line in enumerate(lines, 1):
        if "\t" in line:
            yield number, "tab"
        if line != line.rstrip():
            yield number, "space at the end of the line"
        if len(line) > COLUMNS_MAX and path.suffix not in FREE_WIDTH and not path.match(CHART_TEMPLATES):
            yield number, f"{len(line)} columns, more than {COLUMNS_MAX}"
        if MARKER.search(line):
            yield number, f"marker {MARKER.search(line).group()}: finish it or open an issue"
        if MACHINE_PATH.search(line):
            yield number, f"path of one machine: {MACHINE_PATH.search(line).group()}.."
    if len(lines) > LINES_MAX and path.suffix not in FREE_WIDTH:
        yield LINES_MAX + 1, f"{len(lines)} lines, more than {LINES_MAX}"


def check_cpp(path, lines):
    if path.suffix in (".h", ".cuh"):
        if not lines or not lines[0].startswith("//"):
            yield 1, "a header opens with its purpose"
        if not PER_TARGET_HEADER.match(path.name) and not any(line.strip() == "#pragma once" for line in lines):
            yield 1, "#pragma once is missing"
    in_library = path.parts[0] in ("libzeroc", "kernels") and "bench" not in path.parts
    in_library = in_library and not MAY_PRINT.search(path.stem)
    for number, line in enumerate(lines, 1):
        include = INCLUDE.match(line)
        if include and not FOREIGN_INCLUDE.search(include.group(1)):
            if not (ROOT / include.group(1)).is_file():
                yield number, f"include path is not from the project root: {include.group(1)}"
        code = line.split("//")[0]
        if in_library and STD_STREAM.search(code):
            yield number, "a library does not print: return a Status, or log in the services"


def check_file(path):
    """Yields (line, message) for one file, a path relative to the project root."""
    yield from check_name(path)
    if path.suffix not in TEXT or path.name in NOT_OURS or path.parts[0] in NOT_OURS_DIRS:
        return
    try:
        text = (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        yield 1, "not UTF-8"
        return
    if text and not text.endswith("\n"):
        yield 1, "no newline at the end of the file"
    lines = text.split("\n")[:-1]
    if len(lines) > 20000:
        return
    if path.suffix != ".json" or path.name in FIXED_NAMES:
        yield from check_lines(path, lines)
    if path.suffix in CPP:
        yield from check_cpp(path, lines)


def main():
    names = sys.argv[1:]
    files = [pathlib.PurePosixPath(pathlib.Path(n).resolve().relative_to(ROOT)) for n in names] or tracked_files()
    files = [f for f in files if (ROOT / f).is_file()]
    violations = 0
    for path in files:
        for line, message in check_file(path):
            print(f"{path}:{line}: {message}")
            violations += 1
    print(f"{len(files)} files, {violations} violations")
    if not files:
        print("no files to check: is this a git checkout?", file=sys.stderr)
        return 1
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
