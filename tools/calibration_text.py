#!/usr/bin/env python3
"""Writes text that prose does not cover, for `zeroc calibrate --text`: tables, JSON, logs, code, questions that are
answered from earlier lines. Keys and queries of such text lie elsewhere than those of an encyclopaedia; a basis and a
ladder from prose alone underrate them. Deterministic for a seed. Standard library only.

    tools/calibration_text.py OUT [--bytes N] [--seed N]

No words or forms are taken from an evaluation set.
"""

import argparse
import json
import random
import sys

PARTS = ["ka", "lo", "mer", "tin", "vos", "dra", "shel", "bur", "nia", "pol", "gri", "sta", "wen", "fo", "rus", "hem"]
THINGS = ["valve", "ledger", "crate", "engine", "ticket", "lamp", "harbour", "sensor", "barrel", "window", "account"]
PLACES = ["the mill", "the north gate", "the cellar", "platform four", "the archive", "the long hall", "the yard"]
COLOURS = ["red", "green", "grey", "blue", "white", "black", "yellow"]
VERBS = ["was moved to", "stood in", "was found near", "is kept at", "went back to", "was sold from"]


class Writer:
    def __init__(self, seed):
        self.random = random.Random(seed)

    def name(self):
        return "".join(self.random.choices(PARTS, k=self.random.randint(2, 3))).capitalize()

    def number(self, digits=None):
        return "".join(self.random.choices("0123456789", k=digits or self.random.randint(2, 6)))

    def log(self):
        lines = []
        for _ in range(self.random.randint(6, 16)):
            r = self.random
            clock = f"{r.randint(0, 23):02}:{r.randint(0, 59):02}:{r.randint(0, 59):02}"
            lines.append(f"{clock} {r.choice(['info', 'warn', 'error'])} {self.name().lower()}[{self.number(4)}]: "
                         f"{r.choice(THINGS)} {self.number()} took {self.number(3)} ms")
        return "\n".join(lines)

    def record(self):
        keys = self.random.sample(THINGS, self.random.randint(3, 6))
        return json.dumps({"id": int(self.number(5)), "owner": self.name(), **{k: int(self.number()) for k in keys}})

    def table(self):
        columns = self.random.sample(THINGS, 3)
        rows = [f"{self.name()},{','.join(self.number() for _ in columns)}" for _ in range(self.random.randint(5, 14))]
        return "\n".join(["name," + ",".join(columns), *rows])

    def code(self):
        name, a, b = self.name().lower(), *self.random.sample(THINGS, 2)
        return (f"def {name}({a}, {b}):\n    if {a} > {self.number(2)}:\n        return {b} + {self.number(3)}\n"
                f"    total = 0\n    for i in range({a}):\n        total += i * {b}\n    return total\n")

    # Statements, noise, then questions about some of them: what attention to a far, exact token is for.
    def questions(self):
        told = {}
        lines = []
        for _ in range(self.random.randint(6, 20)):
            who = self.name()
            what = f"{self.random.choice(COLOURS)} {self.random.choice(THINGS)}"
            told[who] = (what, self.number(4))
            lines.append(f"{who} owns the {what}, tag {told[who][1]}.")
            if self.random.random() < 0.5:
                lines.append(self.sentence())
        for who in self.random.sample(sorted(told), min(4, len(told))):
            lines.append(f"Question: which tag has what {who} owns? Answer: the {told[who][0]}, tag {told[who][1]}.")
        return "\n".join(lines)

    def sentence(self):
        thing = f"{self.random.choice(COLOURS)} {self.random.choice(THINGS)}"
        return f"The {thing} of {self.name()} {self.random.choice(VERBS)} {self.random.choice(PLACES)}."

    def prose(self):
        return " ".join(self.sentence() for _ in range(self.random.randint(4, 10)))

    def text(self, n_bytes):
        kinds = [self.log, self.record, self.table, self.code, self.questions, self.prose]
        pieces, size = [], 0
        while size < n_bytes:
            pieces.append(self.random.choice(kinds)())
            size += len(pieces[-1]) + 2
        return "\n\n".join(pieces)[:n_bytes]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="file to write")
    parser.add_argument("--bytes", type=int, default=200000, help="size of the text [200000]")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything random [1]")
    options = parser.parse_args()
    if options.bytes < 1:
        parser.error("--bytes must be at least 1")
    try:
        with open(options.out, "w", encoding="ascii") as file:
            file.write(Writer(options.seed).text(options.bytes))
    except OSError as error:
        print(f"{options.out}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
