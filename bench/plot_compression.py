#!/usr/bin/python3
"""Draws docs/results/compression.svg from compression.json: bytes per token against KL, one mark per method.

    bench/plot_compression.py [docs/results/compression.json]

Needs python3-matplotlib (deploy/setup --bench), hence Debian's own interpreter.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

FLOOR = 1e-5  # nats per token; what lies below is drawn here


def main():
    root = pathlib.Path(__file__).resolve().parents[1]
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else root / "docs/results/compression.json"
    entries = json.loads(path.read_text())["entries"]
    groups = {}
    for entry in entries:
        if entry["method"] == "none":
            continue
        uniform = entry["method"] == "zeroc" and entry["setting"].startswith("q")
        name = "zeroc, one width everywhere (q2 to q8)" if uniform else entry["method"]
        groups.setdefault(name, []).append((entry["kv_bytes_per_token"], max(FLOOR, entry["kl"])))
    matplotlib.rcParams["svg.hashsalt"] = "zeroc"  # the same file from the same data
    colours = [*matplotlib.colormaps["tab10"].colors, "black"]  # as many as there are methods
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=colours)
    figure, axes = plt.subplots(figsize=(10.5, 5.5))
    for method, points in groups.items():
        points.sort()
        ours = method == "zeroc"
        axes.plot(
            *zip(*points),
            marker="o" if ours else "s",
            markersize=5,
            linewidth=2 if ours else 0.8,
            linestyle="-" if ours else ":",
            label=method,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("KV bytes per token at 4,096 tokens, everything counted (bf16: 2,048)")
    axes.set_ylabel("KL from the uncompressed model, nats per token")
    axes.grid(True, color="#e3e3e3")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
