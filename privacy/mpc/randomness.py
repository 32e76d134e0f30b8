"""Randomness of shares: streams of SHAKE-128 in place of torch's generators, which read 32 bits of their seed.

``torch.Generator`` on the CPU is a Mersenne Twister that starts from the low 32 bits of whatever seed it is given:
who tries them all has the stream, and with it every mask. CrypTen's own randomness is that. Ours is not; what remains
research grade is that Python and torch do nothing against side channels, and that nobody has audited this.
"""

import hashlib
import secrets
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["SEED_NBYTES", "Stream"]

SEED_NBYTES = 32


class Stream:
    """An endless stream of ring elements from a secret seed (SHAKE-128 over seed and draw number).

    It stands where CrypTen has a ``torch.Generator``. ``name`` says whose it is, for what a party remembers.
    """

    device = torch.device("cpu")

    def __init__(self, seed: bytes, name: str = ""):
        if len(seed) != SEED_NBYTES:
            raise ValueError(f"expected a seed of {SEED_NBYTES} bytes, got {len(seed)}; draw one with Stream.seed()")
        self.name, self._seed, self._draws = name, seed, 0

    @staticmethod
    def seed() -> bytes:
        """Return a fresh seed from the operating system."""
        return secrets.token_bytes(SEED_NBYTES)

    def elements(self, shape: Sequence[int], bits: int = 64) -> Tensor:
        """Return uniform integers of so many bits, int64; of 64 they span the whole ring."""
        block = hashlib.shake_128(self._seed + self._draws.to_bytes(8, "big")).digest(8 * prod(shape))
        self._draws += 1
        drawn = torch.frombuffer(bytearray(block), dtype=torch.int64) if block else torch.empty(0, dtype=torch.int64)
        return (drawn if bits == 64 else drawn & ((1 << bits) - 1)).reshape(tuple(shape))
