"""The secret key of CKKS from one decryption that was handed on (Li and Micciancio 2021, eprint 2020/1533).

CKKS decrypts to m = c₀ + c₁·s in the ring Z_q[X]/(X^N + 1): the message with its error. Whoever holds the ciphertext
and is given m in full precision, as slots, encodes it again to the same integers, and solves: s = (m − c₀) · c₁⁻¹.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitlearn import Kind, View

__all__ = ["KeyRecovery"]


@dataclass(frozen=True)
class KeyRecovery:
    """Honest but curious server that is sent back what its ciphertext decrypts to. Returns the key, [N] in −1, 0, 1.

    It reads exchanges whose reply is a ciphertext, and the first later request with ``Kind.PREDICTION``: all slots of
    that ciphertext [slots, 2], real and imaginary parts in double precision. ``polynomials`` reads c₀ and c₁, integers
    [2, N] modulo the prime ``modulus``, out of the bytes that crossed: a public format. ``scale`` is the ciphertext's.
    """

    modulus: int
    scale: float
    polynomials: Callable[[Tensor], NDArray[np.uint64]]

    def __call__(self, view: View) -> Tensor:
        """Return the key's coefficients; far from −1, 0 and 1 where what came back was no decryption in full."""
        cipher: Tensor | None = None
        for exchange in view.exchanges:
            if cipher is not None and Kind.PREDICTION in exchange.request.tensors:
                parts = exchange.request.tensors[Kind.PREDICTION].double()
                return self._solved(self.polynomials(cipher), torch.view_as_complex(parts.contiguous()).numpy())
            cipher = exchange.reply.tensors.get(Kind.CIPHERTEXT, cipher)
        raise LookupError(
            "this attack reads a decryption that went back to the server, and none crossed; record a protocol that "
            "hands decryptions on"
        )

    def _solved(self, polynomials: NDArray[np.uint64], slots: NDArray[np.complex128]) -> Tensor:
        q, degree = self.modulus, polynomials.shape[1]
        message = _coefficients(slots, degree) * self.scale
        roots = _roots(q, degree)
        m, c0, c1 = (_ntt([int(v) % q for v in one], q, roots) for one in (np.rint(message), *polynomials))
        secret = _inverse([(a - b) * pow(c, -1, q) % q for a, b, c in zip(m, c0, c1, strict=True)], q, roots)
        return torch.tensor([one - q if one > q // 2 else one for one in secret], dtype=torch.int64)


def _coefficients(slots: NDArray[np.complex128], degree: int) -> NDArray[np.float64]:
    """Return the real polynomial whose value at ζ^(3^i) is slot i, ζ = exp(πi/N)."""
    values = np.zeros(degree, np.complex128)  # at ζ^(2j + 1)
    power = 1
    for slot in slots:
        values[(power - 1) // 2] = slot
        values[(2 * degree - power - 1) // 2] = slot.conjugate()
        power = power * 3 % (2 * degree)
    twist = np.exp(-1j * np.pi * np.arange(degree) / degree)
    return (np.fft.fft(values) / degree * twist).real


def _roots(q: int, degree: int) -> list[int]:
    """Return the powers of a primitive 2N-th root of 1 modulo q."""
    for base in range(2, 1000):
        root = pow(base, (q - 1) // (2 * degree), q)
        if pow(root, degree, q) == q - 1:
            break
    powers = [1]
    for _ in range(2 * degree - 1):
        powers.append(powers[-1] * root % q)
    return powers


def _ntt(values: list[int], q: int, roots: list[int]) -> list[int]:
    """Return a polynomial's values at the odd powers of the root."""
    degree = len(values)
    return _transformed([v * roots[i] % q for i, v in enumerate(values)], q, [roots[2 * i] for i in range(degree)])


def _inverse(values: list[int], q: int, roots: list[int]) -> list[int]:
    """Return the polynomial of these values."""
    degree = len(values)
    back = _transformed(values, q, [roots[-2 * i % (2 * degree)] for i in range(degree)])
    scale = pow(degree, -1, q)
    return [v * scale * roots[-i % (2 * degree)] % q for i, v in enumerate(back)]


def _transformed(values: list[int], q: int, powers: list[int]) -> list[int]:
    """Return the discrete Fourier transform modulo q, by even and odd halves."""
    if len(values) == 1:
        return values
    even, odd = (_transformed(values[start::2], q, powers[::2]) for start in (0, 1))
    turned = [v * p % q for v, p in zip(odd, powers, strict=False)]
    sums = [(a + b) % q for a, b in zip(even, turned, strict=True)]
    return sums + [(a - b) % q for a, b in zip(even, turned, strict=True)]
