#!/usr/bin/python3
"""Should the content of a block of 64 tokens decide how many bits it gets? Writes docs/results/token_axis.{md,json}.

    bench/token_axis.py [--eval DIR] [--windows N] [--seeds N] [--out docs/results]

The bundled model in numpy float32, apart from the engine: what is compared is ways to choose, not codes. Half of the
old blocks of every layer keep 4 bits, the other half 2 (affine codes per token and head behind a Hadamard rotation);
the choices differ in which half. The first 16 and the last 128 tokens of the context stay exact. Each window of 4,096
tokens of WikiText-2 test: 3,072 tokens are the context, whose keys and values are exact before they are coded, the
next 1,024 are fed and scored. Figures are mean KL in nats per token against the exact model. --eval holds
wikitext-2-test.txt [../shared/eval]. Needs python3-numpy (deploy/setup --bench), hence Debian's own interpreter.
"""

import argparse
import json
import pathlib
import shlex
import struct
import subprocess
import sys

import numpy as np

from zeroc_cli import BINARY, ROOT, machine, machine_line, table

MODEL = ROOT / "models/zeroc-demo"
BLOCK, CONTEXT, SCORED, SINK, RECENT = 64, 3072, 1024, 16, 128
HIGH, LOW = 4, 2
OBSERVED = 64  # last queries of the context that vote
OLD_BLOCKS = (CONTEXT - RECENT) // BLOCK


class Model:
    def __init__(self):
        self.config = json.loads((MODEL / "config.json").read_text())
        raw = (MODEL / "model.safetensors").read_bytes()
        (n_header,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + n_header])
        self.w = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            bits = np.frombuffer(raw[8 + n_header + begin : 8 + n_header + end], np.uint16).astype(np.uint32) << 16
            self.w[name] = bits.view(np.float32).reshape(entry["shape"])
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.dim = self.config["head_dim"]
        self.layers = self.config["num_hidden_layers"]
        freq = self.config["rope_theta"] ** (-np.arange(0, self.dim, 2) / self.dim)
        angles = np.outer(np.arange(CONTEXT + SCORED), freq)
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def rope(self, x, positions):  # x [tokens, heads, dim]
        half = self.dim // 2
        c, s = self.cos[positions][:, None], self.sin[positions][:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    def norm(self, x, name):
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.w[name]

    def project(self, x, layer, positions):
        prefix = f"model.layers.{layer}.self_attn."
        n = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = (
            (n @ self.w[f"{prefix}{side}_proj.weight"].T).reshape(len(x), -1, self.dim) for side in ("q", "k", "v")
        )
        return self.rope(q, positions), self.rope(k, positions), v

    def rest(self, x, attended, layer):
        prefix = f"model.layers.{layer}."
        x = x + attended.reshape(len(x), -1) @ self.w[prefix + "self_attn.o_proj.weight"].T
        n = self.norm(x, prefix + "post_attention_layernorm.weight")
        gate, up = (n @ self.w[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return x + (gate / (1 + np.exp(-gate)) * up) @ self.w[prefix + "mlp.down_proj.weight"].T

    def log_probabilities(self, x):
        logits = self.norm(x, "model.norm.weight") @ self.w["model.embed_tokens.weight"].T
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def attention(self, q, k, v, first):
        """Causal: query i is at position first + i. Output [queries, heads, dim] and probabilities [heads, q, keys]."""
        group = self.heads // self.kv_heads
        blocked = np.arange(len(k))[None] > first + np.arange(len(q))[:, None]
        out, probabilities = np.empty_like(q), []
        for h in range(self.heads):
            scores = q[:, h] @ k[:, h // group].T / np.sqrt(self.dim)
            scores[blocked] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            out[:, h] = p @ v[:, h // group]
            probabilities.append(p)
        return out, probabilities


def hadamard(n):
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(np.float32(n))


def code(x, bits):
    """What is left of x [tokens, heads, dim] after affine codes of `bits` behind a rotation; the best of four clips."""
    rotation = hadamard(x.shape[-1])
    r = x @ rotation
    low, high = r.min(-1, keepdims=True), r.max(-1, keepdims=True)
    best, best_error = None, None
    for clip in (1.0, 0.9, 0.8, 0.65):
        center, half = (high + low) / 2, (high - low) / 2 * clip
        step = np.maximum(2 * half / (2**bits - 1), 1e-12)
        value = center - half + step * np.clip(np.rint((r - center + half) / step), 0, 2**bits - 1)
        error = ((value - r) ** 2).sum(-1, keepdims=True)
        if best is None:
            best, best_error = value, error
        else:
            better = error < best_error
            best, best_error = np.where(better, value, best), np.where(better, error, best_error)
    return best @ rotation.T


def per_block(values):
    """Sums of [tokens] over the old blocks."""
    return values[: OLD_BLOCKS * BLOCK].reshape(OLD_BLOCKS, BLOCK).sum(-1)


class Window:
    """The exact pass over one window, and what the choices look at."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids
        positions = np.arange(len(ids))
        x = model.w["model.embed_tokens.weight"][ids]
        self.k, self.v, self.coded, self.looks = [], [], [], []
        for layer in range(model.layers):
            q, k, v = model.project(x, layer, positions)
            attended, p = model.attention(q, k, v, 0)
            self.look(q, k, v, p)
            x = model.rest(x, attended, layer)
        self.exact = model.log_probabilities(x[CONTEXT - 1 : -1])

    def look(self, q, k, v, p):
        model, group = self.model, self.model.heads // self.model.kv_heads
        k, v = k[:CONTEXT], v[:CONTEXT]
        coded = {bits: (code(k, bits), code(v, bits)) for bits in (HIGH, LOW)}
        # How much worse 2 bits are than 4, per token: squared error of keys and of values, both relative.
        loss = sum(
            (((c_low - exact) ** 2).sum((1, 2)) - ((c_high - exact) ** 2).sum((1, 2))) / (exact**2).sum((1, 2)).mean()
            for exact, c_low, c_high in zip((k, v), coded[LOW], coded[HIGH], strict=True)
        )
        votes = sum(h[CONTEXT - OBSERVED : CONTEXT, :CONTEXT].sum(0) for h in p)
        truth = sum(h[CONTEXT:, :CONTEXT].sum(0) for h in p)
        # Write-time prior: the mean query of a slice of the context, and its spread, say what a key will be asked.
        prior = np.zeros(CONTEXT, np.float32)
        for h in range(model.heads):
            queries = q[:CONTEXT, h]
            scores = k[:, h // group] @ queries.mean(0) / np.sqrt(model.dim)
            scores += 0.5 * ((k[:, h // group] ** 2) @ queries.var(0)) / model.dim
            prior += np.exp(scores - scores.max())
        self.k.append(k)
        self.v.append(v)
        self.coded.append(coded)
        self.looks.append({"votes": votes, "votes x error": votes * loss, "prior": prior, "prior x error": prior * loss,
                           "truth": truth, "truth x error": truth * loss})

    def kl(self, high):
        """high [layers, OLD_BLOCKS]: which blocks keep the high width."""
        model = self.model
        positions = np.arange(CONTEXT - 1, CONTEXT + SCORED - 1)
        x = model.w["model.embed_tokens.weight"][self.ids[positions]]
        for layer in range(model.layers):
            k, v = self.k[layer].copy(), self.v[layer].copy()
            tokens = np.repeat(high[layer], BLOCK)
            for bits, chosen in ((HIGH, tokens), (LOW, ~tokens)):
                at = np.flatnonzero(chosen)
                at = at[at >= SINK]
                for side, full in zip(self.coded[layer][bits], (k, v), strict=True):
                    full[at] = side[at]
            q, k_new, v_new = model.project(x, layer, positions)
            keys, values = np.concatenate([k[:-1], k_new]), np.concatenate([v[:-1], v_new])
            attended, _ = model.attention(q, keys, values, CONTEXT - 1)
            x = model.rest(x, attended, layer)
        got = model.log_probabilities(x)
        return float((np.exp(self.exact) * (self.exact - got)).sum(-1).mean())


def best_half(scores):
    chosen = np.zeros(OLD_BLOCKS, bool)
    chosen[np.argsort(-scores, kind="stable")[: OLD_BLOCKS // 2]] = True
    return chosen


def choices(window, seeds):
    """Name -> list of selections (one, or one for each seed)."""
    layers = len(window.looks)
    ages = np.arange(OLD_BLOCKS, dtype=np.float32)
    result = {
        "every block at 4 bits": [np.ones((layers, OLD_BLOCKS), bool)],
        "every block at 2 bits": [np.zeros((layers, OLD_BLOCKS), bool)],
        "chance": [
            np.stack([best_half(np.random.default_rng((seed, layer)).random(OLD_BLOCKS)) for layer in range(layers)])
            for seed in range(seeds)
        ],
        "age: the newest half": [np.stack([best_half(ages)] * layers)],
    }
    names = {
        "votes": f"attention of the last {OBSERVED} prompt queries",
        "votes x error": f"attention of the last {OBSERVED} prompt queries times code error",
        "prior": "write-time prior",
        "prior x error": "write-time prior times code error",
        "truth": "oracle: attention of the scored queries",
        "truth x error": "oracle: the same times code error",
    }
    for key, name in names.items():
        result[name] = [np.stack([best_half(per_block(look[key])) for look in window.looks])]
    shared = sum(per_block(look["votes x error"]) / per_block(look["votes x error"]).sum() for look in window.looks)
    result["votes times error, one choice for all layers"] = [np.stack([best_half(shared)] * layers)]
    return result


def token_ids(text):
    command = [BINARY, "tokenize", "--model", str(MODEL), "--file", str(text), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return np.array(json.loads(done.stdout)["ids"])


def measure(options):
    model = Model()
    ids = token_ids(ROOT / options.eval / "wikitext-2-test.txt")
    length = CONTEXT + SCORED
    stride = (len(ids) - length) // max(1, options.windows - 1)
    figures = {}
    for w in range(options.windows):
        begin = w * stride
        window = Window(model, np.concatenate([[model.config["bos_token_id"]], ids[begin : begin + length - 1]]))
        for name, selections in choices(window, options.seeds).items():
            figures.setdefault(name, []).append([window.kl(selection) for selection in selections])
        print(f"window {w + 1} of {options.windows}", file=sys.stderr)
    return figures


def page(result):
    chance = np.mean(result["kl"]["chance"], axis=1)  # [windows]
    rows = []
    for name, values in result["kl"].items():
        per_window = np.mean(values, axis=1)
        wins = int((per_window < chance).sum())
        rows.append(
            [
                name,
                f"{per_window.mean():.5f}",
                "" if name == "chance" else f"{per_window.mean() / chance.mean():.2f}x",
                "" if name == "chance" else f"{wins} of {len(chance)}",
            ]
        )
    spread = np.std(result["kl"]["chance"], axis=1).mean()
    return "\n".join(
        [
            "# Which blocks deserve more bits?",
            "",
            f"Made by `{result['command']}` on {machine_line(result['machine'])}.",
            f"Half of the {OLD_BLOCKS} old blocks of every layer keep {HIGH} bits, the others {LOW}; see the script",
            f"for the rest. KL in nats per token over {result['windows']} windows of {SCORED:,} scored tokens. Chance",
            f"is the mean of {result['seeds']} draws, whose own spread is {spread:.5f} within a window.",
            "",
            *table(["the better half is chosen by", "KL", "against chance", "windows better than chance"], rows),
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", default="../shared/eval", help="folder of the text [../shared/eval]")
    parser.add_argument("--windows", type=int, default=8, help="windows, spread over the text [8]")
    parser.add_argument("--seeds", type=int, default=6, help="random draws [6]")
    parser.add_argument("--out", default="docs/results", help="folder for the results [docs/results]")
    options = parser.parse_args()
    result = {"command": shlex.join(["bench/token_axis.py", *sys.argv[1:]]), "machine": machine()}
    result.update(windows=options.windows, seeds=options.seeds, kl=measure(options))
    out = pathlib.Path(ROOT / options.out)
    (out / "token_axis.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "token_axis.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
