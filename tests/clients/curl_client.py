"""curl, as its users call it: the API's paths, a stream, a large body, wrong requests. Argument: the program."""

import json
import os
import subprocess
import sys

CURL, URL, KEY = sys.argv[1], os.environ["ZEROC_URL"], os.environ["OPENAI_API_KEY"]


def curl(*args, key=KEY):
    """(status, body) of one call."""
    command = [CURL, "--silent", "--show-error", "--max-time", "60", "--write-out", "\n%{http_code}", *args]
    if key:
        command += ["--oauth2-bearer", key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def post(path, body, *args, **kwargs):
    return curl("--json", json.dumps(body), URL + path, *args, **kwargs)


subprocess.run([CURL, "--version"], check=True)
status, body = curl(URL + "/v1/models")
assert status == 200, body
model = json.loads(body)["data"][0]["id"]

request = {"model": model, "prompt": "Everyone is permitted to", "max_tokens": 12, "temperature": 0}
status, body = post("/v1/completions", request)
assert status == 200, body
answer = json.loads(body)
assert answer["usage"]["completion_tokens"] == 12, answer

# A stream without buffering: the same text in events, [DONE] last.
status, body = post("/v1/completions", {**request, "stream": True}, "--no-buffer")
assert status == 200, body
events = [line[len("data: "):] for line in body.splitlines() if line.startswith("data: ")]
assert events[-1] == "[DONE]", body
streamed = "".join(c["text"] for e in events[:-1] for c in json.loads(e)["choices"])
assert streamed == answer["choices"][0]["text"], (streamed, answer)

# curl asks "Expect: 100-continue" for a body above 1 MiB; compressed answers are asked for and may be plain.
big = os.path.join(os.environ["ZEROC_WORK"], "big.json")
with open(big, "w", encoding="utf-8") as file:
    json.dump({"text": "word " * 400_000}, file)
status, body = curl("--compressed", "-H", "Content-Type: application/json", "--data-binary", "@" + big,
                    URL + "/tokenize")
assert status == 200 and json.loads(body)["count"] >= 400_000, body[:300]

status, body = post("/v1/completions", {**request, "temperature": 9})
assert status == 400 and json.loads(body)["error"]["param"] == "temperature", body
assert post("/v1/completions", request, key=None)[0] == 401
assert post("/v1/completions", {**request, "model": "other"})[0] == 404
assert curl("--request", "DELETE", URL + "/v1/completions")[0] == 405
assert curl(URL + "/nothing")[0] == 404
assert curl("--http1.0", URL + "/healthz", key=None) == (200, "ok\n")
status, body = curl("--head", URL + "/metrics", key=None)
assert status == 200 and "Content-Length:" in body, body
