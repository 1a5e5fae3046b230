#!/usr/bin/env python3
"""A rolling restart of every role under load, driven as the chart drives it: one at a time, SIGTERM, drain, the next
when the new one is ready. No request fails and none is cut short.

Clients choose among the routers that say they are ready, as a Service does, a little late, as a Service is; and they
ask another router when a connection is refused, as clients do.
"""

import json
import threading
import time
import unittest

import texts
from cluster import SETTLE_S, TIME_SCALE, Cluster, ClusterTest, Stream, wait_until

N_CLIENTS = 3
MAX_TOKENS = 24
POLL_S = 0.1  # how late the clients' view of the routers is
# Longer than POLL_S, so that nobody asks a router that no longer accepts. The chart's is seconds: a Service is slower.
DRAIN_DELAY_MS = int(600 * TIME_SCALE)


class Load:
    """Clients that stream completions until told to stop, and remember what went wrong."""

    def __init__(self, routers):
        self.routers = routers  # a function: the routers that exist now
        self.ready = []
        self.failures, self.n_ok, self.n_refused = [], 0, 0
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.poll)]
        self.threads += [threading.Thread(target=self.client, args=(i,)) for i in range(N_CLIENTS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc):
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def poll(self):
        while not self.stopping.is_set():
            self.ready = [r.http_port for r in self.routers() if r.status("/readyz") == 200]
            time.sleep(POLL_S)

    def client(self, number):
        n = number
        while not self.stopping.is_set():
            ports = self.ready
            if not ports:
                time.sleep(POLL_S)
                continue
            n += 1
            try:
                self.request(ports[n % len(ports)], texts.LONG if n % 5 == 0 else texts.SHORT)
            except ConnectionRefusedError:
                with self.lock:
                    self.n_refused += 1
            except Exception as error:  # whatever it is, it is a failed request
                with self.lock:
                    self.failures.append(repr(error))

    def request(self, port, prompt):
        stream = Stream(port, {"model": "zeroc-demo", "prompt": prompt, "temperature": 0, "stream": True,
                               "max_tokens": MAX_TOKENS, "ignore_eos": True,
                               "stream_options": {"include_usage": True}})
        if stream.status != 200:
            body = stream.response.read().decode()
            stream.close()
            raise AssertionError(f"status {stream.status}: {body[:300]}")
        events = list(stream.events())
        usage = events[-1].get("usage") if events else None
        if not stream.done or not usage or usage["completion_tokens"] != MAX_TOKENS:
            raise AssertionError(f"cut short: {json.dumps(events[-1:])[:300]}")
        with self.lock:
            self.n_ok += 1

    def wait_more(self, n):
        """Until n more requests have ended well."""
        goal = self.n_ok + n
        wait_until(lambda: self.n_ok >= goal or self.failures, SETTLE_S * 3, f"{n} more requests")


class RollingRestartTest(ClusterTest):
    def test_every_role(self):
        delay = ["--drain-delay-ms", DRAIN_DELAY_MS]
        cluster = self.enterContext(Cluster(n_routers=2, n_decode=2, n_prefill=2, router_args=delay))
        cluster.wait_ready()
        for router in cluster.routers:
            wait_until(lambda r=router: r.metric("zeroc_workers") == 4, SETTLE_S, "both routers know all four workers")
        with Load(lambda: list(cluster.routers)) as load:
            load.wait_more(5)
            for role, services in (("decode", cluster.decode), ("prefill", cluster.prefill),
                                   ("router", cluster.routers)):
                for service in list(services):
                    started = time.monotonic()
                    cluster.restart(service)
                    load.wait_more(4)
                    print(f"{role} restarted in {time.monotonic() - started:.1f} s, {load.n_ok} requests so far, "
                          f"{load.n_refused} connections refused and tried again")
                    self.assertEqual(load.failures, [], f"while {role} {service.grpc_port} was restarted")
        self.assertEqual(load.failures, [])
        for router in cluster.routers:
            wait_until(lambda r=router: r.metric("zeroc_workers") == 4, SETTLE_S, "all workers are back everywhere")
        for worker in (*cluster.decode, *cluster.prefill):
            self.assertEqual(worker.metric("zeroc_routers_registered"), 2)


if __name__ == "__main__":
    unittest.main()
