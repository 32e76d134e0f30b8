"""The process of one server or of the dealer: ``python -m privacy.mpc.process``, started by ``Servers``.

It reads one line of settings from its standard input and ends when that closes, however the process that started it
ended. Its client is on the socket whose number it is told; CrypTen's parties are on sockets of their own.
"""

import json
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch

from privacy.mpc.desk import Desk
from privacy.mpc.evaluation import Clock
from privacy.mpc.ledger import Ledger
from privacy.mpc.memory import Memory
from privacy.mpc.seat import DEALER, deal, take_seat
from splitlearn.service import Service
from splitlearn.wire import Carrier, serve

__all__ = ["main"]


def main() -> None:
    """Take the seat that the first line of the standard input names, and answer until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    told: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(told["threads"])
    memory, clock = Memory(on=told["remember"]), Clock()
    seat = take_seat(
        told["rank"], told["rendezvous"], told["seconds"], memory,
        insecure_trust_first_party=told["insecure_trust_first_party"],
    )  # fmt: skip
    sessions: dict[str, Any] = {"ledger": Ledger(seat, clock, memory)}
    service = Service(sessions)
    if told["rank"] < DEALER:
        service.sessions["desk"] = Desk(clock, service.sessions)
    carrier = serve(memory.noting(service))
    if told["rank"] < DEALER:
        _answer(carrier, told["socket"])
    else:
        threading.Thread(target=_answer, args=(carrier, told["socket"]), daemon=True).start()
        deal()


def _answer(carrier: Carrier, number: int) -> None:
    with Connection(number) as client:
        client.send_bytes(b"ready")
        while True:
            try:
                frame = client.recv_bytes()
            except EOFError:
                return
            client.send_bytes(carrier(frame))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
