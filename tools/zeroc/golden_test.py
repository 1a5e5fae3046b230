#!/usr/bin/env python3
"""Logits and greedy tokens of the backends against float64 references. Standard library only.

    golden_test.py   our own golden file, and the shared one beside the checkout where there is one

Tolerances on a logit:
  ref: 1e-4. Float32 sums; a few 1e-6 are measured.
  cpu: 0.15. Every input of a matrix product is rounded to bf16: by 2^-9 of its value at most, 2^-9.8 in the root mean
       square. About 25 such places lie between embedding and logits and add up like noise: 25^0.5 * 2^-9.8 = 0.6 % of
       what a logit varies by, which is about 3 here. That makes 0.017 root mean square, 0.08 for the worst of 10^5
       logits (4.5 times that), and twice as much with room for layers that amplify. The worst is printed; 0.06 was
       measured on 3,000 tokens.
Where the reference's two best logits are further apart than the margin, the best token must be the same, after the
reference's own text; and the tokens of generate must be the reference's up to the first narrower step.
"""

import array
import json
import os
import pathlib
import tempfile
import unittest

from zeroc_testing import MODEL, ROOT, TIME_SCALE, zeroc_json

OWN = ROOT / "tests/data/zeroc_demo_logits.json"
SHARED = ROOT.parent / "shared/golden/zeroc-demo"
TOLERANCE = {"ref": 1e-4, "cpu": 0.15, "cuda": 0.15}  # both round to bf16 in the same places
MARGIN = {"ref": 2e-4, "cpu": 0.1, "cuda": 0.1}
WITH_CUDA = os.environ.get("ZEROC_TEST_CUDA") == "1"
# 3,000 tokens take the scalar backend a quarter of a minute, and a sanitizer build (ZEROC_TEST_TIME_SCALE) too long.
REF_TOKENS_MAX = 1 << 30 if TIME_SCALE == 1 else 400


class GoldenTest(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.TemporaryDirectory(prefix="zeroc-golden-")
        self.addCleanup(self.dir.cleanup)

    def ids_file(self, ids):
        path = pathlib.Path(self.dir.name) / "ids.json"
        path.write_text(json.dumps(ids))
        return path

    def check_logits(self, backend, prompt, positions, last_row=None):
        """positions: (position, logsumexp, [[id, logit], ..]). Returns the largest difference.

        The reference's greedy tokens stand behind the prompt, so that one run also tells which is best after each.
        """
        n_ids = len(prompt["ids"])
        steps = prompt["greedy"]
        ids = prompt["ids"] + [step["id"] for step in steps[:-1]]
        step_positions = range(n_ids - 1, n_ids - 1 + len(steps))
        wanted = [*(p for p, _, _ in positions), *step_positions]
        answer = zeroc_json("logits", "--model", MODEL, "--ids-file", self.ids_file(ids), "--backend", backend, "--top",
                            1 << 20, "--positions", ",".join(map(str, wanted)))["positions"]
        self.assertEqual([entry["pos"] for entry in answer], wanted)
        worst = 0
        for entry, (position, logsumexp, top) in zip(answer, positions):
            got = dict(entry["top"])
            differences = [abs(entry["logsumexp"] - logsumexp), *(abs(got[i] - logit) for i, logit in top)]
            if last_row is not None and position == n_ids - 1:
                self.assertEqual(len(got), len(last_row))
                differences += [abs(got[i] - logit) for i, logit in enumerate(last_row)]
            self.assertLess(max(differences), TOLERANCE[backend], f"{prompt['name']} at {position}")
            worst = max(worst, *differences)
        for entry, step in zip(answer[len(positions):], steps):
            if step["margin"] > MARGIN[backend]:
                self.assertEqual(entry["top"][0][0], step["id"], f"{prompt['name']}: best token at {entry['pos']}")
        return worst

    def check_greedy(self, backend, prompt):
        """Tokens of generate, up to the first narrow margin. Returns how many were compared."""
        steps = prompt["greedy"]
        n_sure = next((i for i, step in enumerate(steps) if step["margin"] < MARGIN[backend]), len(steps))
        answer = zeroc_json("generate", "--model", MODEL, "--ids-file", self.ids_file(prompt["ids"]), "--max-tokens",
                            len(steps), "--temperature", 0, "--ignore-eos", "--backend", backend)
        self.assertEqual(answer["ids"][:n_sure], [step["id"] for step in steps][:n_sure], prompt["name"])
        return n_sure

    def report(self, backend, prompt, worst, n_steps):
        print(f"{backend} {prompt['name']}: {len(prompt['ids'])} ids, worst logit {worst:.2e} "
              f"({worst / TOLERANCE[backend]:.0%} of the tolerance), {n_steps}/{len(prompt['greedy'])} tokens equal")

    def check_own(self, backend):
        n_greedy = 0
        for prompt in json.loads(OWN.read_text())["prompts"]:
            with self.subTest(prompt=prompt["name"]):
                positions = [(p["pos"], p["logsumexp"], p["top"]) for p in prompt["positions"]]
                worst = self.check_logits(backend, prompt, positions)
                n_steps = self.check_greedy(backend, prompt)
                n_greedy += n_steps
                self.report(backend, prompt, worst, n_steps)
        self.assertGreater(n_greedy, 16, "the margins of the golden file leave little to compare")

    def check_shared(self, backend):
        if not SHARED.is_dir():
            self.skipTest("no shared golden data beside this checkout")
        golden = json.loads((SHARED / "logits_golden.json").read_text())
        rows = array.array("f")
        rows.frombytes((SHARED / "last_logits.f32le.bin").read_bytes())
        vocab = golden["vocab_size"]
        for prompt in golden["prompts"]:
            if backend == "ref" and len(prompt["ids"]) > REF_TOKENS_MAX:
                continue
            with self.subTest(prompt=prompt["name"]):
                positions = [(p["position"], p["logsumexp"], p["top20"]) for p in prompt["positions"]]
                row = prompt["last_logits_row"]
                worst = self.check_logits(backend, prompt, positions, rows[row * vocab:(row + 1) * vocab])
                self.report(backend, prompt, worst, self.check_greedy(backend, prompt))

    def test_own_ref(self):
        self.check_own("ref")

    @unittest.skipUnless(WITH_CUDA, "ZEROC_TEST_CUDA is not set: tests/gpu/run --part model, on a machine with a GPU")
    def test_own_cuda(self):
        self.check_own("cuda")

    @unittest.skipUnless(WITH_CUDA, "ZEROC_TEST_CUDA is not set: tests/gpu/run --part model, on a machine with a GPU")
    def test_shared_cuda(self):
        self.check_shared("cuda")

    def test_own_cpu(self):
        self.check_own("cpu")

    def test_shared_ref(self):
        self.check_shared("ref")

    def test_shared_cpu(self):
        self.check_shared("cpu")


if __name__ == "__main__":
    unittest.main()
