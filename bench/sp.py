#!/usr/bin/env python3
"""One prompt on one prefill rank and on two: seconds, their ratio, and the bytes between the ranks, for every scheme,
packed and bf16, on this machine alone or over a link of stated bandwidth. Standard library only; --rates needs root.

    bench/sp.py [--model DIR].. [--tokens 8000] [--schemes allgather,ulysses] [--profiles q3,bf16] [--rounds 3]
                [--skip ulysses:q3,..] [--rates none,10G,1G] [--one-rank-once] [--json FILE]

Each rank is a process with one compute thread, pinned to a core of its own. One and two ranks take turns, prompt by
prompt, in the same processes: the router that asks for two ranks is another one. A time is from the start of the
prompt's computation to its first token; a ratio is the median of the rounds' ratios. At a rate router, decode and
leader run in one network namespace, the follower in another, and everything goes over UCX's TCP; at `none`, over
whatever UCX chooses on one host. The model's folder holds a plan with the profiles. Wants an otherwise idle machine.
Beside each ratio stands the most that this machine allows: how much sooner two prefills end that share nothing but it,
one on each core, than one alone that does the work of both, measured between the rounds; and the same ratio in CPU
seconds, one rank's over those of the busier of two: what the split itself costs, whatever else the machine does.
--one-rank-once: a prompt on one rank sees no link and no scheme, so its times and the machine's most are taken in the
first row of a profile, for all rows of that profile: for models that take minutes.
Exit code 0; 1 when something failed; 2 for bad usage.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from cluster import BIN_DIR, MODEL_DIR, START_S, Process, listen_flags, parse_metrics, wait_until  # noqa: E402
from shaped_pair import LinkError, ShapedPair, check_rights, http_request  # noqa: E402
from zeroc_cli import machine, machine_line, table  # noqa: E402

UNITS = {"M": 10**6, "G": 10**9}
HOME, AWAY = 0, 1
REQUEST_S = 600
ONE, TWO = 0, 1  # routers: that asks for one rank, for both
KV_MIB = 1024
WARM_UP_TOKENS = 512  # before the rounds
ALONE_TOKENS = 2048  # of the prompts that share nothing
READY_S = 300  # a large model's weights are read and hashed


class Failed(Exception):
    pass


class Program(Process):
    """One of our programs on one side of the link (or on none), on given cores."""

    def __init__(self, pair, side, cores, program, args, log_dir):
        self.program, self.log_path = program, pathlib.Path(log_dir) / f"{program}-{time.monotonic_ns()}.log"
        enter = pair.enter(side) if pair else []
        env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        with open(self.log_path, "wb") as log:
            self.popen = subprocess.Popen([*enter, "taskset", "-c", cores, BIN_DIR / program, *map(str, args)],
                                          cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                          stderr=subprocess.STDOUT, start_new_session=True)


class Group:
    """Two routers, decode, a leader and a follower."""

    def __init__(self, pair, model, scheme, log_dir):
        self.pair, self.model, self.scheme, self.log_dir = pair, model, scheme, log_dir
        self.processes = []
        cores = sorted(os.sched_getaffinity(0))
        self.first, self.second, self.all = str(cores[0]), str(cores[-1]), ",".join(map(str, cores))

    def host(self, side):
        return self.pair.addresses[side] if self.pair else "127.0.0.1"

    def start(self, program, side, cores, port, *args):
        listen = [x.replace("127.0.0.1", self.host(side)) for x in listen_flags(port, port + 1)]
        if program != "zeroc-router":
            network = []
            if self.pair:
                network = ["--transport-tls", "tcp", "--transport-net-devices", self.pair.devices[side]]
            args = [*args, "--kv-memory-mib", KV_MIB, "--threads", 1, "--prefix-cache", "false", *network]
        self.processes.append((Program(self.pair, side, cores, program, ["--model", self.model, *listen, *args],
                                       self.log_dir), side, port + 1))

    def __enter__(self):
        try:
            base = 9100 if self.pair else random.randrange(20000, 30000, 20)
            self.routers = [base, base + 2]
            routers = ",".join(f"{self.host(HOME)}:{port}" for port in self.routers)
            for port, tokens in zip(self.routers, (0, 1)):
                self.start("zeroc-router", HOME, self.all, port, "--sp-min-tokens", tokens,
                           "--local-prefill-tokens", 0, "--audit-share", 0, "--adaptive-profiles", "false")
            self.start("zeroc-decode", HOME, self.all, base + 4, "--router", routers)
            self.start("zeroc-prefill", HOME, self.first, base + 6, "--router", routers, "--sp-scheme", self.scheme,
                       "--sp-followers", f"{self.host(AWAY)}:{base + 8}", "--sp-patience-ms", 120000)
            self.start("zeroc-prefill", AWAY, self.second, base + 8)
            for process, side, port in reversed(self.processes):
                wait_until(lambda p=process, s=side, at=port: self.ready(p, s, at), READY_S,
                           f"{process.program} is ready")
            leader = self.processes[3][0]
            wait_until(lambda: "prefill group formed" in leader.log(), START_S, "the group is formed")
            time.sleep(2.5)  # a heartbeat tells the routers
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def ask(self, side, port, method, path, body=None, timeout_s=REQUEST_S):
        return http_request(self.pair, side, port, method, path, body, timeout_s)

    def ready(self, process, side, port):
        if process.popen.poll() is not None:
            raise Failed(f"{process.program} ended with {process.popen.returncode}")
        try:
            return self.ask(side, port, "GET", "/readyz", timeout_s=5)[0] == 200
        except OSError:
            return False

    def cpu_seconds(self):
        """Of each rank, since its start."""
        def of(pid):
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return [of(process.popen.pid) for process, *_ in self.processes[3:]]

    def sp_bytes(self):
        """What each rank has sent so far."""
        pages = [parse_metrics(self.ask(side, port, "GET", "/metrics")[1]) for _, side, port in self.processes[3:]]
        return [sum(value for name, _, value in page if name == "zeroc_sp_bytes_total") for page in pages]

    def sp_bytes_since(self, before):
        """Mean over the ranks, once both have counted a prompt: the follower may end after the answer."""
        def counted():
            sent = [now - then for now, then in zip(self.sp_bytes(), before, strict=True)]
            return sent if min(sent) > 0 else None
        return statistics.mean(wait_until(counted, START_S, "both ranks have counted what they sent"))

    def prefill(self, router, ids, profile):
        """The answer's `zeroc` object."""
        body = {"model": pathlib.Path(self.model).name, "prompt": ids, "max_tokens": 1, "temperature": 0,
                "ignore_eos": True, "profile": profile}
        status, text = self.ask(HOME, self.routers[router] + 1, "POST", "/v1/completions", json.dumps(body))
        if status != 200:
            raise Failed(f"/v1/completions answered {status}: {text[:500]}")
        answer = json.loads(text)["zeroc"]
        if answer["sp_ranks"] != router + 1 or answer["attempts"] != 1:
            raise Failed(f"not what was asked for: {answer}")
        return answer

    def __exit__(self, exc_type, exc, traceback):
        for process, *_ in self.processes:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process, *_ in self.processes:
            process.end()
        if exc_type is not None and exc_type is not KeyboardInterrupt:
            for process, *_ in self.processes:
                print(f"--- {process.program}\n{process.log()[-2000:]}", file=sys.stderr)


def both_cores(model, profile, n_tokens):
    """Twice the rate of the slower of two prefills at once, one on each core, over that of one alone."""
    cores = sorted(os.sched_getaffinity(0))

    def start(core):
        return subprocess.Popen(["taskset", "-c", str(core), BIN_DIR / "zeroc", "bench", "prefill", "--model", model,
                                 "--profile", profile, "--prompt-tokens", str(n_tokens), "--repeat", "1",
                                 "--threads", "1", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def rate(process):
        text, _ = process.communicate(timeout=REQUEST_S)
        if process.returncode != 0:
            raise Failed(f"zeroc bench prefill ended with {process.returncode}")
        return json.loads(text)["tokens_per_s"]

    alone = rate(start(cores[0]))
    return 2 * min(map(rate, [start(cores[0]), start(cores[-1])])) / alone


def measure(options, model, pair, rate, scheme, one_rank, log_dir):
    """one_rank: what is known of a model's profiles on one rank; kept with --one-rank-once."""
    rows = []
    vocab = json.loads((pathlib.Path(model) / "config.json").read_text())["vocab_size"]
    draw = random.Random(1)
    with Group(pair, model, scheme, log_dir) as group:
        for profile in options.profiles.split(","):
            if f"{scheme}:{profile}" in options.skip.split(","):
                continue
            known = one_rank.get((model, profile))
            seconds, cpu = {ONE: [], TWO: []}, {ONE: [], TWO: []}
            machine_ratios = []
            for round_idx in range(options.rounds + 1):
                n_tokens = options.tokens if round_idx > 0 else min(options.tokens, WARM_UP_TOKENS)
                ids = [draw.randrange(10, min(vocab, 4000)) for _ in range(n_tokens)]
                for router in (ONE, TWO) if known is None or round_idx == 0 else (TWO,):
                    before, cpu_before = group.sp_bytes(), group.cpu_seconds()
                    answer = group.prefill(router, ids, profile)
                    if router == TWO:
                        n_bytes = group.sp_bytes_since(before)
                    if round_idx > 0:
                        seconds[router].append(answer["phases"]["prefill"])
                        cpu[router].append(max(now - then for now, then in zip(group.cpu_seconds(), cpu_before,
                                                                               strict=True)))
                if known is None and round_idx > 0:
                    machine_ratios.append(both_cores(model, profile, min(options.tokens, ALONE_TOKENS)))
            if known is not None:
                seconds[ONE], cpu[ONE], machine_ratios = known
            elif options.one_rank_once:
                one_rank[(model, profile)] = seconds[ONE], cpu[ONE], machine_ratios
            ratios = sorted(one / two for one, two in zip(seconds[ONE], seconds[TWO], strict=True))
            rows.append({"model": pathlib.Path(model).name, "rate": rate, "scheme": scheme, "profile": profile,
                         "tokens": options.tokens, "seconds_1": seconds[ONE], "seconds_2": seconds[TWO],
                         "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
                         "cpu_seconds_1": cpu[ONE], "cpu_seconds_2": cpu[TWO],
                         "cpu_ratio": statistics.median(cpu[ONE]) / statistics.median(cpu[TWO]),
                         "one_rank_of_an_earlier_row": known is not None,
                         "machine_ratio": statistics.median(machine_ratios), "machine_ratios": machine_ratios,
                         "bytes_per_rank": n_bytes})
            print(f"{rows[-1]['model']} {rate} {scheme} {profile}: {rows[-1]['ratio']:.2f}x of "
                  f"{rows[-1]['machine_ratio']:.2f}x, in CPU seconds {rows[-1]['cpu_ratio']:.2f}x", file=sys.stderr)
    return rows


def show(rows):
    head = ["model", "link", "scheme", "profile", "1 rank, s", "2 ranks, s", "ratio (least, greatest)",
            "two that share nothing", "in CPU seconds", "MB per rank"]
    return table(head, [[r["model"], r["rate"], r["scheme"], r["profile"], f"{statistics.median(r['seconds_1']):.3f}",
                         f"{statistics.median(r['seconds_2']):.3f}",
                         f"{r['ratio']:.2f} ({r['ratio_min']:.2f}, {r['ratio_max']:.2f})", f"{r['machine_ratio']:.2f}",
                         f"{r['cpu_ratio']:.2f}", f"{r['bytes_per_rank'] / 1e6:.2f}"] for r in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="default: the bundled one")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--schemes", default="allgather,ulysses")
    parser.add_argument("--profiles", default="q3,bf16")
    parser.add_argument("--skip", default="", help="rows to leave out, as scheme:profile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", default="none", help="bits per second, as 1G; none: no shaped link")
    parser.add_argument("--one-rank-once", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the programs and the link end too
    facts = machine()
    rows, one_rank = [], {}
    try:
        with tempfile.TemporaryDirectory(prefix="zeroc-sp-") as log_dir:
            for model, rate, scheme in itertools.product(options.model or [str(MODEL_DIR)], options.rates.split(","),
                                                         options.schemes.split(",")):
                if rate == "none":
                    rows += measure(options, model, None, rate, scheme, one_rank, log_dir)
                    continue
                check_rights()
                with ShapedPair() as pair:
                    pair.shape(int(float(rate[:-1]) * UNITS[rate[-1]]))
                    rows += measure(options, model, pair, rate, scheme, one_rank, log_dir)
    except (Failed, LinkError, AssertionError) as error:
        print(f"sp.py: {error}", file=sys.stderr)
        return 1
    print(f"{machine_line(facts)}\n\n    {shlex.join(['bench/sp.py', *sys.argv[1:]])}\n")
    print("\n".join(show(rows)))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
