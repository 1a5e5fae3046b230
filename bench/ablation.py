#!/usr/bin/env python3
"""What each part of the compression is worth: the same calibration with one part changed, on the same text at the same
bytes. Writes docs/results/ablation.{md,json}. Standard library only.

    bench/ablation.py [--eval DIR] [--probe-windows N] [--windows N] [--only NAME,..] [--fresh] [--out docs/results]

Every variant is a whole `zeroc calibrate` of the bundled model with two rungs, of at most 2 and 1.5 bits per element,
decode-scored on the second half of WikiText-2 validation, 2,048 tokens at the end of each window of 4,096. The
calibrations are the quick ones, with calibrate's defaults; that hits every variant alike. --eval holds
wikitext-2-valid.txt [../shared/eval]. Answers are kept in build/bench. Exit code 0; 1 when a command failed; 2 for bad
usage.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys

from zeroc_cli import ROOT, Cli, machine, machine_line, table

MODEL = "models/zeroc-demo"
RECORDS = "build/bench/records.txt"
RECORDS_COMMAND = ["tools/calibration_text.py", RECORDS, "--bytes", "32768"]
RUNGS = ["z2", "z1.5"]

# Part, what is changed, options; texts: from which parts of which texts, where it is not the usual pair.
VARIANTS = [
    ("all", "nothing", [], None),
    ("basis", "none: raw coordinates", ["--basis", "none"], None),
    ("basis", "Hadamard only", ["--basis", "hadamard"], None),
    ("basis", "SVD of [Q;K], orthogonal", ["--basis", "svd-qk"], None),
    ("Hadamard in runs", "off: one run, rotation undone", ["--no-hadamard"], None),
    ("layer axis", "off: the same shapes in every layer", ["--no-layer-axis"], None),
    ("mass correction", "off", ["--no-mass"], None),
    ("scales", "affine only", ["--no-shared"], None),
    ("scales", "shared only", ["--no-affine"], None),
    ("token axis", "no young tiers", ["--no-young"], None),
    ("windows", "16 sink tokens always", ["--sink", "16"], None),
    ("windows", "exact 128 recent and 16 sink tokens", ["--recent", "128", "--sink", "16"], None),
    ("text", "prose only", [], ["valid@0:50"]),
    ("text", "records only", [], ["records"]),
    ("length", "prose only, a tenth of it", [], ["valid@0:5"]),
    ("length", "moments from windows of 512 tokens", ["--context", "512"], None),
]


def texts(options, names):
    paths = {"records": RECORDS}
    for share in ("0:50", "0:5"):
        paths[f"valid@{share}"] = f"{options.eval}/wikitext-2-valid.txt@{share}"
    return [part for name in names or ["valid@0:50", "records"] for part in ("--text", paths[name])]


def measure(options):
    cli = Cli(keep=not options.fresh)
    rows = []
    for part, change, extra, names in VARIANTS:
        if options.only and part not in options.only.split(","):
            continue
        arguments = ["calibrate", "--model", MODEL, *texts(options, names)]
        arguments += ["--heldout", f"{options.eval}/wikitext-2-valid.txt@50:100", "--score-windows", options.windows]
        arguments += ["--probe-windows", options.probe_windows, "--rungs", *[name[1:] for name in RUNGS]]
        arguments += ["--budget", "0", "--budget-rel", "0", "--no-standard", *extra]
        answer = cli.run(arguments, files=[f"{options.eval}/wikitext-2-valid.txt", RECORDS], outputs=["--out"])
        profiles = {p["name"]: p for p in answer["profiles"]}
        rungs = {name: profiles.get(name) for name in RUNGS}
        rows.append({"part": part, "change": change, "command": answer["command"], "rungs": rungs})
    return rows


def page(result):
    rows = []
    base = result["rows"][0]["rungs"]
    for row in result["rows"]:
        cells = [row["part"], row["change"]]
        for name in RUNGS:
            rung = row["rungs"][name]
            if rung is None:
                cells += ["not this small", "", ""]
                continue
            cells.append(f"{rung['kv_bytes_per_token']:.0f}")
            cells.append(f"{rung['kl']:.5f} ({rung['kl'] / base[name]['kl']:.2f}x)")
            cells.append(f"{100 * rung['ppl_increase_rel']:+.2f} %")
        rows.append(cells)
    head = ["part", "change"]
    for name in RUNGS:
        head += [f"{name}: bytes/token", "KL (against all)", "increase"]
    return "\n".join(
        [
            "# What each part is worth",
            "",
            f"Made by `{result['command']}` on {machine_line(result['machine'])};",
            f"the records by `{shlex.join(RECORDS_COMMAND)}`. Each row is a whole calibration; its command is in",
            "`ablation.json`. The rungs take at most 2 and 1.5 bits per element, all bytes counted at 4,096 tokens; KL",
            "in nats per token, and the increase that a profile promises (the larger of direct and from KL), on",
            "the second half of WikiText-2 validation.",
            "",
            *table(head, rows),
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", default="../shared/eval", help="folder of the text [../shared/eval]")
    parser.add_argument("--probe-windows", type=int, default=2, help="windows that probes are measured on [2]")
    parser.add_argument("--windows", type=int, default=4, help="held-out windows of 2,048 scored tokens [4]")
    parser.add_argument("--only", default="", help="only these parts, separated by commas ('all' first)")
    parser.add_argument("--fresh", action="store_true", help="do not use kept answers")
    parser.add_argument("--out", default="docs/results", help="folder for the results [docs/results]")
    options = parser.parse_args()
    if not (ROOT / options.eval / "wikitext-2-valid.txt").is_file():
        parser.error(f"--eval {options.eval}: no wikitext-2-valid.txt there")
    (ROOT / RECORDS).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, *RECORDS_COMMAND], cwd=ROOT, check=True)
    result = {"command": shlex.join(["bench/ablation.py", *sys.argv[1:]]), "machine": machine()}
    result["rows"] = measure(options)
    out = pathlib.Path(ROOT / options.out)
    (out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "ablation.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
