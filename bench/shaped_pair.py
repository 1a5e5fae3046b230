"""Two network namespaces joined by a veth pair whose both directions have a stated rate. Standard library only; root.

    with ShapedPair() as pair:
        pair.shape(1_000_000_000)
        pair.measure(0, 1)                    # bits of payload per second from side 0 to side 1, as a socket sees it
        Popen([*pair.enter(1), "program"])    # runs on side 1
        with pair.inside(0):                  # sockets made here belong to side 0
            connection.connect()

Side i is the namespace pair.names[i] with the address pair.addresses[i] on the device pair.devices[i]. Names carry the
process id, so that runs do not meet. Not thread-safe. Leaving the `with` block removes the namespaces and thereby the
link; processes in them must have ended before.
"""

import contextlib
import ctypes
import http.client
import os
import shutil
import socket
import subprocess
import threading
import time

CLONE_NEWNET = 0x40000000  # of sched.h
COMMAND_S = 20  # an ip or tc command
TRANSFER_S = 60  # one measured transfer
MEASURE_S = 0.5  # what a measured transfer should take; longer than any burst or slow start
MEASURE_BYTES_MIN = 1 << 20
# What the shaper lets through at once after a pause. Prefill sends 20 to 250 KB for each layer of a chunk, then pauses,
# so a large burst would carry much of that for free; a small one costs wake-ups: see TSO_SHARE.
BURST_S = 2.5e-4  # of the rate
BURST_BYTES_MIN = 8 << 10
BURST_BYTES_MAX = 80 << 10
# TCP hands over up to 64 KiB at once (TSO). More than a burst would be cut into single frames by the shaper, whose cost
# in wake-ups on both sides a real network card does not have.
TSO_SHARE = 0.8  # of a burst; the rest is for the headers that the shaper counts
TSO_BYTES_MAX = 65536
QUEUE_S = 0.02  # a frame that would wait longer is dropped


class LinkError(Exception):
    """The link could not be made, shaped or measured."""


def check_rights():
    """Raises LinkError with the reason when this process cannot make namespaces."""
    if os.geteuid() != 0:
        raise LinkError("network namespaces and traffic shaping need root: run it with sudo")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise LinkError(f"{program} is missing: install iproute2")


def command(*args):
    """Runs a short command; its output, or LinkError with what it said."""
    try:
        done = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinkError(f"{' '.join(args)}: {error}") from None
    if done.returncode != 0:
        raise LinkError(f"{' '.join(args)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def http_request(pair, side, port, method, path, body, timeout_s):
    """(status, text) of a request that is sent and answered on that side; without a pair, on loopback."""
    host = pair.addresses[side] if pair else "127.0.0.1"
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        with pair.inside(side) if pair else contextlib.nullcontext():
            connection.connect()
        connection.request(method, path, body=body, headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


class ShapedPair:
    def __init__(self):
        base = f"zc{os.getpid()}"
        self.names = [f"{base}a", f"{base}b"]
        self.devices = [f"{base}a", f"{base}b"]  # at most 15 characters: pids have 7
        self.addresses = ["10.199.0.1", "10.199.0.2"]  # known only inside
        self.rate = None

    def __enter__(self):
        check_rights()
        try:
            for name in self.names:
                command("ip", "netns", "add", name)
            ends = [["name", device, "netns", name] for device, name in zip(self.devices, self.names)]
            command("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for side in (0, 1):
                self._set_up(side)
            for side in (0, 1):
                self._await_up(side)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _set_up(self, side):
        device = self.devices[side]
        command(*self.enter(side), "ip", "link", "set", "lo", "up")
        command(*self.enter(side), "ip", "address", "add", f"{self.addresses[side]}/24", "dev", device)
        command(*self.enter(side), "ip", "link", "set", device, "up")
        # The machine's own choice may be BBR, which all but stops for 200 ms every 10 s to probe the round trip, and
        # cubic is not open to every namespace. Where nothing is lost, reno sends the same.
        command(*self.enter(side), "sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control")

    def _await_up(self, side):
        """The kernel announces the carrier a little later, and UCX uses no device before."""
        deadline = time.monotonic() + COMMAND_S
        while "LOWER_UP" not in (said := command("ip", "-n", self.names[side], "link", "show", self.devices[side])) or (
                "state UP" not in said):
            if time.monotonic() > deadline:
                raise LinkError(f"{self.devices[side]} does not come up: {said}")
            time.sleep(0.02)

    def __exit__(self, exc_type, exc, traceback):
        have = {line.split()[0] for line in command("ip", "netns", "list").splitlines() if line}
        for name in self.names:
            if name in have:
                command("ip", "netns", "delete", name)

    def enter(self, side):
        """The words before a command that make it run on that side."""
        return ["ip", "netns", "exec", self.names[side]]

    @contextlib.contextmanager
    def inside(self, side):
        """This thread, and what it starts, is on that side. Sockets stay there afterwards."""
        libc = ctypes.CDLL(None, use_errno=True)

        def move(fd, what):
            if libc.setns(fd, CLONE_NEWNET) != 0:
                raise LinkError(f"setns to {what}: {os.strerror(ctypes.get_errno())}")

        with open("/proc/thread-self/ns/net", "rb") as home, open(f"/run/netns/{self.names[side]}", "rb") as there:
            move(there.fileno(), self.names[side])
            try:
                yield
            finally:
                move(home.fileno(), "the namespace before")

    def shape(self, rate):
        """Both directions carry `rate` bits per second of Ethernet frames from now on."""
        burst = min(max(BURST_BYTES_MIN, int(rate / 8 * BURST_S)), BURST_BYTES_MAX)
        limit = burst + int(rate / 8 * QUEUE_S)
        tso = min(TSO_BYTES_MAX, int(burst * TSO_SHARE))
        for side in (0, 1):
            command(*self.enter(side), "ip", "link", "set", self.devices[side], "gso_max_size", str(tso))
            command(*self.enter(side), "tc", "qdisc", "replace", "dev", self.devices[side], "root", "tbf",
                    "rate", f"{rate}bit", "burst", f"{burst}b", "limit", f"{limit}b")
        self.rate = rate

    def measure(self, sender, receiver):
        """Bits per second of payload that one TCP connection gets in that direction."""
        n_bytes = max(MEASURE_BYTES_MIN, int((self.rate or 1e10) / 8 * MEASURE_S))
        with contextlib.ExitStack() as stack:
            with self.inside(receiver):
                listener = stack.enter_context(socket.create_server((self.addresses[receiver], 0)))
            listener.settimeout(TRANSFER_S)
            with self.inside(sender):
                source = stack.enter_context(socket.create_connection(listener.getsockname(), TRANSFER_S))
            sink = stack.enter_context(listener.accept()[0])
            sink.settimeout(TRANSFER_S)
            errors = []

            def send():
                chunk = memoryview(bytes(1 << 20))
                left = n_bytes
                try:
                    while left > 0:
                        left -= source.send(chunk[:min(left, len(chunk))])
                except OSError as error:
                    errors.append(error)
                    source.close()

            thread = threading.Thread(target=send, daemon=True)
            begin = time.perf_counter()
            thread.start()
            buffer = bytearray(1 << 20)
            got = 0
            while got < n_bytes:
                n = sink.recv_into(buffer)
                if n == 0:
                    break
                got += n
            seconds = time.perf_counter() - begin
            thread.join(TRANSFER_S)
        if got < n_bytes:
            raise LinkError(f"the measured transfer ended after {got} of {n_bytes} bytes: {errors}")
        return got * 8 / seconds
