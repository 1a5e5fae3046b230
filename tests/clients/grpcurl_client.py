"""grpcurl by reflection alone, without our .proto files: what is served, a stream, a score, errors, health.
Argument: the program."""

import json
import os
import subprocess
import sys

GRPCURL, TARGET, KEY = sys.argv[1], os.environ["ZEROC_GRPC"], os.environ["OPENAI_API_KEY"]


def grpcurl(*args, data=None, key=KEY):
    """(exit code, standard output, standard error)."""
    command = [GRPCURL, "-plaintext", "-max-time", "60"]
    if key:
        command += ["-H", f"authorization: Bearer {key}"]
    if data is not None:
        command += ["-d", json.dumps(data)]
    done = subprocess.run([*command, TARGET, *args], capture_output=True, text=True, timeout=90)
    return done.returncode, done.stdout, done.stderr


def call(method, data, **kwargs):
    """The messages of a call that must succeed."""
    code, out, err = grpcurl(method, data=data, **kwargs)
    assert code == 0, err
    decoder, at, messages = json.JSONDecoder(), 0, []
    while out[at:].strip():
        at += len(out[at:]) - len(out[at:].lstrip())
        message, at = decoder.raw_decode(out, at)
        messages.append(message)
    return messages


subprocess.run([GRPCURL, "-version"], check=True)
code, out, err = grpcurl("list")
assert code == 0, err
services = out.split()
for service in ("grpc.health.v1.Health", "inference.GRPCInferenceService", "zeroc.v1.Inference"):
    assert service in services, services
code, out, err = grpcurl("describe", "zeroc.v1.GenerateRequest")
assert code == 0 and "sampling" in out, (out, err)

assert call("grpc.health.v1.Health/Check", {}, key=None) == [{"status": "SERVING"}]
info = call("zeroc.v1.Inference/GetModelInfo", {})[0]
assert len(info["profiles"]) > 2, info

events = call("zeroc.v1.Inference/Generate", {"text": "Everyone is permitted to",
                                              "sampling": {"max_tokens": 12, "temperature": 0, "ignore_eos": True}})
assert "started" in events[0] and "final" in events[-1], events
ids = [i for e in events for i in e.get("delta", {}).get("token_ids", [])]
assert len(ids) == 12, events
text = "".join(e.get("delta", {}).get("text", "") for e in events)
assert text.strip(), events

# The model's own greedy answer must score better than the same tokens backwards.
context = {"text": "Everyone is permitted to", "kv": {"profile": "bf16"}}
scores = [call("zeroc.v1.Inference/Score", {**context, "target": {"ids": target}})[0]["sum"]
          for target in (ids, ids[::-1])]
assert 0 >= scores[0] > scores[1], scores

code, out, err = grpcurl("zeroc.v1.Inference/Generate", data={"text": ""})
assert code == 64 + 3 and "InvalidArgument" in err, (code, err)
code, out, err = grpcurl("zeroc.v1.Inference/GetModelInfo", data={}, key=None)
assert code == 64 + 16 and "Unauthenticated" in err, (code, err)
code, out, err = grpcurl("zeroc.v1.Inference/Abort", data={"request_id": "no-such"})
assert code == 64 + 5, (code, err)
