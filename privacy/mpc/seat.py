"""A seat in CrypTen (Knott et al. 2021, arXiv:2109.00984) for this process: who it is, whom it hears, what it draws.

Only processes of their own import this (``privacy.mpc.process``): CrypTen keeps one party a process. What differs from
``crypten.init()``: time limits on every exchange, streams that are no Mersenne Twisters, a memory that can be looked
through, and no environment variables.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from privacy.mpc.compat import LOOPBACK, load_crypten
from privacy.mpc.memory import Memory
from privacy.mpc.randomness import SEED_NBYTES, Stream
from privacy.mpc.sharing import BITS, SERVERS
from privacy.mpc.truncation import MOST_BITS, masks, positive, quotient

__all__ = ["DEALER", "Seat", "deal", "exact_truncation", "take_seat", "truncated"]

crypten = load_crypten()
Communicator: Any = crypten.communicator.DistributedCommunicator
ttp: Any = crypten.mpc.provider.ttp_provider

DEALER = SERVERS  # its rank
WORDS = SEED_NBYTES // 8
CPU = torch.device("cpu")
IDLE = timedelta(days=365)
_exact: ContextVar[bool] = ContextVar("exact", default=False)


class Seat(Communicator):
    """CrypTen's communicator of one party, over gloo, with time limits; it notes what it receives."""

    def __init__(self, rank: int, rendezvous: str, seconds: float, memory: Memory, *, dealer: bool):
        self.world_size, self.rank, self._name, self.memory = SERVERS, rank, f"rank{rank}", memory
        self.ttp_initialized = dealer
        self.reset_communication_stats()
        total, limit = SERVERS + dealer, timedelta(seconds=seconds)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", world_size=total, rank=rank, timeout=limit)
        # The dealer waits for requests however long nobody computes: it ends with its standard input, or with a server.
        waits = IDLE if rank == DEALER else limit
        self.ttp_group = dist.new_group(list(range(total)), timeout=waits)
        self.ttp_comm_group = dist.new_group([0, total - 1], timeout=limit)
        self.main_group = dist.new_group(list(range(SERVERS)), timeout=limit)

    def all_reduce(self, input: Any, *rest: Any, **options: Any) -> Any:
        """Add up what all have sent; all then know it: masked values alone, where the protocol is right."""
        result = super().all_reduce(input, *rest, **options)
        sent, got = (one if isinstance(one, list) else [one] for one in (input, result))
        self.memory.note("opened", *({str(n): tensor for n, tensor in enumerate(side)} for side in (sent, got)))
        return result

    def broadcast(self, input: Any, src: int, group: Any = None, **options: Any) -> Any:
        """Take over what ``src`` sends."""
        result = super().broadcast(input, src, group, **options)
        if src != self.rank:
            parts = result if isinstance(result, list) else [result]
            self.memory.note("received", {}, {str(n): tensor for n, tensor in enumerate(parts)})
        return result

    def recv_obj(self, *where: Any, **options: Any) -> Any:
        """Take an object, of those few types that CrypTen's unpickler lets pass."""
        result = super().recv_obj(*where, **options)
        self.memory.heard(repr(result))
        return result

    def _refused(self, *rest: Any, **options: Any) -> Any:
        raise RuntimeError(
            "expected values between servers to be opened by all_reduce alone, got another way, which no memory notes"
        )

    recv = irecv = scatter = reduce = gather = all_gather = broadcast_obj = _refused

    @property
    def counts(self) -> dict[str, float]:
        """CrypTen's own counters: bytes sent and received, and rounds; a call of a collective is one."""
        return {"nbytes": float(self.comm_bytes), "rounds": float(self.comm_rounds), "seconds": float(self.comm_time)}


class Dealer(ttp.TTPServer):
    """CrypTen's trusted third party: it answers requests for multiplication triples until it is told to end."""

    def _setup_generators(self) -> None:
        super()._setup_generators()
        group = crypten.communicator.get().ttp_group
        seeds = [Stream.seed() for _ in range(SERVERS)]
        for rank, seed in enumerate(seeds):  # each its own, and nobody the other's
            dist.send(_as_words(seed), rank, group=group)
        self.generators = [Stream(seed, f"dealt{rank}") for rank, seed in enumerate(seeds)]

    def truncation(self, size: torch.Size, bits: int) -> Tensor:
        """Return server 0's shares of what ``masks`` says of a mask, whose shares both have drawn."""
        return torch.stack(masks(self._get_additive_PRSS(size), bits)) - self._get_additive_PRSS((2, *size), True)


def take_seat(rank: int, rendezvous: str, seconds: float, memory: Memory, *, insecure_trust_first_party: bool) -> Seat:
    """Sit down as server 0 or 1, or as the dealer; returns when all have, or fails when the time is up."""
    dealer = not insecure_trust_first_party
    crypten.config.cfg.mpc.provider = "TTP" if dealer else "TFP"
    crypten.config.cfg.encoder.precision_bits = BITS
    crypten.config.cfg.communicator.verbose = True  # it counts nothing otherwise
    seat = Seat(rank, rendezvous, seconds, memory, dealer=dealer)
    Communicator.instance = seat
    _draw_from_streams(memory)
    _truncate_exactly_when_asked()
    if rank < SERVERS:
        for name, stream in _streams(seat).items():
            crypten.generators[name] = {CPU: stream}
        if dealer:
            ttp.TTPClient._init()
            words = torch.empty(WORDS, dtype=torch.int64)
            dist.recv(words, DEALER, group=seat.ttp_group)
            ttp.TTPClient.get().generator = Stream(words.numpy().tobytes(), "dealt")
        seat.reset_communication_stats()
    return seat


def deal() -> None:
    """Answer the servers' requests until they end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CrypTen is initialised already
        Dealer()


def truncated(share: Tensor, bits: int) -> Tensor:
    """Return the share of v / 2^bits, exactly one of v's neighbours, for |v| below 2^62; see ``truncation``.

    One request to the dealer and one opening of as many elements.
    """
    if not 0 < bits <= MOST_BITS:
        raise ValueError(f"expected to cut off from 1 to {MOST_BITS} bits, got {bits}")
    seat, primitives = crypten.communicator.get(), crypten.mpc.primitives
    mask, (low, high) = _truncation_masks(share.shape, bits, first=seat.rank == 0)
    masked = positive(share, first=seat.rank == 0) + mask
    opened = primitives.ArithmeticSharedTensor.from_shares(masked, precision=0).reveal()
    return quotient(opened, low, high, bits, first=seat.rank == 0)


def _truncation_masks(size: torch.Size, bits: int, *, first: bool) -> tuple[Tensor, Tensor]:
    """Return shares of a mask and of what ``masks`` says of it, as the provider has them."""
    drawn = crypten.common.rng.generate_random_ring_element
    if crypten.config.cfg.mpc.provider == "TFP":  # server 0 draws it, and shares it out
        mask = drawn(size)
        every = torch.stack([mask, *masks(mask, bits)])
        share = crypten.mpc.primitives.ArithmeticSharedTensor(every, precision=0, src=0).share
        return share[0], share[1:]
    client = ttp.TTPClient.get()
    mask = drawn(size, generator=client.generator)
    if first:
        return mask, client.ttp_request("truncation", CPU, size, bits)
    return mask, drawn((2, *size), generator=client.generator)


@contextmanager
def exact_truncation() -> Iterator[None]:
    """Have CrypTen's products cut back exactly in the block, where it would have each server truncate by itself."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def _truncate_exactly_when_asked() -> None:
    shared = crypten.mpc.primitives.ArithmeticSharedTensor
    by_itself = shared.div_

    def div_(self: Any, y: Any) -> Any:
        if not _exact.get() or not isinstance(y, int) or y == 1:
            return by_itself(self, y)
        bits, share = y.bit_length() - 1, self.share
        if y != 1 << bits:  # a window of nine, say
            bits = BITS + y.bit_length()
            share = share * round((1 << bits) / y)
        self.share = truncated(share, bits)
        return self

    shared.div_ = div_


def _streams(seat: Seat) -> dict[str, Stream]:
    """Return the streams of this server: its own, and two that it has in common with the other."""
    common = []
    for root in range(SERVERS):
        words = _as_words(Stream.seed())
        dist.broadcast(words, root, group=seat.main_group)
        common.append(Stream(words.numpy().tobytes(), f"common{root}"))
    # A sharing of zero adds one stream and takes off the other: opposite ones at the two servers.
    here, there = common if seat.rank == 0 else reversed(common)
    return {"prev": here, "next": there, "local": Stream(Stream.seed(), "local")}


def _as_words(seed: bytes) -> Tensor:
    return torch.frombuffer(bytearray(seed), dtype=torch.int64)


def _draw_from_streams(memory: Memory) -> None:
    """Have CrypTen draw its masks from our streams, wherever it draws any; a torch generator is then an error."""

    def ring_element(size: Any, ring_size: int = 2**64, generator: Any = None, **options: Any) -> Tensor:
        return kbit(size, 64, generator, **options)

    def kbit(size: Any, bitlength: int | None = None, generator: Any = None, **options: Any) -> Tensor:
        stream = crypten.generators["local"][CPU] if generator is None else generator
        if not isinstance(stream, Stream):
            raise TypeError(f"expected a Stream to draw from, got {type(stream).__name__}")
        drawn = stream.elements(tuple(size), 64 if bitlength is None else bitlength)
        memory.note("drew", {}, {stream.name: drawn})
        return drawn

    ours = {"generate_random_ring_element": ring_element, "generate_kbit_random_tensor": kbit}
    for module in [one for name, one in sys.modules.items() if name.partition(".")[0] == "crypten"]:
        for name, function in ours.items():
            if hasattr(module, name):
                setattr(module, name, function)
