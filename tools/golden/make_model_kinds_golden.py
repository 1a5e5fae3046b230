#!/usr/bin/env python3
"""Makes tests/data/model_kinds_golden.json: what Hugging Face transformers compute for one tiny model of each kind.

    python3 -m venv build/golden-venv
    build/golden-venv/bin/pip install torch==2.6.0 transformers==4.51.3 numpy==2.4.6
    build/golden-venv/bin/python tools/golden/make_model_kinds_golden.py [--out FILE]

No weights are stored. Every value is mean + k * 2^log2_step with a small integer k that splitmix64 draws from the
FNV-1a hash of the tensor's name and the index, so that whoever reads the file can make the same tensors, exactly, in
bf16. The file holds each kind's config.json as transformers write it, its tensors (name, shape, mean, half_range,
log2_step), token ids and the logits behind a few of them. Models run in float64 where transformers let them (norms and
softmax are float32 there), attention is the eager one.
"""

import argparse
import json
import math
import pathlib

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCAB = 61
N_TOKENS = 200
POSITIONS = [0, 1, 63, 64, 130, 199]
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 512, "num_hidden_layers": 2, "bos_token_id": 1,
          "eos_token_id": 2, "pad_token_id": None}


def llama(**fields):
    return transformers.LlamaConfig(hidden_size=128, intermediate_size=192, num_attention_heads=4, **COMMON, **fields)


# name -> (model class, config). Head dimensions 32, 64 and 48; heads narrower and wider than the hidden state.
KINDS = {
    "llama_mha": (transformers.LlamaForCausalLM, llama(num_key_value_heads=4)),
    "llama_biases": (transformers.LlamaForCausalLM,
                     llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5,
                           rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64})),
    "mistral": (transformers.MistralForCausalLM,
                transformers.MistralConfig(hidden_size=96, intermediate_size=160, num_attention_heads=4,
                                           num_key_value_heads=2, head_dim=32, sliding_window=None, **COMMON)),
    "qwen2": (transformers.Qwen2ForCausalLM,
              transformers.Qwen2Config(hidden_size=96, intermediate_size=160, num_attention_heads=2,
                                       num_key_value_heads=1, rope_theta=1e6, tie_word_embeddings=True, **COMMON)),
    "qwen3": (transformers.Qwen3ForCausalLM,
              transformers.Qwen3Config(hidden_size=96, intermediate_size=160, num_attention_heads=4,
                                       num_key_value_heads=2, head_dim=64, rope_theta=1e6, **COMMON)),
    "opt": (transformers.OPTForCausalLM,
            transformers.OPTConfig(hidden_size=128, word_embed_proj_dim=128, ffn_dim=256, num_attention_heads=4,
                                   **COMMON)),
}


def fnv1a64(text):
    state = 0xCBF29CE484222325
    for byte in text.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return state


def draw(spec):
    """The tensor's values: output number i of splitmix64 seeded with the hash of the name."""
    n = math.prod(spec["shape"])
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a64(spec["name"])) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    k = (z % np.uint64(2 * spec["half_range"] + 1)).astype(np.int64) - spec["half_range"]
    return (spec["mean"] + k * 2.0 ** spec["log2_step"]).reshape(spec["shape"])


def spec_of(name, shape, tied):
    """Eight significant bits at most, so that bf16 holds the value; nothing is left at one or zero."""
    spec = {"name": name, "shape": list(shape), "mean": 0, "half_range": 127, "log2_step": -9}
    if name.endswith(".bias"):
        spec["log2_step"] = -8
    elif len(shape) == 1:
        spec.update(mean=1, half_range=63, log2_step=-7)
    elif "embed" in name:
        spec["log2_step"] = -8 if tied else -6  # as output weights they must not make every choice certain
    return spec


def golden(kind, make, config):
    config.architectures = [make.__name__]
    config._attn_implementation = "eager"
    model = make(config).eval()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    specs = [spec_of(name, shape, bool(tied)) for name, shape in shapes.items()]
    values = {spec["name"]: torch.from_numpy(draw(spec)) for spec in specs}
    for name, value in values.items():
        assert torch.equal(value, value.to(torch.bfloat16).to(torch.float64)), f"{name} is not exact in bf16"
    missing = model.double().load_state_dict(values, strict=False)
    assert set(missing.missing_keys) == tied and not missing.unexpected_keys, missing
    ids = [int(k) for k in np.random.default_rng(fnv1a64(kind)).integers(0, VOCAB, N_TOKENS)]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    rows = [{"pos": pos, "logits": [float(f"{x:.8g}") for x in logits[pos].tolist()]} for pos in POSITIONS]
    print(f"{kind}: {sum(math.prod(s['shape']) for s in specs)} parameters, "
          f"largest logit {max(abs(x) for row in rows for x in row['logits']):.3f}")
    fields = json.loads(config.to_json_string())
    del fields["_attn_implementation_autoset"]  # left behind by the line above, not part of a saved config
    return {"kind": kind, "config": fields, "tensors": specs, "ids": ids, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "tests/data/model_kinds_golden.json")
    args = parser.parse_args()
    models = [golden(kind, make, config) for kind, (make, config) in KINDS.items()]
    lines = ",\n".join(json.dumps(model, separators=(",", ":")) for model in models)
    made_by = f"tools/golden/make_model_kinds_golden.py, transformers {transformers.__version__}"
    args.out.write_text(f'{{"made_by":"{made_by}","models":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
