"""What computing on shares costs, and what it would over a network: rounds times latency, bytes over bandwidth."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LAN", "WAN", "Costs", "Network"]


@dataclass(frozen=True)
class Network:
    """A network between the parties: seconds that anything takes one way, and bits a second."""

    name: str
    latency: float
    bandwidth: float

    def seconds(self, rounds: float, nbytes: float) -> float:
        """Return what so many rounds, one after the other, and so many bytes take: a model, not a measurement."""
        return rounds * self.latency + 8 * nbytes / self.bandwidth


LAN = Network("LAN", 0.0005, 1e9)
WAN = Network("WAN", 0.04, 1e8)


@dataclass(frozen=True)
class Costs:
    """What the servers and the dealer have sent each other, by CrypTen's count and by the kernel's.

    CrypTen counts, at each party, the elements of 8 bytes that it sends and receives, an ``all_reduce`` as one of each,
    and pickled objects by Python's idea of their size, which is wrong by some tens of bytes each. ``nbytes`` is half of
    all parties' sum, so that what one sends and another receives counts once. Sharing draws from common streams, and
    costs nothing. ``socket_nbytes`` is what the parties' TCP connections have sent, by Linux's own counters (None
    elsewhere): gloo's headers are in it. ``rounds`` are those of server 0, who also asks the dealer: every collective
    call and every message is one. ``seconds`` are server 0's, by operation.
    """

    nbytes: int
    socket_nbytes: int | None
    rounds: int
    seconds: Mapping[str, float]
    parties: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, told: Mapping[str, Mapping[str, Any]]) -> "Costs":
        """Return the costs that the parties told of, by role."""
        counted = {role: dict(one["crypten"]) for role, one in told.items()}
        sockets = [one["sockets"] for one in told.values()]
        return cls(
            nbytes=round(sum(one["nbytes"] for one in counted.values()) / 2),
            socket_nbytes=None if None in sockets else sum(sent for sent, _ in sockets),
            rounds=round(max(one["rounds"] for one in counted.values())),
            seconds=Counter(told["server 0"]["seconds"]),
            parties=counted,
        )

    @property
    def crossed(self) -> int:
        """Bytes between servers and dealer: those of their sockets, or where nobody knows them CrypTen's count."""
        return self.nbytes if self.socket_nbytes is None else self.socket_nbytes

    def over(self, network: Network) -> float:
        """Return the seconds that this network would add."""
        return network.seconds(self.rounds, self.crossed)
