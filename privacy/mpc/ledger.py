"""What a party of CrypTen has cost, by CrypTen's own counters and by its sockets, and what it remembers."""

import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from privacy.mpc.evaluation import Clock
from privacy.mpc.memory import Memory
from privacy.mpc.seat import Seat
from splitlearn.frames import Kind
from splitlearn.service import Answer
from splitlearn.settings import settings_tensor

__all__ = ["Ledger", "tcp_nbytes"]

TCP_INFO_NBYTES = 256
SENT, RECEIVED = 200, 128  # where Linux's tcp_info has the bytes of a connection, both uint64
AT_ONCE = 64  # notes in an answer


class Ledger:
    """Answers about this party, in no part of any protocol; none of it is remembered."""

    def __init__(self, seat: Seat, clock: Clock, memory: Memory):
        self.name, self._seat, self._clock, self._memory = "ledger", seat, clock, memory
        self._before = tcp_nbytes()
        self.answers: Mapping[str, Answer] = {
            "costs": self._costs, "count_anew": self._count_anew, "remembered": self._remembered,
        }  # fmt: skip

    def _costs(self, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        now, before = tcp_nbytes(), self._before
        sockets = None if now is None or before is None else [n - b for n, b in zip(now, before, strict=True)]
        told = {"crypten": self._seat.counts, "sockets": sockets, "seconds": dict(self._clock.seconds)}
        return {Kind.PARAMETERS: settings_tensor(told)}

    def _count_anew(self, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._seat.reset_communication_stats()
        self._clock.seconds.clear()
        self._before = tcp_nbytes()
        return {}

    def _remembered(self, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the oldest few notes, and forget them; an empty answer when there are no more."""
        found: dict[str, Tensor] = {}
        for place, note in enumerate(self._memory.take(AT_ONCE)):
            for side, message in (("sent", note.request), ("got", note.reply)):
                for key, tensor in message.tensors.items():
                    kind, *rest = key.split("/", 1)
                    found[f"{kind}/{place:02d}/{message.verb}/{side}/{''.join(rest)}"] = tensor
        return found


def tcp_nbytes() -> tuple[int, int] | None:
    """Return the bytes that this process has sent and received on all its TCP connections; None but on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    sent = received = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=int(entry.name)) as one:
                try:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_NBYTES)
                finally:
                    one.detach()  # it is not ours to close
        except OSError:
            continue  # no socket, or no TCP
        if len(info) >= SENT + 8:
            sent += struct.unpack_from("Q", info, SENT)[0]
            received += struct.unpack_from("Q", info, RECEIVED)[0]
    return sent, received
