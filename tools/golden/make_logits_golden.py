#!/usr/bin/env python3
"""Makes tests/data/zeroc_demo_logits.json: what a float64 forward pass gives for the demo model.

    python3 tools/golden/make_logits_golden.py [--model DIR] [--out FILE]

Needs numpy. Shares no code with the engine: reads config.json, model.safetensors and tokenizer.json by itself and
rounds nothing; the weights are what the file holds, widened. The prompts are texts of our own, below. Their ids come
from a plain byte-pair merge that splits at spaces only: real tokens, though not always those of the model's tokenizer,
which makes no difference to the arithmetic. The ids stand in the output, so tests need no tokenizer.
"""

import argparse
import json
import math
import pathlib
import re
import struct

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOP = 20
GREEDY_STEPS = 16

SHORT = "The ship left the harbour at"

PARAGRAPH = (
    "The road to the mill ran along the river for two miles, and in the spring, when the water was high, the "
    "carter had to walk beside his horse and hold the wheel. He did not mind it. He had done the same thing "
    "every week for twenty years, and he knew every stone of the way.")

LETTER = (
    "My dear sister, I have to tell you of a strange evening. We were sitting in the kitchen, my wife and I, "
    "when there was a knock at the door, and a man whom neither of us had seen before asked for a light. The "
    "number of the old warehouse is 48213. His coat was wet, and he had no hat. I gave him the lamp from the "
    "window and asked him to come in, but he shook his head and said that somebody was waiting for him on the "
    "bridge. He thanked us and was gone. In the morning the lamp stood on the step, filled and clean, and beside "
    "it there was a small parcel with my name on it. There was a watch in the parcel, the very watch that our "
    "father had lost in the year of the flood. You will remember how he looked for it under every tree. I have "
    "asked the miller, and the priest, and the two brothers who keep the ferry, and none of them has seen a man "
    "without a hat. My wife says that I should not ask any more. I think that she is right, but I wind the watch "
    "every night, and it keeps better time than the clock of the church. Write to me soon, and tell me what you "
    "make of all this. The children send you their love. What is the number of the old warehouse? The number of "
    "the old warehouse is")

CODE = (
    "## Abstract\n\nThis proposal adds a function that returns the first element of a list, or a default value "
    "when the list is empty.\n\n## Motivation\n\nToday every program writes this:\n\n    if len(items) > "
    "0:\n        first = items[0]\n    else:\n        first = None\n\n")


def read_tensors(path):
    """name -> float64 array, from the safetensors container: 8 bytes of header length, a JSON header, the data."""
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + header_bytes])
    data = memoryview(raw)[8 + header_bytes:]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16
            values = bits.view(np.float32)
        elif entry["dtype"] == "F32":
            values = np.frombuffer(data[begin:end], "<f4")
        else:
            raise ValueError(f"{name}: dtype {entry['dtype']} is not read here")
        tensors[name] = values.astype(np.float64).reshape(entry["shape"])
    return tensors


class Model:
    """Llama: RMSNorm, rotary positions (half-split), grouped-query attention, SwiGLU."""

    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors = read_tensors(directory / "model.safetensors")
        if self.config.get("rope_scaling") or self.config.get("attention_bias") or self.config.get("mlp_bias"):
            raise ValueError("rope scaling and biases are not computed here")

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.tensors[name]

    def rotate(self, x):
        """x: [tokens, heads, head_dim]; coordinate i turns with i + head_dim / 2."""
        half = x.shape[-1] // 2
        frequency = self.config["rope_theta"] ** (-np.arange(half) / half)
        angle = np.arange(len(x))[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def attention(self, x, prefix):
        n, dim = len(x), self.config["head_dim"]
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q, k, v = (x @ self.tensors[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
        q = self.rotate(q.reshape(n, heads, dim))
        k = self.rotate(k.reshape(n, kv_heads, dim))
        v = v.reshape(n, kv_heads, dim)
        mask = np.triu(np.full((n, n), -np.inf), 1)
        out = np.empty((n, heads, dim))
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, group].T / math.sqrt(dim) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        return out.reshape(n, heads * dim) @ self.tensors[f"{prefix}.o_proj.weight"].T

    def mlp(self, x, prefix):
        gate, up, down = (self.tensors[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        g = x @ gate
        return (g / (1 + np.exp(-g)) * (x @ up)) @ down

    def logits(self, ids):
        """[len(ids), vocab_size]"""
        embedding = self.tensors["model.embed_tokens.weight"]
        x = embedding[ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{prefix}.input_layernorm.weight"), f"{prefix}.self_attn")
            x = x + self.mlp(self.norm(x, f"{prefix}.post_attention_layernorm.weight"), f"{prefix}.mlp")
        head = embedding if self.config["tie_word_embeddings"] else self.tensors["lm_head.weight"]
        return self.norm(x, "model.norm.weight") @ head.T


def byte_letters():
    """GPT-2's letters for bytes: printable Latin-1 as it is, the others from U+0100 on."""
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}


class Merger:
    """Byte-pair merges of a tokenizer.json, over words that are split in front of spaces."""

    def __init__(self, directory):
        model = json.loads((directory / "tokenizer.json").read_text())["model"]
        self.vocab = model["vocab"]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(pairs)}
        self.letters = byte_letters()

    def word_ids(self, word):
        parts = [self.letters[b] for b in word.encode()]
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, math.inf), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == math.inf:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return [self.vocab[part] for part in parts]

    def ids(self, text):
        return [i for word in re.findall(r" ?[^ ]+| +", text) for i in self.word_ids(word)]


def log_sum_exp(row):
    return float(row.max() + np.log(np.exp(row - row.max()).sum()))


def positions_of(n):
    """The first, the last, and a few between."""
    return sorted({0, n // 4, n // 2, 3 * n // 4, n - 1})


def greedy(model, ids):
    steps = []
    ids = list(ids)
    for _ in range(GREEDY_STEPS):
        row = model.logits(ids)[-1]
        best, second = np.argsort(-row, kind="stable")[:2]
        steps.append({"id": int(best), "margin": float(row[best] - row[second])})
        ids.append(int(best))
    return steps


def golden(model, name, ids):
    rows = model.logits(ids)
    positions = []
    for position in positions_of(len(ids)):
        row = rows[position]
        top = np.argsort(-row, kind="stable")[:TOP]
        positions.append({"pos": position, "logsumexp": log_sum_exp(row),
                          "top": [[int(i), float(row[i])] for i in top]})
    return {"name": name, "ids": ids, "positions": positions, "greedy": greedy(model, ids)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models/zeroc-demo")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "tests/data/zeroc_demo_logits.json")
    args = parser.parse_args()
    model, merger = Model(args.model), Merger(args.model)
    bos = model.config["bos_token_id"]
    texts = {"bos": "", "short": SHORT, "paragraph": PARAGRAPH, "letter": LETTER, "code": CODE}
    prompts = [golden(model, name, [bos, *merger.ids(text)]) for name, text in texts.items()]
    result = {"made_by": "tools/golden/make_logits_golden.py", "prompts": prompts}
    # Nine digits are far finer than any tolerance, and keep the file small.
    text = json.dumps(json.loads(json.dumps(result), parse_float=lambda s: round(float(s), 9)), separators=(",", ":"))
    args.out.write_text(text.replace('{"name"', '\n{"name"') + "\n")
    for prompt in prompts:
        margins = [step["margin"] for step in prompt["greedy"]]
        print(f"{prompt['name']}: {len(prompt['ids'])} ids, smallest greedy margin {min(margins):.3f}")


if __name__ == "__main__":
    main()
