#!/usr/bin/env python3
"""Writes a Llama-architecture checkpoint with random weights, to measure speed at real sizes. Standard library only.

    bench/random_model.py OUT [--shape 1b|tinyllama|demo] [--seed N]

The tokenizer is the bundled model's, so vocab_size may be larger than what the tokenizer knows; text goes in, noise
comes out. Weights are bf16 noise with standard deviation 0.02, drawn once per 32 MiB and repeated from there: products
and memory traffic do not depend on the values. 1b (Llama-3.2-1B's shape without its rope scaling) takes 2.5 GB on
disk.
"""

import argparse
import json
import pathlib
import random
import shutil
import struct

ROOT = pathlib.Path(__file__).resolve().parents[1]
POOL_VALUES = 16 << 20
SHAPES = {
    # hidden, layers, heads, KV heads, head_dim, intermediate, vocabulary
    "1b": (2048, 16, 32, 8, 64, 8192, 128256),
    "tinyllama": (2048, 22, 32, 4, 64, 5632, 32000),
    "demo": (384, 4, 6, 2, 64, 1024, 4096),
}


def noise_pool(seed):
    """bf16 values, near Gaussian with standard deviation 0.02, as little-endian bytes."""
    rng = random.Random(seed)
    values = [rng.gauss(0, 0.02) for _ in range(1 << 16)]
    raw = b"".join(struct.pack("<f", value)[2:] for value in values)
    picks = rng.choices(range(1 << 12), k=POOL_VALUES >> 4)  # runs of 16 values in random order
    return b"".join(raw[32 * i : 32 * i + 32] for i in picks)


def tensors(shape):
    hidden, layers, heads, kv_heads, head_dim, width, vocab = shape
    yield "model.embed_tokens.weight", [vocab, hidden]
    for i in range(layers):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", [hidden]
        yield prefix + "self_attn.q_proj.weight", [heads * head_dim, hidden]
        yield prefix + "self_attn.k_proj.weight", [kv_heads * head_dim, hidden]
        yield prefix + "self_attn.v_proj.weight", [kv_heads * head_dim, hidden]
        yield prefix + "self_attn.o_proj.weight", [hidden, heads * head_dim]
        yield prefix + "post_attention_layernorm.weight", [hidden]
        yield prefix + "mlp.gate_proj.weight", [width, hidden]
        yield prefix + "mlp.up_proj.weight", [width, hidden]
        yield prefix + "mlp.down_proj.weight", [hidden, width]
    yield "model.norm.weight", [hidden]


def write_weights(path, shape, seed):
    header, offset = {}, 0
    for name, sizes in tensors(shape):
        n_bytes = 2
        for size in sizes:
            n_bytes *= size
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pool = noise_pool(seed)
    ones = struct.pack("<H", 0x3F80)  # 1.0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        at = 0
        for name, entry in header.items():
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            if name.endswith("norm.weight"):
                file.write(ones * (left // 2))
                continue
            while left > 0:
                part = pool[at : at + left]
                file.write(part)
                left -= len(part)
                at = (at + len(part)) % len(pool)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder to make")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b", help="sizes [1b]")
    parser.add_argument("--seed", type=int, default=1, help="of the noise [1]")
    options = parser.parse_args()
    hidden, layers, heads, kv_heads, head_dim, width, vocab = SHAPES[options.shape]
    options.out.mkdir(parents=True, exist_ok=True)
    demo = ROOT / "models/zeroc-demo"
    config = json.loads((demo / "config.json").read_text())
    config.update(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=width,
        vocab_size=vocab,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    (options.out / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (demo / name).is_file():
            shutil.copy(demo / name, options.out / name)
    write_weights(options.out / "model.safetensors", SHAPES[options.shape], options.seed)


if __name__ == "__main__":
    main()
