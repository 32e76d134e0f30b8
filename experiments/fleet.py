"""Devices around a cloud, whatever the paradigm: data, models, wires, and what wires and cloud did."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.setups import counted
from experiments.training import Training, build_model, optimizer_for
from splitlearn.cut import cut
from splitlearn.data import Splits, partition
from splitlearn.federation import FedMember, RemoteMember
from splitlearn.frames import frame_nbytes
from splitlearn.network import Emulated, Profile, VirtualClock
from splitlearn.party import Learner, Loss
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.train import Batches
from splitlearn.wire import Carrier, Framed, Metered, Recorded, serve

__all__ = ["Cloud", "Fleet", "Traffic", "network_seconds"]

Event = tuple[str, int]  # direction as a device sees it, and bytes of a frame


@dataclass
class Traffic:
    """The wires of all devices: meters, and each device's frames in order since ``clear``.

    What one device sends another counts twice: at the sender's end and at the receiver's.
    """

    meters: list[Metered] = field(default_factory=list)
    events: dict[str, list[Event]] = field(default_factory=dict)
    sent: dict[str, Counter[str]] = field(default_factory=lambda: {"up": Counter(), "down": Counter()})  # one way

    def carrier(self, device: str, carrier: Carrier, *, requests: str = "up") -> Metered:
        """Return the carrier, its frames counted as this device's."""
        replies = "down" if requests == "up" else "up"
        events = self.events.setdefault(device, [])

        def noted(frame: bytes) -> bytes:
            events.append((requests, len(frame)))
            reply = carrier(frame)
            events.append((replies, len(reply)))
            return reply

        self.meters.append(Metered(noted, requests=requests))
        return self.meters[-1]

    def one_way(self, device: str, way: str, frame: bytes) -> None:
        """Count a frame that no reply follows."""
        self.events.setdefault(device, []).append((way, len(frame)))
        self.sent[way].update(frame_nbytes(frame))

    @property
    def nbytes(self) -> dict[str, dict[str, int]]:
        """All bytes so far: direction, then kind."""
        both = counted(self.meters)
        return {way: dict(sorted((Counter(kinds) + self.sent[way]).items())) for way, kinds in both.items()}

    @property
    def messages(self) -> int:
        """All frames so far, requests and replies."""
        return sum(len(events) for events in self.events.values())

    def clear(self) -> None:
        """Forget what crossed."""
        self.sent = {"up": Counter(), "down": Counter()}
        for meter in self.meters:
            meter.clear()
        for events in self.events.values():
            events.clear()


def network_seconds(events: Sequence[Event], profile: Profile, *, streamed: bool = False, seed: int = 0) -> float:
    """Return how long a device's frames take across an emulated network, one after the other; computing takes no time.

    ``streamed``: it waits for no reply, so that all that goes up goes up at once, and all down. Nobody waits for word
    that the last frame has arrived, where no reply follows it. The stream is one that has sent nothing yet.
    """
    if streamed:
        ways = {way: sum(n for one, n in events if one == way) for way in ("up", "down")}
        events = [(way, nbytes) for way, nbytes in ways.items() if nbytes]
    clock, done = VirtualClock(), 0.0
    replies: list[bytes] = []

    def answer(frame: bytes) -> bytes:
        nonlocal done
        done = clock.now()
        return replies.pop()

    carriers = {way: Emulated(answer, profile, clock=clock, seed=seed, requests=way) for way in ("up", "down")}
    place = 0
    while place < len(events):
        way, nbytes = events[place]
        answered = place + 1 < len(events) and events[place + 1][0] != way
        replies.append(bytes(events[place + 1][1]) if answered else b"")
        carriers[way](bytes(nbytes))
        done = clock.now() if answered else done
        place += 2 if answered else 1
    return done


class Cloud:
    """What is computed away from devices: the floating-point operations of the parties that are seated in it."""

    def __init__(self) -> None:
        self.flops, self.counting = 0, False

    def seat(self, party: Any) -> Any:
        """Return the party, what it computes counted while ``counting``."""
        return _Seat(party, self)

    def count(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """Return what ``call()`` returns, and all operations in it, the cloud's too."""
        self.flops, self.counting = 0, True
        try:
            with FlopCounterMode(display=False) as counter:
                found = call()
        finally:
            self.counting = False
        return found, counter.get_total_flops()


class _Seat:
    def __init__(self, party: Any, cloud: Cloud):
        self._party, self._cloud, self.name = party, cloud, party.name

    def __getattr__(self, verb: str) -> Any:
        found = getattr(self._party, verb)
        if verb not in ("forward", "backward", "learn", "predict"):
            return found

        def counted(*args: Any) -> Any:
            if not self._cloud.counting:
                return found(*args)
            with FlopCounterMode(display=False) as counter:
                answer = found(*args)
            self._cloud.flops += counter.get_total_flops()
            return answer

        return counted


@dataclass(frozen=True)
class Fleet:
    """Devices, each with a share of the private samples, and what their paradigm builds its parties from.

    ``alpha`` is the Dirichlet concentration of the devices' classes; None deals samples evenly at random.
    """

    training: Training
    splits: Splits
    alpha: float | None
    traffic: Traffic = field(default_factory=Traffic)
    cloud: Cloud = field(default_factory=Cloud)
    records: dict[str, Recorded] = field(default_factory=dict)  # of the first device's wires, by who recorded

    @property
    def names(self) -> list[str]:
        """The devices' names."""
        return [f"client{number}" for number in range(self.training.clients)]

    def shares(self) -> list[tuple[Tensor, Tensor]]:
        """Return each device's samples and labels."""
        private, training = self.splits.private, self.training
        if self.alpha is None:
            dealt = partition.iid(len(private.x), training.clients, training.seed)
        else:
            least = 2 if len(private.x) >= 4 * training.clients else 1
            dealt = partition.dirichlet(private.y, training.clients, self.alpha, training.seed, min_rows=least)
        return [(private.x[rows].to(training.device), private.y[rows].to(training.device)) for rows in dealt]

    def batches(self) -> list[Batches]:
        """Return each device's batches."""
        size, seed = self.training.batch_size, self.training.seed
        return [Batches(x, y, batch_size=size, seed=seed) for x, y in self.shares()]

    def model(self) -> nn.Sequential:
        """Return the model that all start from."""
        return build_model(self.splits, seed=self.training.seed).to(self.training.device)

    def halves(self) -> tuple[nn.Module, nn.Module]:
        """Return bottom and top of that model."""
        bottom, top = cut(self.model(), self.training.cut)
        return bottom, top

    def learner(
        self, name: str, stage: nn.Module, place: int, loss: Loss | None = None, momentum: bool = True
    ) -> Learner:
        """Return a party over a copy of the stage; without momentum by plain SGD."""
        own = copy.deepcopy(stage)
        optimizer = optimizer_for(own, self.training)
        if not momentum:
            optimizer = torch.optim.SGD(own.parameters(), self.training.lr)
        seed = self.training.seed * 1000 + place
        return (
            Learner(name, own, optimizer, seed=seed)
            if loss is None
            else Learner(name, own, optimizer, seed=seed, loss=loss)
        )

    def devices(self, stage: nn.Module, *, momentum: bool = True) -> list[Learner]:
        """Return a party a device, over copies of the stage."""
        return [self.learner(name, stage, place + 1, momentum=momentum) for place, name in enumerate(self.names)]

    def lines(self, parties: dict[str, Any]) -> dict[str, Remote]:
        """Return each device's way to its party in the cloud, by the device's name; the first one's is recorded."""
        found = {}
        for name, party in parties.items():
            answering: Any = Service({name: self.cloud.seat(party)})
            if name == self.names[0]:
                answering = self.records["server"] = Recorded(answering, max_nbytes=1 << 30)
            found[name] = Remote(name, Framed(self.traffic.carrier(name, serve(answering))), name)
        return found

    def federated(self, members: Sequence[FedMember]) -> list[RemoteMember]:
        """Return the members as a fed server sees them, its requests going down; the first is recorded."""
        found = []
        for member in members:
            answering: Any = Service({member.name: member})
            if member.name == self.names[0]:
                answering = self.records["fed server"] = Recorded(answering, max_nbytes=1 << 30)
            carrier = self.traffic.carrier(member.name, serve(answering), requests="down")
            found.append(RemoteMember(member.name, Framed(carrier), member.name))
        return found
