"""Ciphertexts as they cross: a header that names key, parameters and scale, and polynomials packed tightly.

What a header says is checked before anything is decrypted: another key's ciphertexts, another parameter set's, a scale
that has drifted, and bytes that were cut short or changed on the way are errors. A checksum is no signature: whoever
means to forge a ciphertext can; what it decrypts to is checked against its range, and that is all.
"""

import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from privacy.he.parameters import Parameters
from privacy.he.seal import SEAL_MAGIC, SEED_NBYTES, Integers, Ring

__all__ = ["Ciphertexts", "Form", "nbytes_each", "refuse_key_material"]

Form = Literal["seeded", "whole", "truncated"]
FORMS: tuple[Form, ...] = ("seeded", "whole", "truncated")
MAGIC = b"SLHE"
HEADER = struct.Struct("<4sBBBx8s8sIIdI")  # magic, version, form, polynomials, parameters, key, count, rows, scale, CRC
VERSION = 1


@dataclass(frozen=True)
class Ciphertexts:
    """Ciphertexts of one key. ``seeded``: fresh, one polynomial and a seed each; ``whole``; ``truncated``: a reply's.

    ``rows`` is how many samples they stand for. ``integers`` is [count, polynomials, primes, N] (of ``seeded`` the one
    polynomial that is no seed's); in a ``truncated`` reply as coefficients, whose low bits are gone.
    """

    form: Form
    key: bytes
    rows: int
    scale: float
    integers: Integers
    seeds: tuple[bytes, ...] = ()

    def tensor(self, ring: Ring) -> Tensor:
        """Return what crosses, as bytes."""
        count, polynomials = self.integers.shape[:2]
        body = b"".join(
            _packed(self.integers[:, number, prime] >> np.uint64(cut), width - cut)
            for number in range(polynomials)
            for prime, (width, cut) in enumerate(_widths(ring.parameters, self.form, polynomials, number))
        ) + b"".join(self.seeds)
        kind = FORMS.index(self.form)
        told = MAGIC, VERSION, kind, polynomials, ring.parameters.digest, self.key, count, self.rows, self.scale
        header = HEADER.pack(*told, zlib.crc32(body, zlib.crc32(HEADER.pack(*told, 0))))
        return torch.frombuffer(bytearray(header + body), dtype=torch.uint8)

    def coefficients(self, ring: Ring) -> Integers:
        """Return the polynomials of a reply by their coefficients, [count, polynomials, N]: public, like the bytes."""
        if self.form == "truncated":
            return self.integers[:, :, 0]
        found = []
        for one in self.integers:
            ciphertext = ring.from_integers(one, self.scale, ntt=True, reply=True)
            ring.evaluator.transform_from_ntt_inplace(ciphertext)
            found.append(ring.integers(ciphertext)[:, 0])
        return np.stack(found)

    @classmethod
    def of(
        cls, tensor: Tensor, ring: Ring, *, key: bytes, form: Form, polynomials: int, count: int, scale: float,
        halvings: int = 0,
    ) -> "Ciphertexts":  # fmt: skip
        """Return the ciphertexts in ``tensor``, which must be of this key, form, number and scale, or ``ValueError``.

        The scale may have been halved up to ``halvings`` times, where weights are great (``halvings_for``).
        """
        raw = tensor.contiguous().numpy().tobytes() if tensor.dtype is torch.uint8 else b""
        refuse_key_material(raw)
        if len(raw) < HEADER.size or raw[:4] != MAGIC:
            raise ValueError(f"expected ciphertexts in bytes, got something else: {tensor.dtype} {tuple(tensor.shape)}")
        _, version, kind, polys, digest, owner, number, rows, at, crc = HEADER.unpack_from(raw)
        got_form = FORMS[kind] if kind < len(FORMS) else f"form {kind}"
        if version != VERSION:
            raise ValueError(f"expected ciphertexts of version {VERSION}, got {version}; run one release on both ends")
        if digest != ring.parameters.digest:
            raise ValueError(
                f"expected ciphertexts of parameter set {ring.parameters.digest.hex()} ({ring.parameters.in_words()}), "
                f"got {digest.hex()}"
            )
        if owner != key:
            raise ValueError(
                f"expected ciphertexts under key {key.hex()}, got {owner.hex()}; each client needs a session of "
                "its own (holder.session(name)), which opening it again under another key ends"
            )
        for what, wanted, got in (
            ("in form", form, got_form),
            ("of polynomials each", polynomials if form != "seeded" else 1, polys),
            ("in number", count, number),
        ):
            if wanted != got:
                raise ValueError(f"expected ciphertexts {what} {wanted}, got {got}")
        if not any(abs(at * 2**times - scale) <= 1e-9 * scale for times in range(halvings + 1)):
            raise ValueError(f"expected ciphertexts of scale {scale:.10g}, got {at:.10g}: the scale has drifted")
        body = raw[HEADER.size :]
        expected = count * nbytes_each(ring.parameters, form, polynomials)
        if len(body) != expected:
            raise ValueError(f"expected {expected} bytes of ciphertexts, got {len(body)}; they were cut short")
        found = zlib.crc32(body, zlib.crc32(raw[: HEADER.size - 4] + bytes(4)))
        if found != crc:
            raise ValueError(f"expected ciphertexts with checksum {crc:08x}, got {found:08x}; they changed on the way")
        return _unpacked(body, ring, form, owner, rows, at, count, polys)


def refuse_key_material(raw: bytes) -> None:
    """Raise ``ValueError`` for bytes that SEAL itself has stored, as a key is: none of ours are."""
    if raw[:2] == SEAL_MAGIC:
        raise ValueError(
            "expected ciphertexts or public parameters, got an object stored by SEAL, which may be a key; secret keys "
            "and TenSEAL contexts stay with the client"
        )


@lru_cache(maxsize=256)
def nbytes_each(parameters: Parameters, form: Form, polynomials: int) -> int:
    """Return the bytes of one ciphertext, its header left out."""
    parts = 1 if form == "seeded" else polynomials
    bits = sum(
        _width(width - cut) for number in range(parts) for width, cut in _widths(parameters, form, polynomials, number)
    )
    return parameters.degree * bits // 8 + (SEED_NBYTES if form == "seeded" else 0)


def _widths(parameters: Parameters, form: Form, polynomials: int, number: int) -> list[tuple[int, int]]:
    """Return for each prime of a polynomial how many bits an integer has, and how many of them are left out."""
    if form == "seeded":
        return [(bits, 0) for bits in parameters.data_bits]
    cut = parameters.dropped_bits(polynomials)[number] if form == "truncated" else 0
    return [(parameters.prime_bits[0], cut)]  # a reply has one prime left


def _width(bits: int) -> int:
    return -(-bits // 4) * 4


def _packed(integers: Integers, bits: int) -> bytes:
    """Return integers [count, N] below 2^bits in whole bytes, and four bits of each pair where they are left over."""
    width = _width(bits)
    raw = np.ascontiguousarray(integers, "<u8").view(np.uint8).reshape(*integers.shape, 8)
    whole = np.ascontiguousarray(raw[..., : width // 8]).tobytes()
    if width % 8 == 0:
        return whole
    nibbles = raw[..., width // 8]
    return whole + (nibbles[..., ::2] | (nibbles[..., 1::2] << 4)).tobytes()


def _spread(body: memoryview, count: int, degree: int, bits: int) -> Integers:
    """Return the integers [count, N] that ``_packed`` made bytes of."""
    width = _width(bits)
    raw = np.zeros((count, degree, 8), np.uint8)
    whole = count * degree * (width // 8)
    raw[..., : width // 8] = np.frombuffer(body[:whole], np.uint8).reshape(count, degree, width // 8)
    if width % 8:
        pairs = np.frombuffer(body[whole:], np.uint8).reshape(count, degree // 2)
        raw[:, ::2, width // 8], raw[:, 1::2, width // 8] = pairs & 15, pairs >> 4
    return raw.view("<u8")[..., 0]


def _unpacked(
    body: bytes, ring: Ring, form: Form, key: bytes, rows: int, scale: float, count: int, polynomials: int
) -> Ciphertexts:
    view, degree, found = memoryview(body), ring.parameters.degree, []
    at = 0
    for number in range(polynomials):
        widths = _widths(ring.parameters, form, polynomials, number)
        for prime, (width, cut) in enumerate(widths):
            size = count * degree * _width(width - cut) // 8
            integers = _spread(view[at : at + size], count, degree, width - cut)
            if cut:  # the middle of what was cut off, below the prime
                integers = (integers << np.uint64(cut)) | np.uint64(1 << (cut - 1))
                integers = np.minimum(integers, np.uint64(ring.primes[prime] - 1))
            found.append(integers)
            at += size
    primes = len(found) // polynomials
    integers = np.stack(found, 1).reshape(count, polynomials, primes, degree)
    seeds = tuple(body[start : start + SEED_NBYTES] for start in range(at, len(body), SEED_NBYTES))
    return Ciphertexts(form, key, rows, scale, integers, seeds)
