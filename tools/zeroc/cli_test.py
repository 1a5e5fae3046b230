#!/usr/bin/env python3
"""The zeroc program from outside: JSON shapes, exit codes, messages, hostile files. Standard library only."""

import json
import math
import pathlib
import unittest

from zeroc_testing import MODEL, PROMPT, PROSE, CliTest, text_file, zeroc, zeroc_json

COMMANDS = ["tokenize", "detokenize", "logits", "generate", "perplexity", "recall", "calibrate", "plan", "bench"]


class UsageTest(CliTest):
    def test_help(self):
        whole = zeroc("--help").stdout.decode()
        for command in COMMANDS:
            with self.subTest(command=command):
                self.assertIn(command, whole)
                done = zeroc(command, "--help")
                self.assertEqual(done.returncode, 0)
                self.assertIn("--json", done.stdout.decode())

    def test_no_or_unknown_command(self):
        self.check_usage(["--help"])
        self.check_usage([], "frobnicate")

    def test_unknown_flag(self):
        for command in COMMANDS:
            with self.subTest(command=command):
                self.check_usage([], command, "--no-such-flag")

    def test_required_flags(self):
        self.check_usage(["--model"], "tokenize", "--text", "a")
        self.check_usage(["--ids"], "detokenize", "--model", MODEL)
        self.check_usage(["--set"], "recall", "--model", MODEL)
        self.check_usage(["--out"], "calibrate", "--model", MODEL, "--text", PROSE, "--heldout", PROSE)
        self.check_usage([], "tokenize", "--model", MODEL)
        self.check_usage([], "tokenize", "--model", MODEL, "--text", "a", "--file", PROSE)
        self.check_usage([], "generate", "--model", MODEL)
        self.check_usage([], "bench", "fly", "--model", MODEL)

    def test_values_out_of_range(self):
        generate = ["generate", "--model", MODEL, "--prompt", PROMPT]
        self.check_usage([], *generate, "--max-tokens", 0)
        self.check_usage(["temperature"], *generate, "--temperature", 5)
        self.check_usage(["top_p"], *generate, "--top-p", 0)
        self.check_usage([], *generate, "--seed", "x")
        self.check_usage(["--stop"], *generate, "--stop", "")
        self.check_usage(["--ids", "'x'"], "detokenize", "--model", MODEL, "--ids", "1,x")
        self.check_usage(["--positions"], "logits", "--model", MODEL, "--ids-file", "f", "--positions", "1,-2")
        self.check_usage(["--stride"], "perplexity", "--model", MODEL, "--text", PROSE, "--context", 64, "--stride", 64)
        self.check_usage(["@60:50"], "perplexity", "--model", MODEL, "--text", f"{PROSE}@60:50")

    def test_methods(self):
        base = ["perplexity", "--model", MODEL, "--text", PROSE]
        self.check_usage(["--profile", "kivi4"], *base, "--profile", "q4", "--method", "kivi4")
        self.check_usage(["--profile"], *base, "--method", "zeroc")
        self.check_usage(["no-such-method"], *base, "--method", "no-such-method")
        self.check_usage(["--kv-bits"], *base, "--method", "kivi4", "--kv-bits", 4)
        self.check_usage(["--kv-bits"], *base, "--kv-bits", 4)
        self.check_usage(["--kv-bits"], *base, "--method", "h2o", "--kv-bits", 17)
        self.check_usage(["--calibration-text"], *base, "--method", "kivi4", "--calibration-text", PROSE)
        self.check_fails(["no.txt"], *base, "--method", "palu", "--calibration-text", "no.txt")
        ids = self.write("ids.json", "[1]")
        self.check_fails(["kivi4", "logits"], "logits", "--model", MODEL, "--ids-file", ids, "--method", "kivi4")
        self.check_fails(["h2o", "bench"], "bench", "decode", "--model", MODEL, "--method", "h2o")

    def test_no_cuda_in_silence(self):
        ids = self.write("ids.json", "[1]")
        self.check_fails(["cuda"], "logits", "--model", MODEL, "--ids-file", ids, "--backend", "cuda")


class TokenizeTest(CliTest):
    def test_round_trip(self):
        for text in ["", " ", "Hello, world! 12345", "tabs\tand\nlines\r\n", "Ünïcödé 漢字 😀", "<|eos|> and <|bos|>"]:
            with self.subTest(text=text):
                answer = zeroc_json("tokenize", "--model", MODEL, "--text", text)
                self.assertEqual(list(answer), ["ids"])
                if answer["ids"]:
                    ids = ",".join(map(str, answer["ids"]))
                    self.assertEqual(zeroc_json("detokenize", "--model", MODEL, "--ids", ids), {"text": text})

    def test_bytes_survive(self):
        raw = bytes(range(256)) * 2
        ids = zeroc_json("tokenize", "--model", MODEL, "--file", self.write("bytes", raw))["ids"]
        ids = ",".join(map(str, ids))
        self.assertEqual(zeroc("detokenize", "--model", MODEL, "--ids", ids).stdout, raw)
        self.assertEqual(zeroc_json("detokenize", "--model", MODEL, "--ids", ids)["text"],
                         raw.decode("utf-8", errors="replace"))

    def test_special_tokens(self):
        plain = zeroc_json("tokenize", "--model", MODEL, "--text", "a<|eos|>")["ids"]
        self.assertEqual(plain[-1], 2)
        with_bos = zeroc_json("tokenize", "--model", MODEL, "--text", "a<|eos|>", "--add-special")["ids"]
        self.assertEqual(with_bos, [1, *plain])
        as_text = zeroc_json("tokenize", "--model", MODEL, "--text", "a<|eos|>", "--no-parse-special")["ids"]
        self.assertNotIn(2, as_text)
        ids = ",".join(map(str, with_bos))
        self.assertEqual(zeroc_json("detokenize", "--model", MODEL, "--ids", ids)["text"], "<|bos|>a<|eos|>")
        self.assertEqual(zeroc_json("detokenize", "--model", MODEL, "--ids", ids, "--skip-special")["text"], "a")

    def test_human_output_is_a_list(self):
        ids = zeroc_json("tokenize", "--model", MODEL, "--text", PROMPT)["ids"]
        self.assertEqual(zeroc("tokenize", "--model", MODEL, "--text", PROMPT).stdout.decode(),
                         ",".join(map(str, ids)) + "\n")

    def test_errors(self):
        self.check_fails(["none.txt"], "tokenize", "--model", MODEL, "--file", "none.txt")
        self.check_fails(["tokenizer.json"], "tokenize", "--model", self.dir, "--text", "a")
        self.check_fails(["4096"], "detokenize", "--model", MODEL, "--ids", "1,4096")


class LogitsTest(CliTest):
    def setUp(self):
        self.ids = zeroc_json("tokenize", "--model", MODEL, "--text", PROMPT, "--add-special")["ids"]
        self.ids_file = self.write("ids.json", json.dumps(self.ids))
        self.base = ["logits", "--model", MODEL, "--ids-file", self.ids_file]

    def test_shape_and_values(self):
        answer = zeroc_json(*self.base, "--positions", "all", "--top", 4096)
        self.assertEqual(list(answer), ["positions"])
        self.assertEqual([p["pos"] for p in answer["positions"]], list(range(len(self.ids))))
        for entry in answer["positions"]:
            self.assertEqual(list(entry), ["pos", "logsumexp", "top"])
            logits = [logit for _, logit in entry["top"]]
            self.assertEqual(logits, sorted(logits, reverse=True))
            self.assertEqual(sorted(i for i, _ in entry["top"]), list(range(4096)))
            self.assertAlmostEqual(math.log(math.fsum(map(math.exp, logits))), entry["logsumexp"], places=5)

    def test_positions_are_picked_from_all(self):
        every = zeroc_json(*self.base, "--positions", "all", "--top", 3)["positions"]
        some = zeroc_json(*self.base, "--positions", "4,0,4", "--top", 3)["positions"]
        self.assertEqual([p["pos"] for p in some], [4, 0, 4])
        for entry in some:
            # Other rows run in other shapes of the matrix product: equal up to rounding.
            self.assertAlmostEqual(entry["logsumexp"], every[entry["pos"]]["logsumexp"], delta=0.05)
        last = zeroc_json(*self.base)["positions"]
        self.assertEqual([p["pos"] for p in last], [len(self.ids) - 1])
        self.assertEqual(len(last[0]["top"]), 20)

    def test_long_input_in_chunks(self):
        ids = (self.ids * 100)[:1100]
        path = self.write("long.json", json.dumps({"ids": ids}))
        wanted = [0, 63, 64, 511, 512, 700, 1099]
        base = ["logits", "--model", MODEL, "--ids-file", path, "--top", 1]
        every = zeroc_json(*base, "--positions", "all")["positions"]
        self.assertEqual([p["pos"] for p in every], list(range(1100)))
        some = zeroc_json(*base, "--positions", ",".join(map(str, wanted)))["positions"]
        for entry in some:
            self.assertAlmostEqual(entry["logsumexp"], every[entry["pos"]]["logsumexp"], delta=0.1)

    def test_errors(self):
        self.check_fails(["beyond"], *self.base, "--positions", len(self.ids))
        for name, content, expected in [("none", None, "none"), ("empty", "[]", "empty"), ("half", "[1,2", "array"),
                                        ("words", '["a"]', "ids[0]"), ("outside", "[1,2,4096]", "ids[2]"),
                                        ("negative", "[-1]", "ids[0]"), ("object", '{"id":[1]}', "'ids'"),
                                        ("long", json.dumps([1] * 8193), "8192")]:
            with self.subTest(name=name):
                path = pathlib.Path(self.dir) / f"{name}.json"
                if content is not None:
                    path.write_text(content)
                self.check_fails([f"{name}.json", expected], "logits", "--model", MODEL, "--ids-file", path)


class GenerateTest(CliTest):
    base = ["generate", "--model", MODEL, "--prompt", PROMPT, "--ignore-eos"]

    def test_shape(self):
        answer = zeroc_json(*self.base, "--max-tokens", 8)
        self.assertEqual(list(answer), ["text", "ids", "finish_reason", "kv_bytes_per_token"])
        self.assertEqual(len(answer["ids"]), 8)
        self.assertEqual(answer["finish_reason"], "length")
        config = json.loads((MODEL / "config.json").read_text())
        raw = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        self.assertGreaterEqual(answer["kv_bytes_per_token"], raw)

    def test_streamed_text_is_the_same(self):
        answer = zeroc_json(*self.base, "--max-tokens", 12)
        done = zeroc(*self.base, "--max-tokens", 12)
        self.assertEqual(done.stdout.decode(), answer["text"] + "\n")

    def test_greedy_follows_the_logits(self):
        prompt = zeroc_json("tokenize", "--model", MODEL, "--text", PROMPT, "--add-special")["ids"]
        first = zeroc_json(*self.base, "--max-tokens", 1)["ids"]
        top = zeroc_json("logits", "--model", MODEL, "--ids-file", self.write("p.json", json.dumps(prompt)), "--top", 1)
        self.assertEqual(first, [top["positions"][0]["top"][0][0]])

    def test_prompt_file_and_ids_are_the_same_prompt(self):
        ids = zeroc_json("tokenize", "--model", MODEL, "--text", PROMPT, "--add-special")["ids"]
        want = zeroc_json(*self.base, "--max-tokens", 4)
        tail = ["--max-tokens", 4, "--ignore-eos"]
        for flag, path in [("--prompt-file", self.write("p.txt", PROMPT)),
                           ("--ids-file", self.write("i.json", json.dumps(ids)))]:
            with self.subTest(flag=flag):
                self.assertEqual(zeroc_json("generate", "--model", MODEL, flag, path, *tail), want)

    def test_seed_decides(self):
        draw = [*self.base, "--max-tokens", 12, "--temperature", 1.5, "--seed"]
        self.assertEqual(zeroc_json(*draw, 1), zeroc_json(*draw, 1))
        self.assertNotEqual(zeroc_json(*draw, 1)["ids"], zeroc_json(*draw, 2)["ids"])

    def test_top_k_1_is_greedy(self):
        want = zeroc_json(*self.base, "--max-tokens", 8)["ids"]
        self.assertEqual(zeroc_json(*self.base, "--max-tokens", 8, "--temperature", 2, "--top-k", 1)["ids"], want)

    def test_stop_string(self):
        text = zeroc_json(*self.base, "--max-tokens", 24)["text"]
        stop = text[len(text) // 2:len(text) // 2 + 4]
        answer = zeroc_json(*self.base, "--max-tokens", 24, "--stop", "never in a text", "--stop", stop)
        self.assertEqual(answer["text"], text[:text.find(stop)])
        self.assertEqual(answer["finish_reason"], "stop")

    def test_errors(self):
        self.check_fails(["8192"], *self.base, "--max-tokens", 8192)
        self.check_fails(["none.txt"], "generate", "--model", MODEL, "--prompt-file", "none.txt")
        self.check_fails(["config.json"], "generate", "--model", self.dir, "--prompt", "a")
        self.check_fails(["ids[0]", "4096"], "generate", "--model", MODEL, "--ids-file", self.write("o.json", "[4096]"))


class BaselineTest(CliTest):
    """The methods of other papers, in the same engine."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.text = text_file(cls.dir, "prose.txt", 12000)
        cls.score = ["perplexity", "--model", MODEL, "--text", cls.text, "--context", 384, "--stride", 64,
                     "--max-windows", 2]
        cls.exact = zeroc_json(*cls.score)

    def test_one_size(self):
        # Exact bytes over stored bytes: codes and scales, and KIVI's 128 exact tokens of 384.
        for method, smaller in [("fp8", 2), ("int8", 1.9), ("kivi4", 1.8), ("kivi2", 2.2), ("hack", 5)]:
            with self.subTest(method=method):
                answer = zeroc_json(*self.score, "--method", method)
                self.assertEqual(list(answer), list(self.exact))
                self.assertEqual(answer["tokens"], self.exact["tokens"])
                self.assertLessEqual(answer["kv_bytes_per_token"], self.exact["kv_bytes_per_token"] / smaller)
                self.assertGreater(answer["kl"], 0)
                self.assertLess(answer["kl"], 1)

    def test_free_size(self):
        for method in ["h2o", "snapkv"]:
            with self.subTest(method=method):
                small = zeroc_json(*self.score, "--method", method, "--kv-bits", 4)
                large = zeroc_json(*self.score, "--method", method, "--kv-bits", 12)
                self.assertLess(small["kv_bytes_per_token"], large["kv_bytes_per_token"])
                self.assertGreater(small["kl"], large["kl"])

    def test_calibrated(self):
        for method in ["palu", "zeroc-paper"]:
            with self.subTest(method=method):
                answer = zeroc_json(*self.score, "--method", method, "--kv-bits", 12, "--calibration-text", self.text)
                self.assertLessEqual(answer["kv_bytes_per_token"], 0.78 * self.exact["kv_bytes_per_token"])
                self.assertGreater(answer["kl"], 0)
        short = self.write("short.txt", "A line.")
        self.check_fails(["short.txt", "tokens"], *self.score, "--method", "palu", "--calibration-text", short)

    def test_generates(self):
        base = ["generate", "--model", MODEL, "--prompt", PROMPT, "--max-tokens", 6, "--ignore-eos"]
        # So short a prompt lies in KIVI's exact window.
        self.assertEqual(zeroc_json(*base, "--method", "kivi4")["ids"], zeroc_json(*base)["ids"])

    def test_recall(self):
        case = self.write("case.jsonl", json.dumps({"prompt": PROMPT, "answer": " and", "group": "g"}))
        answer = zeroc_json("recall", "--model", MODEL, "--set", case, "--method", "fp8")
        self.assertEqual(list(answer), ["accuracy", "by_group", "kv_bytes_per_token"])
        self.assertEqual(answer["kv_bytes_per_token"], 4 * 2 * 2 * 64)


if __name__ == "__main__":
    unittest.main()
