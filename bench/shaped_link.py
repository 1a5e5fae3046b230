#!/usr/bin/env python3
"""What a request costs over a link of stated bandwidth, for every profile. Standard library only; needs root.

    bench/shaped_link.py [--rates 100M,1G,10G] [--profiles bf16,q8,q4,q3,q2] [--repetitions 5] [--json FILE]

Router and decode worker run in one network namespace, the prefill worker in another; the veth pair between them is
shaped in both directions (bench/shaped_pair.py). Keys and values travel over UCX's TCP. The prompt is the demo's: real
prose of about 3,500 tokens. Profiles take turns, so that a slow moment of the machine does not hit one of them alone.
At last every profile's tokens at temperature 0 are compared with those of the same cluster over shared memory.

Exit code 0; 1 when something failed, tokens differ or the link is not as stated; 2 for bad usage.
"""

import argparse
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from cluster import BIN_DIR, MODEL_DIR, REQUEST_S, START_S, Process, wait_until  # noqa: E402  (the path comes first)
from shaped_pair import LinkError, ShapedPair, check_rights, http_request  # noqa: E402

PROFILES = ["bf16", "q8", "q4", "q3", "q2"]
UNITS = {"M": 10**6, "G": 10**9}
CHECK_RATE = 10**9  # where the tokens are compared
PROMPT_TOKENS = 3500  # as in deploy/demo
LICENSES = pathlib.Path("/usr/share/common-licenses")
TOOL_S = 60
RATE_SHARE_MIN = 0.85  # of the stated rate as TCP payload; headers take 4.4 %
FAST = 5 * 10**9  # above it this machine's cores may be the limit, which is reported and no error
HOME, AWAY = 0, 1  # sides of the link: router and decode; prefill
GRPC, HTTP = 9000, 9001  # the namespaces are new, so every port is free
# Seconds of one request, by name of the table's column: (heading, how to read it from the answer's "zeroc" object).
TIMES = {
    "ttft": ("TTFT", lambda z: z["ttft_seconds"]),
    "jct": ("JCT", lambda z: z["jct_seconds"]),
    "prefill": ("prefill", lambda z: z["phases"]["prefill"]),
    "wire_visible": ("visible wire", lambda z: z["phases"]["wire"]),
    "wire_total": ("total wire", lambda z: z["wire_seconds"]),
    "queue": ("queue", lambda z: z["phases"]["queue"]),
    "reserve": ("reserve", lambda z: z["phases"]["reserve"]),
    "admit": ("admit", lambda z: z["phases"]["admit"]),
    "decode": ("decode", lambda z: z["phases"]["decode"]),
}


class Failed(Exception):
    pass


class Side(Process):
    """One of our programs on one side of the link."""

    def __init__(self, pair, side, program, args, log_dir):
        self.program, self.pair, self.side = program, pair, side
        self.log_path = pathlib.Path(log_dir) / f"{program}-{time.monotonic_ns()}.log"
        # gRPC would ask a proxy even for its own network. `ip netns exec` becomes the program, so the pid is right.
        env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        with open(self.log_path, "wb") as log:
            self.popen = subprocess.Popen([*pair.enter(side), BIN_DIR / program, *map(str, args)], cwd=ROOT, env=env,
                                          stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                          start_new_session=True)

    def ready(self, port):
        if self.popen.poll() is not None:
            raise Failed(f"{self.program} ended with {self.popen.returncode}")
        try:
            return http_request(self.pair, self.side, port, "GET", "/readyz", None, 5)[0] == 200
        except OSError:
            return False


class Trio:
    """Router and decode at HOME, prefill AWAY. `tls`: UCX's transports between the two workers; with another than tcp
    prefill is at HOME too, because UCX's shared memory does not reach from one network namespace into another."""

    def __init__(self, pair, tls, threads, log_dir):
        self.pair, self.tls, self.threads, self.log_dir = pair, tls, threads, log_dir
        self.prefill_side = AWAY if tls == "tcp" else HOME
        self.processes = []

    def __enter__(self):
        try:
            for program, side, port in (("zeroc-router", HOME, GRPC), ("zeroc-decode", HOME, GRPC + 10),
                                        ("zeroc-prefill", self.prefill_side, GRPC + 20)):
                self.processes.append((Side(self.pair, side, program, self._args(program, side, port), self.log_dir),
                                       port + HTTP - GRPC))
            for process, port in reversed(self.processes):  # the router is ready last, when it has both workers
                wait_until(lambda: process.ready(port), START_S, f"{process.program} is ready")
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _args(self, program, side, port):
        address = self.pair.addresses[side]
        args = ["--model", MODEL_DIR, "--grpc-listen", f"{address}:{port}",
                "--http-listen", f"{address}:{port + HTTP - GRPC}"]
        if program == "zeroc-router":
            return args
        # Shared memory would be chosen between two processes of one machine.
        network = ["--transport-net-devices", self.pair.devices[side]] if self.tls == "tcp" else []
        # The same prompts come again and again: what is measured is that they are computed and sent.
        return [*args, "--router", f"{self.pair.addresses[HOME]}:{GRPC}", "--kv-memory-mib", 256, "--threads",
                self.threads, "--prefix-cache", "false", "--transport-tls", self.tls, *network]

    def complete(self, prompt, **fields):
        """The parsed answer to a greedy completion."""
        body = json.dumps({"model": MODEL_DIR.name, "prompt": prompt, "temperature": 0, "ignore_eos": True, **fields})
        status, text = http_request(self.pair, HOME, HTTP, "POST", "/v1/completions", body.encode(), REQUEST_S)
        if status != 200:
            raise Failed(f"/v1/completions answered {status}: {text[:500]}")
        answer = json.loads(text)
        transport = answer["zeroc"]["transport"]
        if answer["usage"]["completion_tokens"] != fields["max_tokens"]:
            raise Failed(f"{answer['usage']['completion_tokens']} tokens came, not {fields['max_tokens']}")
        if answer["zeroc"]["profile"] != fields["profile"] or answer["zeroc"]["attempts"] != 1:
            raise Failed(f"not the request that was asked for: {answer['zeroc']}")
        if ("tcp" in transport) != (self.tls == "tcp"):
            raise Failed(f"the transport is {transport!r}, asked for was {self.tls}")
        return answer

    def __exit__(self, exc_type, exc, traceback):
        for process, _ in self.processes:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process, _ in self.processes:
            process.end()
        if exc_type is not None and exc_type is not KeyboardInterrupt:
            for process, _ in self.processes:
                print(f"--- {process.program}\n{process.log()[-2000:]}", file=sys.stderr)


def make_prompt(log_dir):
    """The demo's prompt: prose that every Debian machine has, cut to PROMPT_TOKENS tokens of the model."""
    path = pathlib.Path(log_dir) / "text.txt"
    path.write_text("".join((LICENSES / name).read_text() for name in ("GPL-3", "Apache-2.0")))

    def tool(*args):
        done = subprocess.run([BIN_DIR / "zeroc", *args, "--model", MODEL_DIR, "--json"], capture_output=True,
                              text=True, timeout=TOOL_S)
        if done.returncode != 0:
            raise Failed(f"zeroc {args[0]}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    ids = tool("tokenize", "--file", path)["ids"][:PROMPT_TOKENS]
    return tool("detokenize", "--ids", ",".join(map(str, ids)))["text"]


def measure_link(pair, rate):
    """Bits per second each way: the best of a few transfers, because others may hold the cores during one."""
    achieved = {}
    for name, sender, receiver in (("to_decode", AWAY, HOME), ("to_prefill", HOME, AWAY)):
        achieved[name] = max(pair.measure(sender, receiver) for _ in range(3))
        if achieved[name] < RATE_SHARE_MIN * rate and rate <= FAST:
            raise Failed(f"the link was to carry {rate} bit/s and carries {achieved[name]:.0f} {name}")
    return achieved


def measure(trio, prompt, options, rate):
    """{profile: [one record for each repetition]}, in turns; the first turn warms up and is dropped."""
    records = {profile: [] for profile in options.profiles}
    for turn in range(options.repetitions + 1):
        shift = turn % len(options.profiles)
        for profile in options.profiles[shift:] + options.profiles[:shift]:
            z = trio.complete(prompt, profile=profile, max_tokens=options.max_tokens)["zeroc"]
            record = {name: read(z) for name, (_, read) in TIMES.items()}
            record |= {name: z[name] for name in ("wire_hidden_share", "kv_bytes", "transport")}
            # The least that the link needs for these bytes, and how much of that nobody had to wait for.
            record["link"] = z["kv_bytes"]["wire"] * 8 / rate
            record["link_hidden_share"] = max(0.0, 1 - record["wire_visible"] / record["link"])
            if turn > 0:
                records[profile].append(record)
        progress(f"{rate / 1e6:.0f} Mbit/s: turn {turn} of {options.repetitions}")
    return records


def progress(text):
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(records):
    """{profile: {figure: {median, min, max}}} with JCT also relative to the first profile's in the same turn."""
    base = next(iter(records.values()))
    summary = {}
    for profile, runs in records.items():
        names = [name for name, value in runs[0].items() if isinstance(value, float)]
        summary[profile] = {name: spread([run[name] for run in runs]) for name in names}
        summary[profile]["jct_ratio"] = spread([run["jct"] / other["jct"] for run, other in zip(runs, base)])
        summary[profile]["kv_bytes_wire"] = runs[0]["kv_bytes"]["wire"]
    return summary


def table(summary):
    """Lines of a Markdown table; times in milliseconds, median and range."""

    def ms(figure):
        return f"{figure['median'] * 1e3:.0f} ({figure['min'] * 1e3:.0f}..{figure['max'] * 1e3:.0f})"

    def share(figure):
        return f"{figure['median']:.2f} ({figure['min']:.2f}..{figure['max']:.2f})"

    columns = ["ttft", "jct", "prefill", "wire_visible", "wire_total"]
    headings = ["profile", "KV sent, MB", *(f"{TIMES[name][0]}, ms" for name in columns), "bytes / rate, ms",
                "hidden, of total wire", "hidden, of bytes / rate", f"JCT / {next(iter(summary))}"]
    yield "| " + " | ".join(headings) + " |"
    yield "|---" * len(headings) + "|"
    for profile, figures in summary.items():
        cells = [profile, f"{figures['kv_bytes_wire'] / 1e6:.2f}", *(ms(figures[name]) for name in columns),
                 f"{figures['link']['median'] * 1e3:.1f}", share(figures["wire_hidden_share"]),
                 share(figures["link_hidden_share"]), share(figures["jct_ratio"])]
        yield "| " + " | ".join(cells) + " |"


def what_was_said(trio, prompt, options):
    """{profile: (text, tokens, their log probabilities)} at temperature 0."""
    said = {}
    for profile in options.profiles:
        choice = trio.complete(prompt, profile=profile, max_tokens=options.max_tokens, logprobs=1)["choices"][0]
        said[profile] = (choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"])
    return said


def compare(over_link, over_memory):
    """Per profile: whether text and tokens are the same, and the largest difference of their log probabilities."""
    result = {}
    for profile, (text, tokens, logprobs) in over_link.items():
        other_text, other_tokens, other_logprobs = over_memory[profile]
        same = text == other_text and tokens == other_tokens and len(tokens) > 0
        differences = [abs(a - b) for a, b in zip(logprobs, other_logprobs)]
        result[profile] = {"same_tokens": same, "n_tokens": len(tokens), "logprob_difference_max": max(differences)}
    return result


def machine_facts():
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=TOOL_S).stdout.strip()

    cpu = next((line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown")
    return {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "commit": git("rev-parse", "HEAD"),
            "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
            "load_average": os.getloadavg(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])}


def rate_of(text):
    if text[-1:] not in UNITS or not text[:-1].isdigit() or int(text[:-1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate such as 100M or 1G (bits per second)")
    return int(text[:-1]) * UNITS[text[-1]]


def parse_options():
    def count(text):
        if not text.isdigit() or not 1 <= int(text) <= 1000:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 to 1000")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", type=lambda s: [rate_of(r) for r in s.split(",")], default="100M,1G,10G",
                        help="bits per second, with M or G [default: %(default)s]")
    parser.add_argument("--profiles", type=lambda s: s.split(","), default=",".join(PROFILES),
                        help="the first is what the others are compared with [default: %(default)s]")
    parser.add_argument("--repetitions", type=count, default=5, help="after one that warms up [default: %(default)s]")
    parser.add_argument("--max-tokens", type=count, default=32, help="length of a completion [default: %(default)s]")
    parser.add_argument("--threads", type=int, default=0, help="compute threads of a worker; 0: all cores [default: 0]")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="everything that was measured")
    return parser.parse_args()


def run(options, result):
    with tempfile.TemporaryDirectory(prefix="zeroc-link-") as log_dir, ShapedPair() as pair:
        prompt = make_prompt(log_dir)
        with Trio(pair, "tcp", options.threads, log_dir) as trio:
            for rate in options.rates:
                pair.shape(rate)
                achieved = measure_link(pair, rate)
                records = measure(trio, prompt, options, achieved["to_decode"])
                summary = summarise(records)
                result["rates"].append({"rate": rate, "achieved": achieved, "summary": summary, "runs": records})
                progress("")
                carries = " and ".join(f"{bits / 1e6:.0f} {way.replace('_', ' ')}" for way, bits in achieved.items())
                transport = next(iter(records.values()))[0]["transport"]
                print(f"\n{rate / 1e6:.0f} Mbit/s, as TCP payload {carries}; {transport}\n")
                print("\n".join(table(summary)), flush=True)
            pair.shape(CHECK_RATE)
            over_link = what_was_said(trio, prompt, options)
        with Trio(pair, "posix,cma", options.threads, log_dir) as trio:
            result["tokens"] = compare(over_link, what_was_said(trio, prompt, options))
    print("\nTokens at temperature 0 over 1 Gbit/s and over shared memory:")
    for profile, found in result["tokens"].items():
        print(f"  {profile}: {'the same' if found['same_tokens'] else 'DIFFERENT'} {found['n_tokens']} tokens, log "
              f"probabilities differ by at most {found['logprob_difference_max']:g}")
    if not all(found["same_tokens"] for found in result["tokens"].values()):
        raise Failed("the tokens depend on the transport")


def main():
    options = parse_options()
    try:
        check_rights()
    except LinkError as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {error}")
    result = {"machine": machine_facts(), "prompt_tokens": PROMPT_TOKENS, "max_tokens": options.max_tokens, "rates": []}
    print(f"{result['machine']['cpu']}, {result['machine']['cores']} cores; {options.repetitions} repetitions")
    code = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes and removes the link, as Ctrl-C does
    try:
        run(options, result)
    except (Failed, LinkError, AssertionError, OSError, subprocess.SubprocessError) as error:
        print(f"shaped_link: {error}", file=sys.stderr)
        result["error"] = str(error)
        code = 1
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
