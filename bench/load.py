#!/usr/bin/env python3
"""Many streams at once for a long time: nothing may fail, leak or grow, and what the router costs. Standard library
only.

    bench/load.py [--seconds 600] [--streams 64] [--cancel 0.15] [--seed 1] [--json FILE] [--table FILE]

Router, prefill and decode on loopback, one compute thread each. First the machine is idle but for one stream after the
other; then so many closed-loop streams of mixed prompt lengths (the licences of the machine, log-normal, median 150
tokens, up to 3,500) and 8 to 128 tokens of output, some of them left by their client at a random moment, before the
first token too.

Exit code 0 when every stream that was not left ended whole, memory is flat (each process without its KV memory, median
of the last fifth of the time against the second fifth) and every block is back; 1 otherwise; 2 for bad usage.
"""

import argparse
import asyncio
import json
import math
import os
import pathlib
import random
import shlex
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

import texts  # noqa: E402  (the path comes first)
from cluster import SETTLE_S, Cluster, wait_until  # noqa: E402

IDLE_REQUESTS = 60
STREAM_S = 120  # no stream may take longer
SAMPLE_S = 2
GROWTH_SHARE_MAX, GROWTH_BYTES_MAX = 0.05, 8 << 20
KV_MIB = 256  # of each worker
CHARS_PER_TOKEN = 4.4  # of the demo model on this prose


class Load:
    """Closed-loop clients in one event loop. Counts what they saw."""

    def __init__(self, port, cancel_share, seed):
        self.port, self.cancel_share = port, cancel_share
        self.draw = random.Random(seed)
        self.errors, self.n_whole, self.n_left, self.n_events = [], 0, 0, 0
        self.ttft, self.router_ttft, self.jct = [], [], []

    def body(self):
        n_tokens = min(3500, max(8, self.draw.lognormvariate(math.log(150), 1.2)))
        n_chars = int(n_tokens * CHARS_PER_TOKEN)
        start = self.draw.randrange(0, 60000 - n_chars)
        return {"model": "zeroc-demo", "prompt": texts.prose(n_chars, start), "stream": True, "ignore_eos": True,
                "max_tokens": self.draw.randint(8, 128), "temperature": self.draw.choice([0, 0, 1]),
                "stream_options": {"include_usage": True}}

    async def one(self, leave_after=None):
        """One stream; `leave_after`: the client is gone after so many seconds."""
        body = self.body()
        data = json.dumps(body).encode()
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                         b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            async with asyncio.timeout(STREAM_S if leave_after is None else leave_after):
                await self.read(reader, body, started)
        except TimeoutError:
            if leave_after is None:
                self.errors.append(f"no end within {STREAM_S} s")
            else:
                self.n_left += 1
        finally:
            writer.close()

    async def read(self, reader, body, started):
        """Reads the answer to its end and judges it."""
        first, last, n_tokens, done = None, b"", None, False
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                if line.startswith((b"event: error", b"HTTP/1.1 4", b"HTTP/1.1 5")):
                    self.errors.append((line + await reader.read(2000)).decode(errors="replace"))
                    return
                continue
            first = first or time.monotonic()
            self.n_events += 1
            done = line.startswith(b"data: [DONE]")
            if b'"zeroc":' in line:
                last = line
            elif b'"choices":[]' in line:
                n_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        if not done or n_tokens != body["max_tokens"]:
            self.errors.append(f"a stream of {n_tokens} tokens instead of {body['max_tokens']}, [DONE]: {done}")
            return
        stats = json.loads(last[6:])["zeroc"]
        self.n_whole += 1
        self.ttft.append(first - started)
        self.router_ttft.append(stats["ttft_seconds"])
        self.jct.append(stats["jct_seconds"])

    async def client(self, until):
        while time.monotonic() < until and len(self.errors) < 100:
            leaves = self.draw.random() < self.cancel_share
            await self.one(self.draw.uniform(0.01, 2.0) if leaves else None)

    async def run(self, n_streams, seconds):
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.client(until) for _ in range(n_streams)))

    async def in_turns(self, n):
        for _ in range(n):
            await self.one()


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid):
    """Resident bytes, without the KV memory: that is taken once and touched as it is first used."""
    size = total = 0
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1]) << 10
        elif line.startswith("Rss:") and size < KV_MIB << 20:
            total += int(line.split()[1]) << 10
    return total


def totals(cluster):
    """Counters whose differences tell what happened in between."""
    def seconds(worker, name):
        return sum(v for n, _, v in worker.metrics() if n == name)

    def workers(name):  # decode workers compute short prompts themselves
        return sum(seconds(worker, name) for worker in (*cluster.prefill, *cluster.decode))

    router = cluster.router
    return {"router_cpu": cpu_seconds(router.popen.pid),
            "tokens": seconds(router, "vllm:generation_tokens_total"),
            "worker_queue": workers("vllm:request_queue_time_seconds_sum"),
            "worker_prefill": workers("vllm:request_prefill_time_seconds_sum"),
            "worker_requests": workers("vllm:request_prefill_time_seconds_count"),
            "router_ttft": seconds(router, "vllm:time_to_first_token_seconds_sum"),
            "router_requests": seconds(router, "vllm:time_to_first_token_seconds_count")}


def costs(before, after):
    """What the router took of the time in between."""
    d = {key: after[key] - before[key] for key in before}
    worker = (d["worker_queue"] + d["worker_prefill"]) / d["worker_requests"]
    ttft = d["router_ttft"] / d["router_requests"]
    return {"tokens": int(d["tokens"]), "router_cpu_us_per_token": d["router_cpu"] / d["tokens"] * 1e6,
            "ttft_mean_ms": ttft * 1e3, "worker_mean_ms": worker * 1e3, "added_ttft_mean_ms": (ttft - worker) * 1e3}


async def sample_memory(processes, samples):
    while True:
        samples.append({name: rss_bytes(p.popen.pid) for name, p in processes.items()})
        await asyncio.sleep(SAMPLE_S)


def growth(samples, name):
    """Median of the last fifth of the time less that of the second fifth, bytes; and the median of the second."""
    values = [sample[name] for sample in samples]
    fifth = max(1, len(values) // 5)
    early = statistics.median(values[fifth:2 * fifth])
    return statistics.median(values[-fifth:]) - early, early


def percentiles(values):
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values)}


async def measure(cluster, arguments):
    processes = {"router": cluster.router, "prefill": cluster.prefill[0], "decode": cluster.decode[0]}
    idle = Load(cluster.router.http_port, 0, arguments.seed)
    await idle.in_turns(5)
    before = totals(cluster)
    await idle.in_turns(IDLE_REQUESTS)
    idle_costs = costs(before, totals(cluster))

    load, samples = Load(cluster.router.http_port, arguments.cancel, arguments.seed), []
    sampling = asyncio.create_task(sample_memory(processes, samples))
    before, started = totals(cluster), time.monotonic()
    await load.run(arguments.streams, arguments.seconds)
    seconds = time.monotonic() - started
    after = totals(cluster)
    sampling.cancel()
    memory = {}
    for name in processes:
        grown, early = growth(samples, name)
        memory[name] = {"early_mib": early / 2**20, "grown_mib": grown / 2**20,
                        "max_mib": max(s[name] for s in samples) / 2**20,
                        "flat": grown <= max(GROWTH_BYTES_MAX, GROWTH_SHARE_MAX * early)}
    return {"seconds": seconds, "streams": arguments.streams, "whole": load.n_whole, "left_by_clients": load.n_left,
            "errors": idle.errors + load.errors, "client_ttft_s": percentiles(load.ttft),
            "jct_s": percentiles(load.jct), "idle": idle_costs, "loaded": costs(before, after), "memory": memory,
            "memory_samples_mib": [{k: round(v / 2**20, 1) for k, v in s.items()} for s in samples]}


def settled(cluster):
    """What is still held when all is over; empty: nothing."""
    held = []
    try:
        wait_until(lambda: cluster.router.metric("vllm:num_requests_running") == 0, SETTLE_S, "no request runs")
        for worker in (*cluster.decode, *cluster.prefill):
            wait_until(lambda w=worker: w.used_blocks() == 0, SETTLE_S, f"{worker.program} holds no block")
            wait_until(lambda w=worker: w.metric("vllm:kv_cache_usage_perc") == 0, SETTLE_S, "usage is 0")
    except AssertionError as error:
        held.append(str(error))
    for name in ("zeroc_kv_leases_expired_total", "zeroc_kv_checksum_failures_total"):
        if cluster.decode[0].metric(name):
            held.append(f"{name} is {cluster.decode[0].metric(name):.0f}")
    return held


def machine():
    cpu = next((line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    return {"cpu": cpu, "cores": os.cpu_count(), "commit": commit.stdout.strip(),
            "loadavg": pathlib.Path("/proc/loadavg").read_text().split()[0]}


def table(result):
    lines = [f"{result['streams']} streams for {result['seconds']:.0f} s: {result['whole']} whole, "
             f"{result['left_by_clients']} left by their clients, {len(result['errors'])} errors, "
             f"{result['loaded']['tokens'] / result['seconds']:.0f} tokens/s. {result['machine']['cpu']}, "
             f"{result['machine']['cores']} cores, the client on them too; load average "
             f"{result['machine']['loadavg_before']} before and {result['machine']['loadavg']} at the end.", "",
             "| | one stream at a time | under load |", "|---|---|---|"]
    for key, what in (("router_cpu_us_per_token", "router, CPU microseconds per token"),
                      ("ttft_mean_ms", "TTFT at the router, mean, ms"),
                      ("worker_mean_ms", "of it queue and compute of the worker that prefilled, ms"),
                      ("added_ttft_mean_ms", "the rest: router, reserve, RPC, ms")):
        lines.append(f"| {what} | {result['idle'][key]:.2f} | {result['loaded'][key]:.2f} |")
    lines += ["", "| seconds | p50 | p95 | p99 | max |", "|---|---|---|---|---|"]
    for key, what in (("client_ttft_s", "TTFT at the client"), ("jct_s", "JCT")):
        lines.append(f"| {what} | " + " | ".join(f"{v:.3f}" for v in result[key].values()) + " |")
    lines += ["", "| memory without KV, MiB | second fifth | grown by the last fifth | largest |", "|---|---|---|---|"]
    for name, m in result["memory"].items():
        lines.append(f"| {name} | {m['early_mib']:.1f} | {m['grown_mib']:+.1f} | {m['max_mib']:.1f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--cancel", type=float, default=0.15, help="share of streams that their clients leave")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--table", type=pathlib.Path, help="the page, with the command, as Markdown")
    arguments = parser.parse_args()
    if not (arguments.seconds >= 10 and arguments.streams >= 1 and 0 <= arguments.cancel < 1):
        parser.error("--seconds is at least 10, --streams at least 1, --cancel in [0, 1)")

    busy = pathlib.Path("/proc/loadavg").read_text().split()[0]
    workers = ["--kv-memory-mib", KV_MIB]
    # Room for every stream's prompt, and for those of streams that were left a moment ago.
    queue = ["--queue-max", 2 * arguments.streams]
    with Cluster(decode_args=workers, prefill_args=[*workers, *queue]) as cluster:
        cluster.wait_ready()
        result = asyncio.run(measure(cluster, arguments))
        result["held"] = settled(cluster)
        failed = result["errors"] or result["held"] or not all(m["flat"] for m in result["memory"].values())
        if failed:
            cluster.print_logs()
    result["machine"] = {**machine(), "loadavg_before": busy}
    result["command"] = shlex.join(["bench/load.py", *sys.argv[1:]])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.table:
        arguments.table.write_text(f"# Load\n\nMade by `{result['command']}`: see there for what is asked and when it "
                                   f"fails.\n\n{table(result)}")
    print(table(result))
    print("errors:", result["errors"][:5], "held:", result["held"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
