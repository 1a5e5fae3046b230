#!/usr/bin/env python3
"""How fast the engine prefills and decodes with each profile, beside no compression and the machine's peaks, and what
the kernels of the compression cost by themselves. Writes docs/results/speed.{md,json}. Standard library only.

    bench/speed.py [--model DIR] [--profiles P,..] [--rounds N] [--repeat R] [--out docs/results]

The profiles take turns, round by round, so that a machine that slows down slows all of them; a ratio is the median of
the rounds' ratios, with the least and the greatest. Peaks are measured in the process that each figure is from. Wants
an otherwise idle machine. Exit code 0; 1 when a command failed; 2 for bad usage.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys

from zeroc_cli import ROOT, Cli, machine, machine_line, table

BENCH_DIR = "build/release/bench"
KERNEL_BENCHES = ["kv_bench", "attention_bench"]
WORK = [
    ("prefill of 4,096 tokens", ["prefill", "--prompt-tokens", "4096"]),
    ("decode behind 4,096 tokens", ["decode", "--context", "4096"]),
    ("decode behind 4,096 tokens, batch of 8", ["decode", "--context", "4096", "--batch", "8"]),
]


def measure(options):
    cli = Cli(keep=False)
    profiles = ["none", *options.profiles.split(",")]
    runs = []
    for round_idx in range(options.rounds):
        for work, arguments in WORK:
            for profile in profiles:
                chosen = [] if profile == "none" else ["--profile", profile]
                answer = cli.run(["bench", *arguments, "--model", options.model, "--repeat", options.repeat, *chosen])
                runs.append({"round": round_idx, "work": work, "profile": profile, **answer})
    return profiles, runs


def summary(profiles, runs, work):
    rows = []
    for profile in profiles:
        mine = [r for r in runs if r["work"] == work and r["profile"] == profile]
        base = [r for r in runs if r["work"] == work and r["profile"] == "none"]
        ratios = sorted(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(mine, base, strict=True))

        def median(field, of=mine):
            return statistics.median(r[field] for r in of)

        rows.append(
            {
                "profile": profile,
                "kv_bytes_per_token": mine[0]["kv_bytes_per_token"],
                "tokens_per_s": median("tokens_per_s"),
                "ratio": statistics.median(ratios),
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
                "flops_per_s": median("flops_per_s"),
                "flops_fraction": median("flops_fraction"),
                "bytes_per_s": median("bytes_per_s"),
                "bytes_fraction": median("bytes_fraction"),
            }
        )
    return rows


def check_programs():
    """Before the minutes that the measurement takes."""
    missing = [name for name in KERNEL_BENCHES if not (ROOT / BENCH_DIR / name).is_file()]
    if missing:
        sys.exit(f"{BENCH_DIR}: {' and '.join(missing)} missing; build with: deploy/build {' '.join(missing)}")


def kernel_bench(name, pattern):
    """What one program of kernels/bench counts, a benchmark each."""
    command = [f"{BENCH_DIR}/{name}", f"--benchmark_filter={pattern}", "--benchmark_format=json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)} failed ({done.returncode}): {done.stderr.strip()}")
    return {"command": shlex.join(command), "benchmarks": json.loads(done.stdout)["benchmarks"]}


def cost_part(cost):
    """Key map, packing and query map of a layer shaped as Llama-3.2-1B's, and as one with heads of 128."""
    rows = []
    for b in cost["benchmarks"]:
        _, shape, runs = b["name"].split("/")[:3]
        us = [f"{b[field] / 1e3:.2f}" for field in ("k_map_ns", "k_pack_ns", "v_pack_ns", "q_map_ns", "linear_ns")]
        rows.append([shape, runs, *us, f"{b['kv_share_%']:.2f} %", f"{b['q_share_%']:.2f} %"])
    head = ["shape", "bits", "K map", "K pack", "V pack", "Q map", "linear", "K map + packs / linear", "Q map / linear"]
    return [
        "",
        "## What packing costs a prefill",
        "",
        f"Microseconds of one thread per token and layer, all KV heads, from `{cost['command']}`. Linear: the layer's",
        "matrix products; attention is left out of it, so the true shares are smaller.",
        "",
        *table(head, rows),
    ]


def attention_part(attention):
    """Decode attention over 512 MiB of packed history."""
    rows = [
        [b["name"].split("/")[1][5:], b["name"].split("/")[2][6:], f"{b['GB/s']:.1f}", f"{100 * b['of_read']:.0f} %"]
        + [f"{1e9 * b['per_token']:.1f}"]
        for b in attention["benchmarks"]
    ]
    head = ["bits", "queries per KV head", "GB/s of KV bytes", "of read bandwidth", "ns per token and head"]
    return [
        "",
        "## Decode attention on packed bytes",
        "",
        f"One thread over more history than any cache holds, from `{attention['command']}`.",
        "",
        *table(head, rows),
    ]


def page(result):
    lines = [
        "# Speed with and without compression",
        "",
        f"Made by `{result['command']}` on {machine_line(result['machine'])}.",
        f"Model `{result['model']}`, {result['runs'][0]['threads']} threads, {result['rounds']} rounds in turns.",
        "Ratio: tokens/s over those without compression in the same round, median (least to greatest). Fractions are",
        "of peaks measured in the same process: multiply-adds in registers (AMX where there is one), reads of 512 MiB",
        "of memory; weights of a small model fit the last-level cache, so bytes/s may exceed memory's. Commands are in",
        "`speed.json`.",
    ]
    for work, rows in result["summary"].items():
        cells = [
            [
                r["profile"],
                f"{r['kv_bytes_per_token']:.0f}",
                f"{r['tokens_per_s']:,.0f}",
                f"{r['ratio']:.2f}x ({r['ratio_min']:.2f} to {r['ratio_max']:.2f})",
                f"{r['flops_per_s'] / 1e9:.0f} G, {100 * r['flops_fraction']:.1f} %",
                f"{r['bytes_per_s'] / 1e9:.1f} G, {100 * r['bytes_fraction']:.0f} %",
            ]
            for r in rows
        ]
        head = ["profile", "KV bytes/token", "tokens/s", "ratio", "FLOP/s, of peak", "bytes/s, of read peak"]
        lines += ["", f"## {work[0].upper()}{work[1:]}", "", *table(head, cells)]
    return "\n".join([*lines, *cost_part(result["packing"]), *attention_part(result["attention"]), ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/zeroc-demo", help="checkpoint with a plan [models/zeroc-demo]")
    parser.add_argument("--profiles", default="q8,z4,z3,z2,z1.75,z1.5", help="[q8,z4,z3,z2,z1.75,z1.5]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds [5]")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each command [5]")
    parser.add_argument("--out", default="docs/results", help="folder for the results [docs/results]")
    options = parser.parse_args()
    check_programs()
    result = {"command": shlex.join(["bench/speed.py", *sys.argv[1:]]), "machine": machine(), "model": options.model}
    profiles, runs = measure(options)
    result.update(rounds=options.rounds, runs=runs)
    result["packing"] = kernel_bench("kv_bench", "/(1b|1b_dim128)/")
    result["attention"] = kernel_bench("attention_bench", "^Decode")
    result["summary"] = {work: summary(profiles, runs, work) for work, _ in WORK}
    out = pathlib.Path(ROOT / options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "speed.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
