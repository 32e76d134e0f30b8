"""Networks: profiles of real ones, and a carrier that takes as long as a TCP stream across one would."""

import random
import threading
import time
from bisect import bisect
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Protocol

from splitlearn.wire import Carrier

__all__ = ["PROFILES", "Clock", "Emulated", "Link", "Profile", "RealClock", "VirtualClock"]

PACKET_NBYTES = 1500  # Ethernet's usual MTU
HEADER_NBYTES = 52  # of each packet: IPv4 20, TCP 20, its timestamps 12
INITIAL_WINDOW = 10  # packets a new TCP stream sends before it waits for word from the other end (RFC 6928)
MIN_TIMEOUT = 0.2  # seconds over a round trip until Linux sends a lone packet again (its TCP_RTO_MIN)
DECREASE = 0.7  # what CUBIC, Linux's usual congestion control, leaves of its window after a loss (RFC 9438)
INCREASE = 3 * (1 - DECREASE) / (1 + DECREASE)  # packets by which it then grows in a round trip, at least (the same)

MAX_STRETCHES = 100_000  # of a link's busy time that it remembers a direction, the latest
DIRECTIONS = ("up", "down")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A network as one client sees it: bandwidths in bit/s, times in seconds, one way, ``loss`` of packets in [0, 1).

    ``jitter`` is the standard deviation of the latency. Raises ``ValueError`` for what is no network.
    """

    up: float
    down: float
    latency: float
    jitter: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("up", self.up), ("down", self.down)):
            if not value > 0:
                raise ValueError(f"expected a bandwidth {name} > 0 bit/s, got {value}; math.inf is no limit")
        for name, value in (("latency", self.latency), ("jitter", self.jitter)):
            if not (value >= 0 and isfinite(value)):
                raise ValueError(f"expected a finite {name} ≥ 0 s, got {value}; give seconds")
        if not 0 <= self.loss < 1:
            raise ValueError(f"expected a loss in [0, 1), got {self.loss}; give the probability that a packet is lost")


# Typical figures, of the order of what one user of such a network gets; no one measurement stands behind them, and
# real ones vary several times over with place and hour. The satellite is geostationary: to 35 786 km and back takes
# light 0.239 s, and the ground stations the rest. Loss is what is left after the radio's own retransmissions.
PROFILES = {
    "lan": Profile(up=1e9, down=1e9, latency=0.0002, jitter=0.00005),
    "wifi": Profile(up=100e6, down=100e6, latency=0.003, jitter=0.002, loss=0.001),
    "4g": Profile(up=10e6, down=30e6, latency=0.025, jitter=0.005, loss=0.001),
    "5g": Profile(up=50e6, down=200e6, latency=0.010, jitter=0.002, loss=0.0005),
    "satellite": Profile(up=3e6, down=50e6, latency=0.300, jitter=0.010, loss=0.001),
}


class Clock(Protocol):
    """What tells the time, in seconds from some start of its own, and lets it pass."""

    def now(self) -> float:
        """Return the time."""

    def sleep(self, seconds: float) -> None:
        """Return when ``seconds`` have passed."""


class RealClock:
    """The time of the world."""

    def now(self) -> float:
        """Return the time since some moment in the past."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class VirtualClock:
    """A clock that starts at 0 and passes by what is slept, without waiting; work that takes time may sleep it too.

    It is one line of time: those who share it, from any thread, wait one after another. Clients that work at the same
    time have one each, and share a ``Link`` where they share a network.
    """

    def __init__(self) -> None:
        self._now, self._lock = 0.0, threading.Lock()

    def now(self) -> float:
        """Return the seconds slept so far."""
        with self._lock:
            return self._now

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` ≥ 0 pass at once."""
        if not (seconds >= 0 and isfinite(seconds)):
            raise ValueError(f"expected finite seconds ≥ 0, got {seconds}; time does not run backwards")
        with self._lock:
            self._now += seconds


class Link:
    """The queues of a network, one a direction: what crosses one leaves it before the next starts.

    Clients that share a network share its link. It remembers when it was busy, so that clients with clocks of their
    own, which run one after another here but at the same time by their clocks, find it as they would have; all clocks
    of a link start together. May be used from several threads at once.
    """

    def __init__(self) -> None:
        self._busy: dict[str, list[tuple[float, float]]] = {direction: [] for direction in DIRECTIONS}
        self._lock = threading.Lock()

    def book(self, direction: str, ready: float, seconds: float) -> float:
        """Return when a frame that is ready at ``ready`` starts: in the first gap from then that is long enough."""
        with self._lock:
            busy = self._busy[direction]
            place, start = bisect(busy, (ready, inf)), ready
            if place:
                start = max(start, busy[place - 1][1])
            while place < len(busy) and busy[place][0] < start + seconds:
                start, place = max(start, busy[place][1]), place + 1
            began = start
            if place and busy[place - 1][1] == start:  # one stretch with the one before
                place -= 1
                began = busy.pop(place)[0]
            busy.insert(place, (began, start + seconds))
            del busy[:-MAX_STRETCHES]
            return start


@dataclass
class _Window:
    """How many packets one end of a TCP stream may have under way, and what it has learnt."""

    packets: float = INITIAL_WINDOW
    threshold: float = inf  # from here on it grows by ``INCREASE`` a round trip, below it doubles
    margin: float = 0.0  # seconds of a timeout over the longest round trip
    timeout: float = inf  # seconds, as of the last frame
    used: float = 0.0  # when it last sent


class Emulated:
    """A carrier that takes as long as a network would, over one TCP stream that is already open.

    A frame waits its turn on ``link``, leaves at the bandwidth of its direction in packets of 1,500 bytes, headers
    included, and takes the latency, with normal jitter drawn from ``seed``, never below 0. ``requests`` is the
    direction of the requests, as in ``Metered``. ``seconds`` adds up the delay, and ``clock`` lets it pass.

    What the stream adds is a model in rounds of one round trip (2 × latency) each. The window, 10 packets at first,
    doubles with every round that fills it (slow start), so that the first large frames are slower; it is halved for
    every timeout that the sender was idle, down to 10 again. Each packet is lost with probability ``loss``; what is
    lost is sent in the next round, with 0.7 of the window, which from then on grows by half a packet a round. A lost
    last packet, after which nothing comes that could tell, costs two round trips, or where it is alone a timeout:
    0.2 s over a round trip.

    Not modelled: opening the stream, lost acknowledgements, jitter within a frame (a large frame of a real stream
    suffers more from it), a second timeout being longer than the first, full queues, other traffic.
    """

    def __init__(
        self,
        carrier: Carrier,
        profile: Profile,
        *,
        clock: Clock | None = None,
        seed: int = 0,
        link: Link | None = None,
        requests: str = "up",
    ):
        if requests not in DIRECTIONS:
            raise ValueError(f"expected requests to go 'up' or 'down', got {requests!r}")
        self.seconds = 0.0
        self._carrier, self._profile = carrier, profile
        self._clock = RealClock() if clock is None else clock
        self._link = Link() if link is None else link
        self._requests, self._replies = requests, "down" if requests == "up" else "up"
        self._windows = {direction: _Window(margin=4 * profile.latency) for direction in DIRECTIONS}
        self._random, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, frame: bytes) -> bytes:
        """Pass the frame on after its delay, and the reply after its own."""
        self._wait(self._requests, len(frame))
        reply = self._carrier(frame)
        self._wait(self._replies, len(reply))
        return reply

    def _wait(self, direction: str, nbytes: int) -> None:
        with self._lock:
            delay = self._delay(direction, nbytes)
            self.seconds += delay
        self._clock.sleep(delay)

    def _delay(self, direction: str, nbytes: int) -> float:
        now, profile = self._clock.now(), self._profile
        packets = max(1, ceil(nbytes / (PACKET_NBYTES - HEADER_NBYTES)))
        seconds = 8 * (nbytes + HEADER_NBYTES * packets) / (profile.up if direction == "up" else profile.down)
        window = self._windows[direction]
        idle = now - window.used
        while (idle := idle - window.timeout) > 0 and window.packets > INITIAL_WINDOW:
            window.packets = max(INITIAL_WINDOW, window.packets / 2)
        start = self._link.book(direction, max(now, window.used), seconds)  # a stream keeps its order
        left = start + seconds + self._stalls(window, packets, seconds / packets)
        window.used = left
        return left + max(0.0, self._random.gauss(profile.latency, profile.jitter)) - now

    def _stalls(self, window: _Window, packets: int, packet_seconds: float) -> float:
        """Return how long the sender waits for word from the other end while it has nothing that it may send."""
        trip, stalls, largest = 2 * self._profile.latency, 0.0, 0
        while packets:
            sent = min(int(window.packets), packets)
            lost = self._lost(sent)
            packets, largest = packets - sent + len(lost), max(largest, sent)
            if lost:
                window.threshold = window.packets = max(2.0, DECREASE * window.packets)
            elif window.packets < window.threshold and window.packets <= 2 * largest:  # as Linux has it
                window.packets += sent
            elif sent == int(window.packets):
                window.packets += INCREASE
            window.margin -= max(0.0, window.margin - MIN_TIMEOUT) / 4  # as Linux's estimate of the spread decays
            if packets > len(lost):  # the first packet's acknowledgement lets the next ones go
                stalls += max(0.0, trip - (sent - 1) * packet_seconds)
            elif lost and lost[-1] < sent - 1:  # what came after it tells
                stalls += max(0.0, trip - (sent - 1 - lost[-1]) * packet_seconds)
            elif lost:
                stalls += trip + (MIN_TIMEOUT if sent == 1 else min(trip, MIN_TIMEOUT))
        window.timeout = trip + largest * packet_seconds + max(MIN_TIMEOUT, window.margin)
        return stalls

    def _lost(self, sent: int) -> list[int]:
        """Return which of ``sent`` packets are lost, in order."""
        loss = self._profile.loss
        return [number for number in range(sent) if self._random.random() < loss] if loss else []
