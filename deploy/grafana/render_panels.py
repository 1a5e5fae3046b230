#!/usr/bin/env python3
"""Draws the panels of the dashboards from what a Prometheus answered, where no Grafana is at hand.

    tests/deploy/observability_test.py --render DIR LiveTest      runs a cluster, keeps the answers in DIR
    deploy/grafana/render_panels.py DIR OUT.png [PANEL ..]        draws all panels, or those whose titles are given

Needs python3-matplotlib (deploy/setup --bench).
"""

import json
import pathlib
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = 3


def read(folder):
    """Panel title -> list of (label, times, values)."""
    panels = {}
    for path in sorted(pathlib.Path(folder).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            target = json.loads(line)
            for series in target["series"]:
                points = [(float(t), float(v)) for t, v in series["values"] if v not in ("NaN", "+Inf", "-Inf")]
                label = re.sub(r"{{(\w+)}}", lambda name: series["metric"].get(name.group(1), ""), target["legend"])
                if points:
                    panels.setdefault(target["panel"], []).append((label, *zip(*points)))
    return panels


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    panels = read(sys.argv[1])
    titles = sys.argv[3:] or [title for title in panels if title != "What runs"]
    start = min(times[0] for title in titles for _, times, _ in panels[title])
    rows = (len(titles) + COLUMNS - 1) // COLUMNS
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(15, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(titles):]:
        axis.axis("off")
    for axis, title in zip(axes.flat, titles):
        for label, times, values in panels[title]:
            axis.plot([t - start for t in times], values, label=label or None, linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        if any(label for label, _, _ in panels[title]):
            axis.legend(fontsize=6, loc="upper left")
        axis.set_xlabel("s", fontsize=8)
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=80)


if __name__ == "__main__":
    main()
