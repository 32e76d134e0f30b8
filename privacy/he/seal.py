"""SEAL under one parameter set, through TenSEAL's low-level API: the only file that knows how SEAL stores things.

TenSEAL's own tensors own the scale and rescale by the prime in its place; here scales are ours. Polynomials go in and
out as arrays of integers, so that what crosses is packed as tightly as it can be.
"""

import os
import struct
import tempfile
import threading
import weakref
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from privacy.extra import load
from privacy.he.parameters import Parameters

__all__ = ["SEAL_MAGIC", "SEED_NBYTES", "Ring"]

SEAL_MAGIC = b"\x5e\xa1"  # what everything starts with that SEAL itself has stored: keys too
SEAL_HEADER = struct.Struct("<2sBBBBHQ")  # magic, header size, version (2), compression, reserved, bytes in all
CIPHERTEXT = struct.Struct("<4QBQQQdQ")  # parameters' hash, in NTT form, polynomials, N, primes, scale, correction
PLAINTEXT = struct.Struct("<4QQd")  # parameters' hash, integers, scale
COUNT = struct.Struct("<Q")
SEED_NBYTES = 64
SEED_TYPE = 1  # Blake2xb
NONE, ZSTD = 0, 2

Integers = NDArray[np.uint64]


class Ring:
    """What both sides hold: encoder, evaluator, and ciphertexts as integers [polynomials, primes, N]. No key.

    ``ValueError`` for parameters that SEAL refuses.
    """

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.api = api = load("tenseal.sealapi")
        chosen = api.EncryptionParameters(api.SCHEME_TYPE.CKKS)
        chosen.set_poly_modulus_degree(parameters.degree)
        try:
            chosen.set_coeff_modulus(api.CoeffModulus.Create(parameters.degree, list(parameters.prime_bits)))
        except RuntimeError as error:
            raise ValueError(f"expected primes that SEAL has, got {parameters.in_words()}: {error}") from error
        self.context = api.SEALContext(chosen, True, api.SEC_LEVEL_TYPE.TC128)
        if not self.context.parameters_set():
            raise ValueError(f"{parameters.in_words()}: SEAL refuses it: {self.context.parameters_error_message()}")
        self.encoder, self.evaluator = api.CKKSEncoder(self.context), api.Evaluator(self.context)
        several = len(parameters.prime_bits) > 1
        primes = [prime.value() for prime in chosen.coeff_modulus()]
        self.primes: list[int] = primes[:-1] if several else primes  # of a fresh ciphertext
        self.parms_id = tuple(self.context.first_parms_id())
        self.reply_parms_id = tuple(self.context.last_parms_id())
        self.scale = 2.0**parameters.scale_bits
        self.weight_scale = 2.0**parameters.weight_scale_bits
        rescaled = self.primes[-1] if len(self.primes) > 1 else 1
        self.reply_scale = self.scale * self.weight_scale / rescaled
        self.known: dict[tuple[int, int], tuple[int, ...]] = {}  # NTT values of Y, by period and prime (periodic.py)
        self._scratch = _Scratch()
        self._head = b""

    def encode(self, slots: NDArray[np.complex128], scale: float) -> Any:
        """Return the plaintext of these slots."""
        plain = self.api.Plaintext()
        self.encoder.encode(slots.tolist(), scale, plain)
        return plain

    def plain_integers(self, plain: Any) -> Integers:
        """Return the integers of a plaintext, in NTT form [primes, N]."""
        raw = self._stored(plain)
        integers = np.frombuffer(raw, np.uint64, offset=PLAINTEXT.size + SEAL_HEADER.size + COUNT.size)
        return integers.reshape(len(self.primes), self.parameters.degree)

    def plain_from_integers(self, integers: Integers, scale: float) -> Any:
        """Return the plaintext of integers in NTT form [primes, N]."""
        plain = self.api.Plaintext()
        body = np.ascontiguousarray(integers, np.uint64).tobytes()
        self._load(plain, [PLAINTEXT.pack(*self.parms_id, integers.size, scale), self._array(body)])
        return plain

    def new(self) -> Any:
        """Return an empty ciphertext."""
        return self.api.Ciphertext(self.context)

    def reduced(self, product: Any) -> Any:
        """Return a product at the level and scale at which it goes back: one prime, and room for its range."""
        if len(self.primes) > 1:
            self.evaluator.rescale_to_next_inplace(product)
            while product.coeff_modulus_size() > 1:
                self.evaluator.mod_switch_to_next_inplace(product)
        return product

    def integers(self, ciphertext: Any) -> Integers:
        """Return a ciphertext's polynomials [polynomials, primes, N]."""
        raw = self._stored(ciphertext)
        shape = (ciphertext.size(), ciphertext.coeff_modulus_size(), self.parameters.degree)
        return np.frombuffer(raw, np.uint64, offset=_OFFSET).reshape(shape)

    def seeded(self, ciphertext: Any) -> tuple[Integers, bytes]:
        """Return the one polynomial [primes, N] of a fresh symmetric ciphertext, and the seed of the other."""
        raw = self._stored(ciphertext)
        degree, primes = self.parameters.degree, len(self.primes)
        end = _OFFSET + 8 * degree * primes
        return np.frombuffer(raw[_OFFSET:end], np.uint64).reshape(primes, degree), raw[-SEED_NBYTES:]

    def from_integers(self, integers: Integers, scale: float, *, ntt: bool, reply: bool = False) -> Any:
        """Return the ciphertext of these polynomials; ``ValueError`` where SEAL finds that they are none."""
        return self._loaded(integers, scale, ntt, self.reply_parms_id if reply else self.parms_id, len(integers))

    def from_seed(self, integers: Integers, seed: bytes, scale: float) -> Any:
        """Return the fresh ciphertext of one polynomial and the other's seed."""
        size = SEAL_HEADER.size + 1 + SEED_NBYTES
        tail = SEAL_HEADER.pack(*self._version(), NONE, 0, size) + bytes([SEED_TYPE]) + seed
        return self._loaded(integers, scale, True, self.parms_id, 2, tail)

    def _stored(self, thing: Any) -> bytes:
        """Return what SEAL stores of a ciphertext or a plaintext, uncompressed and without its outer header."""
        stored = self._scratch.written(thing)
        if not self._head:
            self._head = stored[:5]
        if stored[5] == NONE:
            return stored[SEAL_HEADER.size :]
        assert stored[5] == ZSTD, stored[:16]
        return zstandard.ZstdDecompressor().decompress(stored[SEAL_HEADER.size :])

    def _loaded(
        self, integers: Integers, scale: float, ntt: bool, parms_id: tuple[int, ...], size: int, tail: bytes = b""
    ) -> Any:
        primes, degree = integers.shape[-2:]
        body = self._array(np.ascontiguousarray(integers, np.uint64).tobytes())
        ciphertext = self.new()
        try:
            fixed = CIPHERTEXT.pack(*parms_id, ntt, size, degree, primes, scale, 1)
            self._load(ciphertext, [fixed, body, tail])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"expected a ciphertext of {self.parameters.in_words()}; SEAL refuses it: {error}"
            ) from error
        return ciphertext

    def _array(self, body: bytes) -> bytes:
        """Return integers as SEAL stores them."""
        size = SEAL_HEADER.size + COUNT.size + len(body)
        return SEAL_HEADER.pack(*self._version(), NONE, 0, size) + COUNT.pack(len(body) // 8) + body

    def _load(self, thing: Any, parts: list[bytes]) -> None:
        """Have SEAL load ``thing`` from what it would have stored."""
        outer = SEAL_HEADER.pack(*self._version(), NONE, 0, SEAL_HEADER.size + sum(map(len, parts)))
        self._scratch.read(thing, self.context, b"".join([outer, *parts]))

    def _version(self) -> tuple[bytes, int, int, int]:
        if not self._head:
            empty = self.api.Plaintext()
            self._head = self._scratch.written(empty)[:5]
        return self._head[:2], self._head[2], self._head[3], self._head[4]


_OFFSET = CIPHERTEXT.size + SEAL_HEADER.size + COUNT.size


class _Scratch:
    """A file in memory where there is such a thing: SEAL's Python API stores to files alone. Never holds a key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("ciphertext")
            self._path = f"/proc/self/fd/{self._fd}"
            weakref.finalize(self, os.close, self._fd)
        else:
            file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - lives as long as this object
            self._fd, self._path, self._file = file.fileno(), file.name, file

    def _own(self) -> None:
        """Have a file of this process's own: after a fork the parent's would be written by both."""
        if self._pid != os.getpid():
            self._lock = threading.Lock()
            self._open()

    def written(self, thing: Any) -> bytes:
        """Return what SEAL stores of ``thing``."""
        self._own()
        with self._lock:
            thing.save(self._path)
            return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def read(self, thing: Any, context: Any, stored: bytes) -> None:
        """Have SEAL load ``thing`` from these bytes."""
        self._own()
        with self._lock:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, stored, 0)
            thing.load(context, self._path)
