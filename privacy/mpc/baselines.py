"""CrypTen by itself, as its documentation has it: one linear layer, three processes, a dealer. Ours is timed by it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import torch

from privacy.mpc.compat import LOOPBACK, load_crypten

__all__ = ["RawCrypten"]

PARTIES = 2
ROLES = 3  # two parties and the dealer


class RawCrypten:
    """A linear layer by CrypTen alone: the input shared by one party, the product, the output revealed to both.

    ``product()`` has both parties do one, and returns what the first took: seconds, CrypTen's own count of bytes and
    rounds, and the greatest error. Nothing of ours lies in between, and CrypTen draws from its own generators.
    """

    def __init__(self, rows: int, features: int, outputs: int):
        self._folder = tempfile.TemporaryDirectory(prefix="splitlearn-raw-")
        self._processes = [self._started(rank, (rows, features, outputs)) for rank in range(ROLES)]
        self._answer()

    def product(self) -> dict[str, float]:
        """Return what one product took the first party: ``seconds``, ``nbytes``, ``rounds``, ``error``."""
        for process in self._processes[:PARTIES]:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End all three processes."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, float]:
        found: list[dict[str, float]] = []
        for process in self._processes[:PARTIES]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ConnectionError("CrypTen by itself has ended; run it alone: python -m privacy.mpc.baselines")
            found.append(json.loads(line))
        return found[0]

    def _started(self, rank: int, sizes: tuple[int, int, int]) -> "subprocess.Popen[str]":
        told = {
            "RANK": str(rank), "WORLD_SIZE": str(PARTIES),
            "DISTRIBUTED_BACKEND": "gloo", "GLOO_SOCKET_IFNAME": LOOPBACK,
            "RENDEZVOUS": f"file://{Path(self._folder.name) / 'rendezvous'}",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "privacy.mpc.baselines", *map(str, sizes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, **told},
        )  # fmt: skip


def main() -> None:
    """Be one of the three: rank and the rest are in the environment, as CrypTen reads them."""
    rows, features, outputs = (int(one) for one in sys.argv[1:])
    torch.set_num_threads(1)
    crypten: Any = load_crypten()
    crypten.config.cfg.mpc.provider = "TTP"
    if int(os.environ["RANK"]) == PARTIES:
        crypten.mpc.provider.TTPServer()
        return
    crypten.init()
    crypten.config.cfg.communicator.verbose = True
    torch.manual_seed(0)
    x, weight = torch.randn(rows, features), torch.randn(outputs, features) / features**0.5
    bias = torch.zeros(outputs)
    w, b = crypten.cryptensor(weight, src=1), crypten.cryptensor(bias, src=1)
    tell({})
    while sys.stdin.readline():
        crypten.reset_communication_stats()
        begun = time.perf_counter()
        out = (crypten.cryptensor(x, src=0).matmul(w.t()) + b).get_plain_text()
        seconds = time.perf_counter() - begun
        communicator = crypten.communicator.get()
        error = float((out.double() - x.double() @ weight.double().T).abs().max())
        counts = {"nbytes": communicator.comm_bytes, "rounds": communicator.comm_rounds}
        tell({"seconds": seconds, **counts, "error": error})


def tell(what: dict[str, float]) -> None:
    """Write one line to whoever started this process."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
