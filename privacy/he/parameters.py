"""Parameters of CKKS: ring, modulus and scales, and the security level that the first two have.

CKKS (Cheon, Kim, Kim and Song 2017, eprint 2016/421), by Microsoft SEAL. Its security rests on the ring's degree N and
on how many bits the whole modulus has, by tables of the cost of the best known attacks: that of the homomorphic
encryption standard (Albrecht et al. 2018), which SEAL goes by, and the stricter one of the guidelines of 2024 (Bossuat
et al., eprint 2024/463), both for ternary secrets and classical attackers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from math import log2, sqrt
from operator import index
from typing import Any
from warnings import warn

__all__ = ["DEPTH2", "FAST", "PRECISE", "PRESETS", "STANDARD", "Parameters", "tight"]

# Most bits of the whole modulus at a level of security, by degree; SEAL's hestdparms.h (TC128, TC192, TC256).
STANDARD = {
    128: {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881},
    192: {1024: 19, 2048: 37, 4096: 75, 8192: 152, 16384: 305, 32768: 611},
    256: {1024: 14, 2048: 29, 4096: 58, 8192: 118, 16384: 237, 32768: 476},
}
# At 128 bits, by eprint 2024/463.
GUIDELINES_2024 = {1024: 26, 2048: 53, 4096: 106, 8192: 214, 16384: 430, 32768: 868}
NOISE_STD = 3.2  # of a coefficient of a fresh ciphertext, as in both tables


@dataclass(frozen=True)
class Parameters:
    """One parameter set: ``degree`` N, the bits of each prime of the modulus, and the two scales, as powers of 2.

    ``scale_bits`` is the scale of what the client encrypts, ``weight_scale_bits`` that of what it is multiplied by.
    With several primes the last is SEAL's own, for key switching, and no part of a ciphertext; a single one is.

    Raises ``ValueError`` for a set below 128 bits of security, naming the row of the table that it breaks, and for
    scales that leave a product no room. Warns where the stricter figure of 2024 is broken.
    """

    name: str
    degree: int
    prime_bits: tuple[int, ...]
    scale_bits: int
    weight_scale_bits: int

    def __post_init__(self) -> None:
        for name in ("degree", "scale_bits", "weight_scale_bits"):
            object.__setattr__(self, name, _whole(getattr(self, name)))
        object.__setattr__(self, "prime_bits", tuple(_whole(bits) for bits in self.prime_bits))
        limits = STANDARD[128]
        if self.degree not in limits:
            raise ValueError(f"expected a degree among {', '.join(map(str, limits))}, got {self.degree}")
        if not self.prime_bits or not all(20 <= bits <= 60 for bits in self.prime_bits):
            raise ValueError(f"expected primes of 20 to 60 bits, which SEAL has, got {self.prime_bits}")
        if self.modulus_bits > limits[self.degree]:
            raise ValueError(
                f"expected at most {limits[self.degree]} bits of modulus at degree {self.degree}, SEAL's limit for 128 "
                f"bits of security (2024 guidelines: {GUIDELINES_2024[self.degree]}), got {self.modulus_bits}; take "
                "smaller primes or a greater degree"
            )
        if min(self.scale_bits, self.weight_scale_bits) < 10 or self.range < 1:
            raise ValueError(
                f"expected scales of 10 bits or more whose product leaves room for values of 1 below the modulus, got "
                f"2^{self.scale_bits} and 2^{self.weight_scale_bits} under primes of {self.prime_bits} bits"
            )
        if self.modulus_bits > GUIDELINES_2024[self.degree]:
            warn(
                f"{self.name}: {self.modulus_bits} bits of modulus at degree {self.degree} are within SEAL's limit for "
                f"128 bits of security and above the {GUIDELINES_2024[self.degree]} of the guidelines of 2024",
                stacklevel=3,
            )

    @property
    def slots(self) -> int:
        """How many complex numbers one ciphertext holds."""
        return self.degree // 2

    @property
    def modulus_bits(self) -> int:
        """Bits of the whole modulus, the prime for key switching included: what security goes by."""
        return sum(self.prime_bits)

    @property
    def data_bits(self) -> tuple[int, ...]:
        """Bits of each prime of a fresh ciphertext."""
        return self.prime_bits[:-1] if len(self.prime_bits) > 1 else self.prime_bits

    @property
    def rescaled_bits(self) -> int:
        """Bits of the prime that a product is divided by; 0 where there is but one."""
        return self.data_bits[-1] if len(self.data_bits) > 1 else 0

    @property
    def reply_scale_bits(self) -> int:
        """The scale of a product when it goes back, as a power of 2 (about, where it was divided by a prime)."""
        return self.scale_bits + self.weight_scale_bits - self.rescaled_bits

    @property
    def range(self) -> float:
        """The greatest magnitude of a slot of a product that does not wrap around the modulus."""
        return 2.0 ** (self.prime_bits[0] - 1 - self.reply_scale_bits)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest bound of inputs that leaves two digits beside errors of inputs and of weights.

        By the errors of a slot: of encryption, and of weights rounded to their scale in a period of 64.
        """
        return 100 * self.fresh_std, 2.0**self.weight_scale_bits / 320

    @property
    def security_bits(self) -> int:
        """The level of the standard's table that this set has: 128, 192 or 256 bits."""
        return max(level for level, limits in STANDARD.items() if self.modulus_bits <= limits[self.degree])

    @property
    def fresh_std(self) -> float:
        """The standard deviation of the error of a slot after encryption and decryption (seeded, by the secret key)."""
        return NOISE_STD * sqrt(self.degree) / 2.0**self.scale_bits

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that tell parameter sets apart on the wire; the name is no part of it."""
        text = f"{self.degree} {self.prime_bits} {self.scale_bits} {self.weight_scale_bits}"
        return sha256(text.encode()).digest()[:8]

    @lru_cache(maxsize=256)  # noqa: B019 - they are small, and these are the last few
    def dropped_bits(self, components: int) -> tuple[int, ...]:
        """Return how many low bits of each polynomial of a reply may stay away.

        A reply is decrypted as c₀ + c₁·s + c₂·s², so that what is cut off c₀ counts as it is, and what is cut off the
        others times the norm of s (√(2N/3), ternary) or of s² (2N/3). Each is cut where it moves a slot by no more than
        rounding of N coefficients of weights would, for an input of 1. All remaining widths are multiples of 4.
        """
        secret = 2 * self.degree / 3
        dropped = []
        for power in range(components):
            most = self.reply_scale_bits - self.weight_scale_bits - log2(secret) * power / 2
            width = self.prime_bits[0] - max(0, int(most))
            dropped.append(self.prime_bits[0] - min(self.prime_bits[0], -(-width // 4) * 4))
        return tuple(dropped)

    def in_words(self) -> str:
        """Return ring, modulus, security by both tables, scales and range, in a line."""
        return (
            f"{self.name}: degree {self.degree}, modulus of {self.modulus_bits} bits {list(self.prime_bits)}; at least "
            f"{self.security_bits} bits of security by SEAL's table (at 128: {STANDARD[128][self.degree]} by SEAL, "
            f"{GUIDELINES_2024[self.degree]} by eprint 2024/463); scales 2^{self.scale_bits} and "
            f"2^{self.weight_scale_bits}, sums under {self.range:g}"
        )


def _whole(number: Any) -> int:
    try:
        return index(number)
    except TypeError as error:
        raise ValueError(f"expected whole numbers as parameters of encryption, got {number!r}") from error


FAST = Parameters("fast", 2048, (48,), 22, 20)
PRECISE = Parameters("precise", 4096, (58,), 27, 25)
DEPTH2 = Parameters("depth2", 8192, (60, 40, 40, 60), 40, 40)


def tight() -> Parameters:
    """Return the preset exactly at SEAL's limit, above the guidelines' figure of 2024, with a warning."""
    return Parameters("tight", 2048, (54,), 24, 22)


PRESETS: dict[str, Callable[[], Parameters]] = {
    "fast": lambda: FAST,
    "precise": lambda: PRECISE,
    "depth2": lambda: DEPTH2,
    "tight": tight,
}
