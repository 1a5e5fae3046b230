#!/usr/bin/env python3
"""Every method of KV compression in the same engine, on the same text, all bytes counted: the table and the data of the
plot in docs/results/compression.{md,json}. Standard library only; bench/plot_compression.py draws.

    bench/compression.py [--eval DIR] [--windows N] [--cases N] [--other-cases N] [--perplexity-only]
                         [--methods M,..] [--fresh | --any-build] [--out DIR]

Perplexity is decode-scored over windows of 4,096 tokens, 1,024 of each scored, on WikiText-2 test, which neither
calibration nor the ladder saw. Each baseline is set against the profile of the plan with at most its bytes: a paired
bootstrap over blocks of 64 tokens gives the 95 % interval of the difference. The rungs named in CLOSER are also read on
a held-out novel and asked the easy recall set. --eval holds wikitext-2-test.txt, heldout-novel.txt, recall.jsonl and
recall_hard.jsonl [../shared/eval]. Answers are kept in build/bench; --fresh asks again. Exit code 0; 1 when a command
failed; 2 for bad usage.
"""

import argparse
import json
import math
import pathlib
import random
import shlex
import sys

from zeroc_cli import ROOT, Cli, machine, machine_line, table

MODEL = "models/zeroc-demo"
PLAN = f"{MODEL}/zeroc.plan"
CONTEXT, STRIDE = 4096, 1024
CALIBRATION = "wikitext-2-valid.txt@0:50"  # what the plan was made from, but for the records
BLOCK = 64  # tokens that the bootstrap draws together: neighbours depend on each other
DRAWS = 2000
CLOSER = ["z2", "z1.75", "rel"]  # profiles looked at closer: every recall case, the novel, the easy set
NOVEL_WINDOWS = 16
# Method and, where its size is free, bits per element (bf16 has 16).
BASELINES = [
    ("fp8", None),
    ("int8", None),
    ("kivi4", None),
    ("kivi2", None),
    ("hack", None),
    ("h2o", 8),
    ("h2o", 3),
    ("h2o", 1.5),
    ("snapkv", 8),
    ("snapkv", 3),
    ("snapkv", 1.5),
    ("palu", 8),
    ("palu", 4),
    ("palu", 2.1),
    ("zeroc-paper", 8),
    ("zeroc-paper", 4),
    ("zeroc-paper", 1.5),
]


def label(method, bits):
    return method if bits is None else f"{method} at {bits} bits"


class Bench:
    def __init__(self, options):
        self.options = options
        self.cli = Cli(keep=not options.fresh, any_build=options.any_build)

    def chosen(self, method, bits):
        """The options that choose a method or, for `zeroc`, a profile (in `bits`)."""
        if method == "zeroc":
            return ["--profile", bits]
        sized = [] if bits is None else ["--kv-bits", bits]
        learned = method in ("palu", "zeroc-paper")
        return ["--method", method, *sized] + (
            ["--calibration-text", f"{self.options.eval}/{CALIBRATION}"] if learned else []
        )

    def perplexity(self, method, bits, text="wikitext-2-test.txt", windows=None):
        answer = self.cli.run(
            ["perplexity", "--model", MODEL, "--text", f"{self.options.eval}/{text}", "--context", CONTEXT]
            + ["--stride", STRIDE, "--max-windows", windows or self.options.windows, *self.chosen(method, bits)],
            files=self.files(method),
            outputs=["--tokens-out"],
            same_answer=["--kl-base", self.kl_base(text, windows or self.options.windows)],
        )
        rows = [line.split() for line in (ROOT / answer["tokens-out"]).read_text().splitlines()]
        answer["token_nll"] = [float(row[0]) for row in rows]
        answer["token_kl"] = [float(row[1]) for row in rows]
        return answer

    def kl_base(self, text, windows):
        """Where the uncompressed model's logits on these windows are kept, of this build of the program."""
        return f"build/bench/kl-base-{text}-{windows}-{self.cli.program()[:12]}"

    def recall(self, method, bits, name, cases):
        arguments = ["recall", "--model", MODEL, "--set", f"{self.options.eval}/{name}", "--max-cases", cases]
        return self.cli.run([*arguments, *self.chosen(method, bits)], files=self.files(method))

    def files(self, method):
        """What an answer depends on beside its arguments."""
        return [PLAN] if method == "zeroc" else [f"{self.options.eval}/{CALIBRATION.split('@')[0]}"]

    def plan(self):
        return self.cli.run(["plan", PLAN])

    def measure(self):
        wanted = self.options.methods.split(",") if self.options.methods else None
        base = self.perplexity("none", None)
        entries = [self.entry("none", None, base, base)]
        for profile in self.plan()["profiles"]:
            entries.append(self.entry("zeroc", profile["name"], self.perplexity("zeroc", profile["name"]), base))
        for method, bits in BASELINES:
            if wanted is None or method in wanted:
                entries.append(self.entry(method, bits, self.perplexity(method, bits), base))
        for entry in [] if self.options.perplexity_only else entries:
            close = entry["method"] == "none" or entry["setting"] in CLOSER
            cases = self.options.cases if close else self.options.other_cases
            hard = self.recall(entry["method"], entry["setting"], "recall_hard.jsonl", cases)
            entry["recall_hard"] = hard["accuracy"]
            entry["recall_hard_by_group"] = hard["by_group"]
            entry["commands"].append(hard["command"])
        return entries

    def closer(self):
        """The novel and the easy recall set, for no compression and for a few profiles."""
        rows = []
        if self.options.perplexity_only:
            return rows
        for method, setting in [("none", None), *(("zeroc", name) for name in CLOSER)]:
            novel = self.perplexity(method, setting, "heldout-novel.txt", NOVEL_WINDOWS)
            easy = self.recall(method, setting, "recall.jsonl", 0)
            base = rows[0]["ppl"] if rows else novel["ppl"]
            rows.append(
                {
                    "name": setting or method,
                    "ppl": novel["ppl"],
                    "tokens": novel["tokens"],
                    "increase_direct": novel["ppl"] / base - 1,
                    "increase_kl": math.expm1(novel["kl"]),
                    "recall": easy["accuracy"],
                    "commands": [novel["command"], easy["command"]],
                }
            )
        return rows

    def entry(self, method, setting, score, base):
        increase = score["ppl"] / base["ppl"] - 1
        from_kl = math.expm1(score["kl"])
        return {
            "method": method,
            "setting": setting,
            "name": f"zeroc {setting}" if method == "zeroc" else label(method, setting),
            "kv_bytes_per_token": score["kv_bytes_per_token"],
            "ppl": score["ppl"],
            "increase_direct": increase,
            "increase_kl": from_kl,
            "promise": max(increase, from_kl),
            "kl": score["kl"],
            "tokens": score["tokens"],
            "commands": [score["command"]],
            "commit": score["commit"],
            "_nll": score["token_nll"],
            "_kl": score["token_kl"],
        }


def bootstrap(differences):
    """Mean and 95 % interval of per-token differences, resampling blocks of neighbours."""
    blocks = [sum(differences[i : i + BLOCK]) for i in range(0, len(differences), BLOCK)]
    rng = random.Random(1)
    n = len(blocks)
    means = sorted(sum(rng.choices(blocks, k=n)) / len(differences) for _ in range(DRAWS))
    return {
        "mean": sum(differences) / len(differences),
        "low": means[int(0.025 * DRAWS)],
        "high": means[int(0.975 * DRAWS) - 1],
    }


def duels(entries):
    """Each baseline against our profile of the largest size that is not above its bytes."""
    ours = sorted((e for e in entries if e["method"] == "zeroc"), key=lambda e: e["kv_bytes_per_token"])
    result = []
    for theirs in entries:
        if theirs["method"] in ("none", "zeroc"):
            continue
        fitting = [e for e in ours if e["kv_bytes_per_token"] <= theirs["kv_bytes_per_token"]]
        if not fitting:
            result.append({"baseline": theirs["name"], "profile": None})
            continue
        mine = min(fitting, key=lambda e: e["kl"])
        kl = bootstrap([a - b for a, b in zip(mine["_kl"], theirs["_kl"], strict=True)])
        nll = bootstrap([a - b for a, b in zip(mine["_nll"], theirs["_nll"], strict=True)])
        result.append(
            {
                "baseline": theirs["name"],
                "profile": mine["name"],
                "bytes": [mine["kv_bytes_per_token"], theirs["kv_bytes_per_token"]],
                "kl_difference": kl,
                "nll_difference": nll,
                "kl_won": kl["high"] < 0,
                "ppl_won": nll["high"] < 0,
                "ppl_lost": nll["low"] > 0,
            }
        )
    return result


def signed(interval, scale, digits):
    return (
        f"{scale * interval['mean']:+.{digits}f} "
        f"[{scale * interval['low']:+.{digits}f}, {scale * interval['high']:+.{digits}f}]"
    )


def page(result):
    entries = sorted(result["entries"], key=lambda e: -e["kv_bytes_per_token"])
    raw = entries[0]["kv_bytes_per_token"]
    rows = [
        [
            e["name"],
            f"{e['kv_bytes_per_token']:.0f}",
            f"{raw / e['kv_bytes_per_token']:.2f}x",
            f"{e['ppl']:.3f}",
            f"{100 * e['increase_direct']:+.2f} %",
            f"{100 * e['increase_kl']:.2f} %",
            f"{e['kl']:.5f}",
            *([f"{100 * e['recall_hard']:.1f} %"] if "recall_hard" in e else []),
        ]
        for e in entries
    ]
    with_recall = "recall_hard" in entries[0]
    fights = [
        [
            d["baseline"],
            d["profile"] or "none this small",
            f"{d['bytes'][0]:.0f} / {d['bytes'][1]:.0f}" if d["profile"] else "",
            signed(d["kl_difference"], 1000, 3) if d["profile"] else "",
            signed(d["nll_difference"], 100, 2) if d["profile"] else "",
            "" if not d["profile"] else "yes" if d["kl_won"] and d["ppl_won"] else "KL only" if d["kl_won"] else "no",
        ]
        for d in result["duels"]
    ]
    closer = result["closer"]
    closer_rows = [
        [
            c["name"],
            f"{c['ppl']:.3f}",
            f"{100 * c['increase_direct']:+.2f} %",
            f"{100 * c['increase_kl']:.2f} %",
            f"{100 * c['recall']:.1f} %",
        ]
        for c in closer
    ]
    closer_part = []
    if closer:
        closer_part = [
            "## A held-out novel, and the easy recall set",
            "",
            f"Also seen by neither calibration nor the ladder: {closer[0]['tokens']:,} tokens of a novel, scored in",
            "the same way, and greedy exact match on every case of the easy recall set.",
            "",
            *table(["profile", "perplexity", "increase", "from KL", "recall, easy set"], closer_rows),
            "",
        ]
    recall_says = ""
    if with_recall:
        recall_says = (
            f" Recall is of the hard set: {result['cases'][0]} cases for none and {', '.join(CLOSER)},"
            f" {result['cases'][1]} for the other rows."
        )
    tokens = entries[0]["tokens"]
    return "\n".join(
        [
            "# Methods of KV compression, side by side",
            "",
            f"Made by `{result['command']}` on {machine_line(result['machine'])}.",
            "Every command is in `compression.json`. WikiText-2 test, which neither calibration nor the ladder saw,",
            f"{tokens:,} tokens scored through decode behind 3,072 to 4,095 tokens of context; all bytes held at 4,096",
            "tokens count: codes, scales, exact windows, padding, state. KL is nats per token against the uncompressed",
            f"model.{recall_says}",
            "What each baseline is: [baselines.md](../baselines.md).",
            "",
            "![bytes against KL](compression.svg)",
            "",
            *table(
                ["method", "KV bytes/token", "ratio", "perplexity", "increase", "from KL", "KL"]
                + (["recall, hard set"] if with_recall else []),
                rows,
            ),
            "",
            "## Each baseline against the profile that takes no more bytes",
            "",
            "Differences are ours minus theirs, mean and 95 % interval (paired bootstrap over blocks of 64 tokens):",
            "KL in millinats per token, log-perplexity in percent. Won: both intervals lie below zero.",
            "",
            *table(["baseline", "ours", "bytes, ours / theirs", "KL", "log-perplexity", "won"], fights),
            "",
            *closer_part,
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", default="../shared/eval", help="folder of the texts [../shared/eval]")
    parser.add_argument("--windows", type=int, default=30, help="windows of 1,024 scored tokens [30]")
    parser.add_argument(
        "--cases",
        type=int,
        default=200,
        help="recall cases of the hard set, evenly over its groups, for no compression and CLOSER; 0: all [200]",
    )
    parser.add_argument("--other-cases", type=int, default=20, help="the same for every other row [20]")
    parser.add_argument("--perplexity-only", action="store_true", help="leave out recall and the novel")
    parser.add_argument("--methods", default="", help="only these baselines, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="do not use kept answers")
    parser.add_argument("--any-build", action="store_true", help="use kept answers of other builds of the program, too")
    parser.add_argument("--out", default="docs/results", help="folder for the results [docs/results]")
    options = parser.parse_args()
    if not (ROOT / options.eval / "wikitext-2-test.txt").is_file():
        parser.error(f"--eval {options.eval}: no wikitext-2-test.txt there")
    bench = Bench(options)
    result = {"command": shlex.join(["bench/compression.py", *sys.argv[1:]]), "machine": machine()}
    result["cases"] = [options.cases, options.other_cases]
    entries = bench.measure()
    result["entries"] = entries
    result["duels"] = duels(entries)
    result["closer"] = bench.closer()
    for entry in entries:
        del entry["_nll"], entry["_kl"]
    out = pathlib.Path(ROOT / options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compression.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "compression.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
