#!/usr/bin/env python3
"""The style check must fail on what it forbids and pass on what it allows."""

import pathlib
import tempfile
import unittest

import check_style

GOOD_HEADER = '// Does one thing.\n#pragma once\n\n#include "libzeroc/base/status.h"\n'


class CheckStyleTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(setattr, check_style, "ROOT", check_style.ROOT)
        check_style.ROOT = pathlib.Path(folder.name)
        self.write("libzeroc/base/status.h", "// Status.\n#pragma once\n")

    def write(self, name, text):
        path = check_style.ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def messages(self, name, text):
        self.write(name, text)
        return [message for _, message in check_style.check_file(pathlib.PurePosixPath(name))]

    def assert_one(self, name, text, part):
        messages = self.messages(name, text)
        self.assertEqual(len(messages), 1, messages)
        self.assertIn(part, messages[0])

    def test_allows_what_is_usual(self):
        self.assertEqual(self.messages("libzeroc/kv/pool.h", GOOD_HEADER), [])
        self.assertEqual(self.messages("deploy/setup", "#!/usr/bin/env bash\ncat /etc/os-release >/dev/null\n"), [])
        self.assertEqual(self.messages("kernels/cpu/simd-inl.h", '// Lanes.\n#include "hwy/highway.h"\n'), [])
        self.assertEqual(self.messages("libzeroc/comm/transport_contract.cc", "printf();\n"), [])
        self.assertEqual(self.messages("services/router/main.cc", "std::cout << 1;\n"), [])
        self.assertEqual(self.messages("docs/adr/0002-debian-packages.md", "x " * 90 + "x\n"), [])

    def test_forbids(self):
        marker = "TO" + "DO"
        for name, text, part in [
            ("libzeroc/kv/Pool.h", GOOD_HEADER, "snake_case"),
            ("libzeroc/kv/pool.h", "#pragma once\n", "purpose"),
            ("libzeroc/kv/pool.h", "// Does one thing.\n", "#pragma once"),
            ("libzeroc/kv/pool.cc", '#include "pool.h"\n', "project root"),
            ("libzeroc/kv/pool.cc", "\tint x;\n", "tab"),
            ("libzeroc/kv/pool.cc", "int x; \n", "space at the end"),
            ("libzeroc/kv/pool.cc", "int x;", "no newline"),
            ("libzeroc/kv/pool.cc", "// " + "x" * 118 + "\n", "columns"),
            ("libzeroc/kv/pool.cc", f"// {marker}: later\n", "marker"),
            ("libzeroc/kv/pool.cc", "std::cout << 1;\n", "does not print"),
            ("libzeroc/kv/pool.cc", "int x;\n" * 601, "more than 600"),
            ("tools/x.py", 'OUT = "' + "/ho" + 'me/somebody/x"\n', "path of one machine"),
        ]:
            with self.subTest(part=part):
                self.assert_one(name, text, part)


if __name__ == "__main__":
    unittest.main()
