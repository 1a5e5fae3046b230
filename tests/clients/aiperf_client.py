"""The load generator aiperf, unchanged: streams of mixed lengths side by side, for completions and for chat. What it
counts must be what it asked for, with no error.
"""

import json
import os
import pathlib
import subprocess
import sys

N_REQUESTS, CONCURRENCY, OUTPUT_TOKENS = 40, 8, 24
PROGRAM = pathlib.Path(sys.executable).with_name("aiperf")


def profile(endpoint):
    folder = pathlib.Path(os.environ["ZEROC_WORK"]) / endpoint
    command = [PROGRAM, "profile", "--model", "zeroc-demo", "--url", os.environ["ZEROC_URL"],
               "--endpoint-type", endpoint, "--streaming", "--api-key", os.environ["OPENAI_API_KEY"],
               "--tokenizer", os.environ["ZEROC_MODEL_DIR"], "--concurrency", CONCURRENCY,
               "--request-count", N_REQUESTS, "--synthetic-input-tokens-mean", 300,
               "--synthetic-input-tokens-stddev", 200, "--output-tokens-mean", OUTPUT_TOKENS,
               "--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{OUTPUT_TOKENS}",
               "--random-seed", 5, "--ui", "simple", "--artifact-dir", folder]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    report = json.loads(next(folder.rglob("profile_export_aiperf.json")).read_text())
    print(endpoint, json.dumps({name: report[name] for name in (
        "request_count", "time_to_first_token", "inter_token_latency", "output_token_throughput")}))
    assert report["request_count"]["avg"] == N_REQUESTS, report["request_count"]
    assert not report.get("error_summary"), report["error_summary"]
    assert 0 < report["time_to_first_token"]["avg"] <= report["request_latency"]["avg"], report
    # Counted by tokenising the text again, which may join tokens.
    assert 0.8 * OUTPUT_TOKENS <= report["output_sequence_length"]["avg"] <= OUTPUT_TOKENS + 1, report


subprocess.run([PROGRAM, "--version"], check=True)
profile("completions")
profile("chat")
