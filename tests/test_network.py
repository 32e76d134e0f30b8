"""Networks: delays by hand-computed cases, and the emulation beside the kernel's own TCP across a real slow link.

The slow link joins two network namespaces: the kernel's netem, or, where the kernel has none, a relay that holds each
packet back between two TUN devices. TCP is the kernel's in both.
"""

import fcntl
import json
import math
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest

from splitlearn.frames import Message, encode
from splitlearn.network import PROFILES, Emulated, Link, Profile, RealClock, VirtualClock

PLAIN = Profile(up=1e6, down=2e6, latency=0.05)
FRAME = encode(Message("request"))


def echo(frame: bytes) -> bytes:
    return frame


def on_wire(nbytes: int) -> int:
    """Bits of a frame, with 52 bytes of headers on each packet of 1,500 bytes."""
    return 8 * (nbytes + 52 * max(1, math.ceil(nbytes / 1448)))


# Profiles and clocks


def test_profiles_are_networks_from_fast_to_slow() -> None:
    assert list(PROFILES) == ["lan", "wifi", "4g", "5g", "satellite"]
    times = {}
    for name, profile in PROFILES.items():
        carrier = Emulated(echo, profile, clock=VirtualClock())
        for _ in range(20):
            carrier(bytes(64_000))
        times[name] = carrier.seconds
    assert times["lan"] < times["wifi"] < times["5g"] < times["4g"] < times["satellite"]
    assert PROFILES["satellite"].latency > 2 * 35_786e3 / 299_792_458  # nothing outruns light


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"up": 0}, "expected a bandwidth up > 0 bit/s, got 0"),
        ({"down": -1}, "expected a bandwidth down > 0 bit/s, got -1"),
        ({"up": math.nan}, "expected a bandwidth up > 0 bit/s, got nan"),
        ({"latency": -1}, "expected a finite latency ≥ 0 s, got -1"),
        ({"latency": math.nan}, "expected a finite latency ≥ 0 s, got nan"),
        ({"jitter": math.inf}, "expected a finite jitter ≥ 0 s, got inf"),
        ({"loss": 1}, r"expected a loss in \[0, 1\), got 1"),
        ({"loss": math.nan}, r"expected a loss in \[0, 1\), got nan"),
    ],
)
def test_what_is_no_network_is_refused(change: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PLAIN, **change)


def test_requests_go_up_or_down() -> None:
    with pytest.raises(ValueError, match="expected requests to go 'up' or 'down', got 'left'"):
        Emulated(echo, PLAIN, requests="left")


def test_a_virtual_clock_adds_up_what_all_threads_sleep() -> None:
    clock = VirtualClock()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(clock.sleep, [0.5] * 4000))
    assert clock.now() == 2000
    for seconds in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected finite seconds ≥ 0"):
            clock.sleep(seconds)


def test_real_time_really_passes() -> None:
    before = time.monotonic()
    Emulated(echo, Profile(up=1e9, down=1e9, latency=0.02))(FRAME)
    assert time.monotonic() - before >= 0.04
    assert RealClock().now() >= before


# Delays


@pytest.mark.parametrize("requests", ["up", "down"])
def test_a_frame_takes_its_bits_over_the_bandwidth_and_the_latency(requests: str) -> None:
    clock, reply = VirtualClock(), bytes(1000)
    carrier = Emulated(lambda _: reply, PLAIN, clock=clock, requests=requests)
    assert carrier(FRAME) is reply
    up, down = (len(FRAME), 1000) if requests == "up" else (1000, len(FRAME))
    assert carrier.seconds == pytest.approx(0.1 + on_wire(up) / 1e6 + on_wire(down) / 2e6)
    assert clock.now() == pytest.approx(carrier.seconds)


def test_an_empty_frame_is_a_packet_all_the_same() -> None:
    carrier = Emulated(echo, PLAIN, clock=VirtualClock())
    carrier(b"")
    assert carrier.seconds == pytest.approx(0.1 + 8 * 52 / 1e6 + 8 * 52 / 2e6)


def test_a_stream_starts_slowly_and_again_after_a_pause() -> None:
    clock = VirtualClock()
    network = replace(PLAIN, up=math.inf, down=math.inf)
    carrier = Emulated(lambda _: b"", network, clock=clock)

    def trips(packets: int) -> int:
        before = clock.now()
        carrier(bytes(1448 * packets))
        return round((clock.now() - before) / 0.1)

    assert trips(11) == 2  # 10, then 1
    assert trips(100) == 3  # 21, 42, then 37
    assert trips(100) == 1  # from 121
    clock.sleep(0.6)  # with the last reply two timeouts of 0.3 s, so a quarter of 221
    assert trips(100) == 2  # 55, then 45
    clock.sleep(100)
    assert trips(11) == 2


def test_the_bandwidth_hides_the_waiting_where_a_window_fills_it() -> None:
    carrier = Emulated(lambda _: b"", PLAIN, clock=VirtualClock())  # 10 packets take 0.12 s, a round trip 0.1 s
    carrier(bytes(1_000_000))
    assert carrier.seconds == pytest.approx(0.1 + on_wire(1_000_000) / 1e6 + on_wire(0) / 2e6)


def test_jitter_spreads_the_latency_from_a_seed_and_never_below_zero() -> None:
    network = Profile(up=math.inf, down=math.inf, latency=0.05, jitter=0.01)

    def delays(network: Profile, seed: int) -> list[float]:
        clock = VirtualClock()
        carrier, times = Emulated(echo, network, clock=clock, seed=seed), [0.0]
        for _ in range(2000):
            carrier(FRAME)
            times.append(clock.now())
        return [after - before for before, after in pairwise(times)]

    one = delays(network, 1)
    assert one == delays(network, 1) != delays(network, 2)
    assert mean(one) == pytest.approx(0.1, abs=4 * 0.01 * math.sqrt(2 / 2000))  # 4 standard errors
    assert mean((delay - 0.1) ** 2 for delay in one) == pytest.approx(2e-4, rel=4 * math.sqrt(2 / 2000))
    assert min(delays(replace(network, latency=0.001), 1)) == 0


def test_a_lost_packet_costs_a_timeout_alone_and_a_round_trip_among_others() -> None:
    lossy = Profile(up=math.inf, down=math.inf, latency=0.05, loss=0.05)

    def cost(packets: int, count: int = 4000) -> float:
        """Mean seconds over what the same frames take without loss."""
        totals = []
        for network in (lossy, replace(lossy, loss=0)):
            carrier = Emulated(lambda _: b"", network, clock=VirtualClock(), seed=3)
            for _ in range(count):
                carrier(bytes(1448 * packets))
            totals.append(carrier.seconds / count)
        return totals[0] - totals[1]

    alone = 0.3 * 0.05 / 0.95  # of each of the request and the empty reply; geometric
    assert cost(1) == pytest.approx(2 * alone, rel=0.15)
    # Of two packets: the first alone lost costs a round trip, the last two; then the rest is on its way alone.
    first, last = 0.05 * 0.95, 0.05
    pair = first * 0.1 + last * 0.2 + (first + 0.95 * last) * alone
    assert cost(2) == pytest.approx(pair + alone, rel=0.15)


def test_loss_and_waiting_repeat_from_a_seed() -> None:
    totals = []
    for seed in (1, 1, 2):
        carrier = Emulated(echo, replace(PROFILES["4g"], loss=0.02), clock=VirtualClock(), seed=seed)
        for _ in range(50):
            carrier(bytes(64_000))
        totals.append(carrier.seconds)
    assert totals[0] == totals[1] != totals[2]


# Links


def test_frames_leave_one_after_another() -> None:
    link = Link()
    assert link.book("up", 0, 1) == 0
    assert link.book("up", 0.5, 1) == 1
    assert link.book("down", 0.5, 1) == 0.5  # a queue of its own
    assert link.book("up", 5, 1) == 5
    assert link.book("up", 0, 3) == 2  # the gap is just long enough
    assert link.book("up", 0, 1) == 6
    assert link.book("up", 9, 1) == 9
    assert link.book("up", 6.5, 2.5) == 9 + 1  # 7 to 9 is too short
    assert link.book("up", 6.5, 2) == 7


def test_bookings_never_overlap() -> None:
    link, draw = Link(), random.Random(0)
    booked = []
    for _ in range(500):
        ready, seconds = draw.uniform(0, 100), draw.uniform(0, 1)
        start = link.book("up", ready, seconds)
        assert start >= ready
        booked.append((start, start + seconds))
    booked.sort()
    for (_, end), (start, _) in pairwise(booked):
        assert start >= end


def test_clients_on_one_link_share_its_bandwidth_in_whatever_order_they_run() -> None:
    link, frame = Link(), bytes(125_000)
    clocks = [VirtualClock() for _ in range(3)]
    alone = on_wire(len(frame)) / 1e6
    for clock in clocks:
        carrier = Emulated(lambda _: b"", PLAIN, clock=clock, link=link)
        for _ in range(4):
            carrier(frame)
    apart = VirtualClock()
    carrier = Emulated(lambda _: b"", PLAIN, clock=apart)
    for _ in range(4):
        carrier(frame)
    assert clocks[0].now() == pytest.approx(apart.now())
    assert clocks[-1].now() >= 12 * alone  # the link carried all twelve
    assert clocks[-1].now() < 1.1 * (12 * alone + 4 * 0.1)


def test_threads_that_share_a_carrier_wait_in_real_time_for_their_turn() -> None:
    carrier = Emulated(lambda _: b"", Profile(up=8e6, down=8e6, latency=0))
    before = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(carrier, [bytes(20_000)] * 4))
    assert time.monotonic() - before >= 4 * 0.02


def test_a_stream_keeps_its_order_where_threads_share_it() -> None:
    class Still(VirtualClock):
        def sleep(self, seconds: float) -> None:
            """All callers asked at once."""

    carrier = Emulated(lambda _: b"", replace(PLAIN, up=math.inf, down=math.inf), clock=Still())
    carrier(bytes(1448 * 100))  # 10, 20, 40, then 30 packets: three round trips, and the latency twice
    assert carrier.seconds == pytest.approx(0.3 + 0.1)
    carrier(bytes(1448))  # waits for them
    assert carrier.seconds == pytest.approx(2 * (0.3 + 0.1))


# Beside the kernel

ECHO = """
import socket, sys
server = socket.create_server(("", 5201))
server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, sys.argv[1].encode())
print("ready", flush=True)
connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
stream = connection.makefile("rb")
while head := stream.read(4):
    connection.sendall(head + stream.read(int.from_bytes(head)))
"""
ASK = """
import json, socket, sys, time
host, congestion, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
connection = socket.socket()
connection.settimeout(60)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
connection.connect((host, 5201))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
stream, seconds = connection.makefile("rb"), []
for size in sizes:
    before = time.monotonic()
    connection.sendall(size.to_bytes(4) + bytes(size))
    assert len(stream.read(4 + size)) == 4 + size
    seconds.append(time.monotonic() - before)
print(json.dumps(seconds))
"""
NEAR, FAR = "10.199.7.1", "10.199.7.2"
CONGESTION = "cubic"  # Linux's default, which the model is of; some systems choose BBR, which answers loss otherwise
QUEUE = 1000  # packets, netem's own default
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def ip(*words: str) -> None:
    """Run one command of iproute2; where it is not permitted, or the kernel lacks what it needs, skip the test."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no slow link here: {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, which go with all that is in them."""
    if sys.platform != "linux" or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("no slow link here: this takes Linux and iproute2")
    names = (f"slow{os.getpid()}near", f"slow{os.getpid()}far")
    with ExitStack() as stack:
        for name in names:
            ip("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        yield names


@contextmanager
def netem(profile: Profile) -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a veth pair whose ends delay what they send as the profile says."""
    with two_namespaces() as (near, far):
        ip("ip", "link", "add", "slow", "netns", near, "type", "veth", "peer", "name", "slow", "netns", far)
        for name, address, rate in ((near, NEAR, profile.up), (far, FAR, profile.down)):
            inside = ("ip", "netns", "exec", name)
            loss = ("loss", f"{100 * profile.loss}%") if profile.loss else ()
            late = (f"{1e3 * profile.latency}ms", *([f"{1e3 * profile.jitter}ms"] if profile.jitter else []))
            spread = ("distribution", "normal") if profile.jitter else ()
            rule = ("netem", "limit", str(QUEUE), "delay", *late, *spread, *loss, "rate", f"{rate:.0f}bit")
            ip(*inside, "tc", "qdisc", "add", "dev", "slow", "root", *rule)
            ip(*inside, "ip", "address", "add", f"{address}/24", "dev", "slow")
            ip(*inside, "ip", "link", "set", "slow", "gso_max_segs", "1", "up")  # packets, not bundles of them
        yield near, far


@contextmanager
def relay(profile: Profile) -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a relay of packets between two TUN devices, which delays them as the profile says."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("no slow link here: /dev/net/tun may not be opened")
    with two_namespaces() as names, ExitStack() as stack:
        tuns = []
        for name, address in zip(names, (NEAR, FAR), strict=True):
            tun = stack.enter_context(open("/dev/net/tun", "r+b", buffering=0))  # noqa: PTH123 - a device
            device = f"slow{os.getpid()}{name[-1]}"[-15:]
            try:
                fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
            except OSError as error:
                pytest.skip(f"no slow link here: no TUN device: {error}")
            os.set_blocking(tun.fileno(), False)
            ip("ip", "link", "set", device, "netns", name)
            ip("ip", "netns", "exec", name, "ip", "address", "add", f"{address}/24", "dev", device)
            ip("ip", "netns", "exec", name, "ip", "link", "set", device, "mtu", "1500", "txqueuelen", "10000", "up")
            tuns.append(tun.fileno())
        ended = threading.Event()
        thread = threading.Thread(target=pass_on, args=(tuns, profile, ended))
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)
        yield names


def pass_on(tuns: list[int], profile: Profile, ended: threading.Event) -> None:
    """Pass packets between two devices, each when its latency and then the packets before it are over."""
    draw, queues = random.Random(0), [deque[tuple[float, bytes]](), deque[tuple[float, bytes]]()]
    while not ended.is_set():
        due = [queue[0][0] for queue in queues if queue]
        wait = max(0.0, min(due) - time.monotonic()) if due else 0.05
        for source in select.select(tuns, [], [], min(wait, 0.05))[0]:
            way = tuns.index(source)
            packet, queue = os.read(source, 65536), queues[way]
            if draw.random() < profile.loss or len(queue) >= QUEUE:
                continue
            arrived = time.monotonic() + max(0.0, draw.gauss(profile.latency, profile.jitter))
            after = max(arrived, queue[-1][0]) if queue else arrived
            queue.append((after + 8 * len(packet) / (profile.down if way else profile.up), packet))
        for way, queue in enumerate(queues):
            while queue and queue[0][0] <= time.monotonic():
                os.write(tuns[1 - way], queue.popleft()[1])


def kernel_seconds(names: tuple[str, str], sizes: list[int]) -> list[float]:
    """Round trip times of frames of these sizes, one after another over one stream from one namespace to the other."""
    near, far = names
    started = [sys.executable, "-I", "-c"]
    with subprocess.Popen(
        ["ip", "netns", "exec", far, *started, ECHO, CONGESTION],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            first = server.stdout.readline()
            assert first == "ready\n", first + server.stdout.read()
            asking = ["ip", "netns", "exec", near, *started, ASK, FAR, CONGESTION, json.dumps(sizes)]
            done = subprocess.run(asking, capture_output=True, text=True, timeout=120, check=False)
        finally:
            server.kill()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def emulated_seconds(profile: Profile, sizes: list[int], seed: int = 0) -> list[float]:
    """The same, of the emulation."""
    clock = VirtualClock()
    carrier, times = Emulated(echo, profile, clock=clock, seed=seed), [0.0]
    for size in sizes:
        carrier(bytes(4 + size))
        times.append(clock.now())
    return [after - before for before, after in pairwise(times)]


LINKS = {"netem": netem, "relay": relay}
KINDS = {
    "even": Profile(up=20e6, down=20e6, latency=0.02),
    "4g": replace(PROFILES["4g"], jitter=0, loss=0),
    "satellite": replace(PROFILES["satellite"], jitter=0, loss=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", KINDS)
def test_round_trips_take_as_long_as_the_kernels(name: str, link: str) -> None:
    """The first frame of a stream, and the best later one; of a few streams the best: what else runs only delays."""
    profile, streams = KINDS[name], 1 if name == "satellite" else 4
    runs = [[1000] * 5, [64_000] * 5, [1_000_000] * 3]
    with LINKS[link](profile) as names:
        kernel = [[kernel_seconds(names, sizes) for _ in range(streams)] for sizes in runs]
    for sizes, measured in zip(runs, kernel, strict=True):
        ours = emulated_seconds(profile, sizes)
        theirs = [min(column) for column in zip(*measured, strict=True)]
        # Measured: 0.92 to 1.00 over the relay on Linux 6.18, 0.93 to 1.03 over netem on 6.1.
        assert ours[0] / theirs[0] == pytest.approx(1, abs=0.25), (sizes[0], ours, theirs)
        if (name, sizes[0]) == ("satellite", 64_000):
            continue  # the pause between frames is just about a timeout: kernels differ in whether they start again
        assert min(ours[1:]) / min(theirs[1:]) == pytest.approx(1, abs=0.25), (sizes[0], ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("link", LINKS)
def test_loss_costs_about_what_it_costs_the_kernel(link: str) -> None:
    profile = replace(KINDS["4g"], loss=0.01)
    runs = [[1000] * 150, [64_000] * 60, [1_000_000] * 5]
    with LINKS[link](profile) as names:
        kernel = [mean(kernel_seconds(names, sizes)) for sizes in runs]
    for sizes, theirs in zip(runs, kernel, strict=True):
        ours = mean(mean(emulated_seconds(profile, sizes, seed)) for seed in range(20))
        without = mean(emulated_seconds(replace(profile, loss=0), sizes))
        # Measured: 0.89 to 1.05, 0.81 to 1.04 and 0.77 to 0.96; a mean of so few has a spread of about 0.12 itself.
        assert ours / theirs == pytest.approx(1, abs=0.4), (sizes[0], ours, theirs)
        if sizes[0] > 1000:  # a link that loses nothing is no such link; few lone packets are lost
            assert theirs > 1.5 * without, (sizes[0], theirs, without)
