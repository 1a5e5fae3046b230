#!/usr/bin/env python3
"""zeroc calibrate and what a plan changes in the other commands, from outside. Standard library only."""

import json
import math
import os
import pathlib
import shutil
import unittest

from zeroc_testing import MODEL, PROMPT, PROSE, CliTest, text_file, zeroc, zeroc_json


class PlanTest(CliTest):
    """Everything that needs a plan: one is calibrated, small, from the licence's text."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.text = text_file(cls.dir, "prose.txt", 60000)
        cls.plan = pathlib.Path(cls.dir) / "small.plan"
        cls.recall_set = pathlib.Path(cls.dir) / "recall.jsonl"
        filler = PROSE.read_text()[:1500]
        fact = "The number of the old house is"
        cases = [{"prompt": f"{filler} {fact} {n}. What is the number of the old house? {fact}", "answer": f" {n}",
                  "group": f"g{n % 2}"} for n in range(48213, 48217)]
        cls.recall_set.write_text("\n".join(map(json.dumps, cases)))
        cls.made = zeroc_json(
            "calibrate", "--model", MODEL, "--text", f"{cls.text}@0:50", "--heldout", f"{cls.text}@50:100",
            "--recall-set", cls.recall_set, "--recall-cases", 2, "--out", cls.plan, "--context", 512,
            "--max-windows", 8, "--score-context", 512, "--score-stride", 128, "--score-windows", 2)
        cls.with_plan = ["--model", MODEL, "--plan", cls.plan]

    def test_plan_shape(self):
        answer = zeroc_json("plan", self.plan)
        self.assertEqual(answer, self.made)
        self.assertEqual(list(answer), ["plan_id", "ppl_base", "profiles"])
        self.assertRegex(answer["plan_id"], "^[0-9a-f]{32}$")
        self.assertGreater(answer["ppl_base"], 1)
        names = [p["name"] for p in answer["profiles"]]
        for name in ["bf16", "q8", "q4", "q3", "q2"]:
            self.assertIn(name, names)
        for profile in answer["profiles"]:
            self.assertEqual(list(profile), ["name", "bits_per_element", "kv_bytes_per_token", "ppl_increase", "recall",
                                             "ppl_increase_rel", "kl"])
            self.assertGreaterEqual(profile["kl"], 0)
            self.assertAlmostEqual(profile["ppl_increase_rel"], profile["ppl_increase"] / answer["ppl_base"], places=9)
            self.assertIn(profile["recall"], [0, 0.5, 1])
        by_name = {p["name"]: p for p in answer["profiles"]}
        self.assertLess(by_name["q2"]["kv_bytes_per_token"], by_name["q8"]["kv_bytes_per_token"] / 2)
        self.assertLess(by_name["q8"]["kl"], by_name["q2"]["kl"])

    def test_plan_table(self):
        table = zeroc("plan", self.plan).stdout.decode()
        for profile in self.made["profiles"]:
            self.assertRegex(table, rf"(?m)^{profile['name']} ")

    def test_plan_tells_no_folder(self):
        self.assertNotIn(os.fsencode(self.dir), self.plan.read_bytes())

    def test_plan_beside_the_model(self):
        model = pathlib.Path(self.dir) / "model"
        shutil.copytree(MODEL, model)
        shutil.copy(self.plan, model / "zeroc.plan")
        tail = ["--prompt", PROMPT, "--max-tokens", 4, "--profile", "q8"]
        want = zeroc_json("generate", *self.with_plan, *tail)
        self.assertEqual(zeroc_json("generate", "--model", model, *tail), want)
        (model / "zeroc.plan").unlink()
        self.check_fails(["zeroc.plan", "zeroc calibrate"], "generate", "--model", model, *tail)

    def test_compression_shows(self):
        prompt = self.write("long.txt", PROSE.read_text()[:6000])
        tail = ["--prompt-file", prompt, "--max-tokens", 4]
        plain = zeroc_json("generate", "--model", MODEL, *tail)
        packed = zeroc_json("generate", *self.with_plan, *tail, "--profile", "q4")
        self.assertLess(packed["kv_bytes_per_token"], 0.6 * plain["kv_bytes_per_token"])

    def test_folded_bf16_has_the_plain_logits(self):
        ids = zeroc_json("tokenize", "--model", MODEL, "--text", PROSE.read_text()[:2000], "--add-special")["ids"]
        path = self.write("ids.json", json.dumps(ids))
        # One rounding of the folded weights; and the noise of bf16 activations, twice.
        for backend, tolerance in [("ref", 0.05), ("cpu", 0.3)]:
            with self.subTest(backend=backend):
                tail = ["--ids-file", path, "--backend", backend, "--top", 4096]
                plain = zeroc_json("logits", "--model", MODEL, *tail)["positions"][0]
                folded = zeroc_json("logits", *self.with_plan, "--profile", "bf16", *tail)["positions"][0]
                self.assertAlmostEqual(plain["logsumexp"], folded["logsumexp"], delta=tolerance)
                got = dict(folded["top"])
                self.assertLess(max(abs(got[i] - logit) for i, logit in plain["top"]), tolerance)

    def test_perplexity(self):
        base = ["perplexity", "--text", self.text, "--context", 512, "--stride", 128, "--max-windows", 2]
        plain = zeroc_json(*base, "--model", MODEL)
        self.assertEqual(list(plain), ["ppl", "nll", "tokens", "bits_per_byte", "kl", "kv_bytes_per_token"])
        self.assertEqual(plain["kl"], 0)
        self.assertEqual(plain["tokens"], 2 * 128)
        self.assertAlmostEqual(plain["ppl"], math.exp(plain["nll"]), places=6)
        self.assertEqual(zeroc_json(*base, "--model", MODEL, "--method", "none"), plain)
        packed = zeroc_json(*base, *self.with_plan, "--profile", "q3")
        self.assertEqual(packed["tokens"], plain["tokens"])
        self.assertGreater(packed["kl"], 0)
        self.assertLess(packed["kv_bytes_per_token"], plain["kv_bytes_per_token"])
        chunks = zeroc_json(*base, *self.with_plan, "--profile", "q3", "--score", "prefill")
        self.assertAlmostEqual(chunks["nll"], packed["nll"], delta=0.02)
        out = pathlib.Path(self.dir) / "tokens.txt"
        zeroc_json(*base, *self.with_plan, "--profile", "q3", "--tokens-out", out)
        rows = [[float(x) for x in line.split()] for line in out.read_text().splitlines()]
        self.assertEqual(len(rows), packed["tokens"])
        self.assertAlmostEqual(sum(nll for nll, _ in rows) / len(rows), packed["nll"], places=6)
        self.assertAlmostEqual(sum(kl for _, kl in rows) / len(rows), packed["kl"], places=6)

    def test_recall(self):
        answer = zeroc_json("recall", *self.with_plan, "--profile", "q8", "--set", self.recall_set)
        self.assertEqual(list(answer), ["accuracy", "by_group", "kv_bytes_per_token"])
        self.assertEqual(list(answer["by_group"]), ["g0", "g1"])
        self.assertAlmostEqual(answer["accuracy"], sum(answer["by_group"].values()) / 2)
        one = zeroc_json("recall", "--model", MODEL, "--set", self.recall_set, "--max-cases", 1)
        self.assertEqual(list(one["by_group"]), ["g0"])

    def test_bench(self):
        tail = ["--repeat", 2, "--threads", 1]
        for args in [["prefill", "--prompt-tokens", 100],
                     ["decode", "--context", 300, "--batch", 2, "--profile", "q4"]]:
            with self.subTest(args=args):
                where = self.with_plan if "--profile" in args else ["--model", MODEL]
                answer = zeroc_json("bench", *args, *where, *tail)
                for name in ["tokens_per_s", "flops_per_s", "bytes_per_s", "peak_flops_per_s", "peak_read_bytes_per_s"]:
                    self.assertGreater(answer[name], 0, name)
                self.assertLess(answer["flops_fraction"], 1)
                self.assertLessEqual(answer["tokens_per_s_min"], answer["tokens_per_s"])
                self.assertLessEqual(answer["tokens_per_s"], answer["tokens_per_s_max"])

    def test_unknown_profile(self):
        self.check_fails(["q99", "bf16"], "generate", *self.with_plan, "--prompt", "a", "--profile", "q99")

    def test_broken_plans(self):
        whole = self.plan.read_bytes()
        broken = {"empty": b"", "half": whole[:len(whole) // 2], "cut": whole[:-1], "text": b"not a plan" * 100,
                  "flipped": whole[:-100] + bytes([whole[-100] ^ 0x40]) + whole[-99:]}
        for name, content in broken.items():
            with self.subTest(name=name):
                path = self.write(f"{name}.plan", content)
                self.check_fails([f"{name}.plan"], "plan", path)
                self.check_fails([f"{name}.plan"], "generate", "--model", MODEL, "--prompt", "a", "--profile", "q4",
                                 "--plan", path)
        self.check_fails(["none.plan"], "plan", "none.plan")

    def test_calibrate_errors(self):
        base = ["calibrate", "--model", MODEL, "--out", pathlib.Path(self.dir) / "new.plan"]
        self.check_fails(["none.txt"], *base, "--text", "none.txt", "--heldout", PROSE)
        self.check_fails([], *base, "--text", self.write("short.txt", "too short"), "--heldout", PROSE)
        self.check_fails(["broken.jsonl:1"], *base, "--text", self.text, "--heldout", self.text, "--recall-set",
                         self.write("broken.jsonl", "{}"))
        nowhere = pathlib.Path(self.dir) / "nowhere/new.plan"
        sources = ["--text", PROSE, "--heldout", PROSE]
        self.check_fails(["nowhere"], "calibrate", "--model", MODEL, "--out", nowhere, *sources)
        self.assertFalse((pathlib.Path(self.dir) / "new.plan").exists())


if __name__ == "__main__":
    unittest.main()
