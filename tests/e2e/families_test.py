#!/usr/bin/env python3
"""Models of other families than the demo's, from calibration to served text: random weights, real processes."""

import json
import math
import pathlib
import random
import shutil
import struct
import subprocess
import tempfile
import unittest

import cluster
import texts
from cluster import BIN_DIR, MODEL_DIR, REQUEST_S, Cluster, ClusterTest

HIDDEN, LAYERS, HEADS, HEAD_DIM, WIDTH, VOCAB, POSITIONS = 64, 2, 2, 32, 128, 4096, 2048
SHAPE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
         "max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": WIDTH, "word_embed_proj_dim": HIDDEN,
       "activation_function": "relu", "do_layer_norm_before": True, **SHAPE}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": WIDTH,
         "num_key_value_heads": 1, "head_dim": HEAD_DIM, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "use_sliding_window": False, "tie_word_embeddings": True, **SHAPE}


def opt_tensors():
    yield "model.decoder.embed_tokens.weight", [VOCAB, HIDDEN]
    yield "model.decoder.embed_positions.weight", [POSITIONS + 2, HIDDEN]
    layers = [f"model.decoder.layers.{layer}." for layer in range(LAYERS)]
    for prefix in layers:
        for name, n_out, n_in in [("self_attn.q_proj", HIDDEN, HIDDEN), ("self_attn.k_proj", HIDDEN, HIDDEN),
                                  ("self_attn.v_proj", HIDDEN, HIDDEN), ("self_attn.out_proj", HIDDEN, HIDDEN),
                                  ("fc1", WIDTH, HIDDEN), ("fc2", HIDDEN, WIDTH)]:
            yield f"{prefix}{name}.weight", [n_out, n_in]
            yield f"{prefix}{name}.bias", [n_out]
    for prefix in [*(p + name for p in layers for name in ("self_attn_layer_norm", "final_layer_norm")),
                   "model.decoder.final_layer_norm"]:
        yield f"{prefix}.weight", [HIDDEN]
        yield f"{prefix}.bias", [HIDDEN]


def qwen3_tensors():
    yield "model.embed_tokens.weight", [VOCAB, HIDDEN]
    yield "model.norm.weight", [HIDDEN]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", [HEADS * HEAD_DIM, HIDDEN]
        yield prefix + "self_attn.k_proj.weight", [HEAD_DIM, HIDDEN]
        yield prefix + "self_attn.v_proj.weight", [HEAD_DIM, HIDDEN]
        yield prefix + "self_attn.o_proj.weight", [HIDDEN, HEADS * HEAD_DIM]
        yield prefix + "self_attn.q_norm.weight", [HEAD_DIM]
        yield prefix + "self_attn.k_norm.weight", [HEAD_DIM]
        yield prefix + "mlp.gate_proj.weight", [WIDTH, HIDDEN]
        yield prefix + "mlp.up_proj.weight", [WIDTH, HIDDEN]
        yield prefix + "mlp.down_proj.weight", [HIDDEN, WIDTH]
        yield prefix + "input_layernorm.weight", [HIDDEN]
        yield prefix + "post_attention_layernorm.weight", [HIDDEN]


def values_of(name, shape, rng):
    """Nothing at one or zero: gains around one, biases around zero, matrices that keep the size of what they get."""
    n = math.prod(shape)
    if len(shape) == 1:
        mean, sigma = (0, 0.3) if name.endswith(".bias") else (1, 0.2)
    else:
        mean, sigma = 0, 0.5 if "embed" in name else 1.2 / math.sqrt(shape[1])
    drawn = [rng.gauss(mean, sigma) for _ in range(min(n, 4099))]  # repeated, with a length that no row divides
    return (drawn * (n // len(drawn) + 1))[:n]


def write_model(folder, config, tensors):
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (MODEL_DIR / name).is_file():
            shutil.copy(MODEL_DIR / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    rng, header, data = random.Random(1), {}, bytearray()
    for name, shape in tensors:
        raw = b"".join(struct.pack("<f", value)[2:] for value in values_of(name, shape, rng))  # bf16, cut off
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


class FamilyTest(ClusterTest):
    def setUp(self):
        self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory(prefix="zeroc-e2e-")))
        self.addCleanup(setattr, cluster, "MODEL_DIR", cluster.MODEL_DIR)

    def zeroc(self, *args):
        done = subprocess.run([BIN_DIR / "zeroc", *map(str, args), "--json"], capture_output=True, text=True,
                              timeout=3 * REQUEST_S)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        return json.loads(done.stdout)

    def check(self, config, tensors):
        model = self.dir / "tiny"
        write_model(model, config, tensors)
        text = self.dir / "text.txt"
        text.write_text(texts.prose(30000))
        self.zeroc("calibrate", "--model", model, "--text", f"{text}@0:70", "--heldout", f"{text}@70:100", "--context",
                   512, "--score-context", 512, "--score-stride", 64, "--score-windows", 2, "--probe-windows", 1,
                   "--rungs", 3, "--budget", 0, "--budget-rel", 0, "--out", model / "zeroc.plan")
        profiles = {p["name"]: p for p in self.zeroc("plan", model / "zeroc.plan")["profiles"]}
        self.assertIn("z3", profiles)

        prompt = texts.prose(4000)
        cluster.MODEL_DIR = model
        with Cluster() as served:
            served.wait_ready()
            for profile in ("q8", "z3"):
                body = served.complete(prompt, model="tiny", max_tokens=8, profile=profile, ignore_eos=True)
                self.assertEqual(body["usage"]["completion_tokens"], 8)
                self.assertEqual(body["zeroc"]["profile"], profile)
                local = self.zeroc("generate", "--model", model, "--profile", profile, "--prompt", prompt,
                                   "--max-tokens", 8, "--ignore-eos")
                self.assertEqual(body["choices"][0]["text"], local["text"], "what one process computes")

    def test_opt(self):
        self.check(OPT, opt_tensors())

    def test_qwen3(self):
        self.check(QWEN3, qwen3_tensors())


if __name__ == "__main__":
    unittest.main()
