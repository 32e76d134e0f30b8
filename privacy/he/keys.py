"""Keys: the client's secret, made for one run, which stays where it is made; and what it encrypts and decrypts."""

import secrets
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from privacy.he.ciphertexts import Ciphertexts
from privacy.he.layout import Complex, Real
from privacy.he.parameters import FAST, Parameters
from privacy.he.seal import Ring
from splitlearn.misfit import Refused

__all__ = ["Keys", "OutOfRange", "within"]

OutOfRange = Literal["raise", "clip"]  # what becomes of inputs that are


class Keys:
    """A fresh secret key of CKKS, and the only thing that encrypts for it or decrypts.

    - Protects: what it encrypts, from everyone without the key, who sees ciphertexts that cannot be told from those of
      anything else (semantic security, under ring-LWE at the parameters' level).
    - Does not protect: what is decrypted, once it is handed on. A decryption, in full precision, of a ciphertext that
      another party has seen tells that party the key (Li and Micciancio 2021, eprint 2020/1533): nothing that
      ``decrypt`` returns may go back as it is. Nor against who changes ciphertexts: CKKS is malleable by design.

    ``id`` is random, public, and says nothing of the key. Uploads are encrypted by the secret key itself, which halves
    them (one polynomial is a seed). Keys are neither copied, pickled nor stored: a run that is resumed makes new ones.
    """

    def __init__(self, parameters: Parameters = FAST):
        if not isinstance(parameters, Parameters):
            raise Refused(f"expected Parameters, such as FAST or PRECISE, got {parameters!r}")
        self.ring = Ring(parameters)
        self.id = secrets.token_bytes(8)
        api, context = self.ring.api, self.ring.context
        secret = api.KeyGenerator(context).secret_key()
        self._encryptor, self._decryptor = api.Encryptor(context, secret), api.Decryptor(context, secret)
        self._secret = secret

    def __repr__(self) -> str:
        return f"Keys({self.ring.parameters.name}, id {self.id.hex()})"

    def __reduce__(self) -> NoReturn:
        raise Refused("expected keys to stay with the client that made them, got a copy; make Keys(…) anew there")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce__()

    @property
    def parameters(self) -> Parameters:
        """The parameter set."""
        return self.ring.parameters

    def encrypt(self, slots: Complex, rows: int, *, scale: float | None = None) -> Ciphertexts:
        """Return fresh ciphertexts of slots [count, slots], which stand for ``rows`` samples, at the inputs' scale."""
        scale = self.ring.scale if scale is None else scale
        encoded = (self.ring.encode(one, scale) for one in slots)
        fresh = [self.ring.seeded(self._encryptor.encrypt_symmetric(plain)) for plain in encoded]
        integers = np.stack([one for one, _ in fresh])[:, None]
        return Ciphertexts("seeded", self.id, rows, scale, integers, tuple(seed for _, seed in fresh))

    def decrypt(self, ciphertexts: Ciphertexts) -> Complex:
        """Return the slots [count, slots] of a reply; ``ValueError`` where they are out of any product's range.

        What another key decrypts to is spread over the whole modulus, far out of range, and so is most of what was
        changed on the way. A change to a few coefficients of c₀ may stay within: CKKS is malleable, and a checksum no
        signature.
        """
        ring, found = self.ring, []
        for integers in ciphertexts.integers:
            truncated = ciphertexts.form == "truncated"
            one = ring.from_integers(integers, ciphertexts.scale, ntt=not truncated, reply=True)
            if truncated:
                ring.evaluator.transform_to_ntt_inplace(one)
            plain = ring.api.Plaintext()
            self._decryptor.decrypt(one, plain)
            found.append(np.array(ring.encoder.decode_complex(plain)))
        slots = np.stack(found)
        worst, limit = float(np.abs(slots).max()), self.parameters.range * ring.reply_scale / ciphertexts.scale
        if not worst <= 2 * limit:
            raise Refused(
                f"expected a decryption within ±{limit:g}, got {worst:.4g}: the ciphertext was changed, "
                "or is of another key"
            )
        return slots


def within(values: NDArray[Any], bound: float, what: str) -> Real:
    """Return the values, all within ±``bound``: CKKS would wrap others around without a word.

    Raises ``ValueError`` for nan and inf, and for what is out of range.
    """
    wide = np.asarray(values, dtype=np.float64)
    if not np.isfinite(wide).all():
        raise Refused(f"expected finite {what} to encrypt, got nan or inf; the training has diverged")
    outside = int((np.abs(wide) > bound).sum())
    if outside:
        raise Refused(
            f"expected {what} within ±{bound:g}, got {np.abs(wide).max():.4g} ({outside} of {wide.size} out of range); "
            "scale them down, give a greater bound=…, or ask to clip them: out_of_range='clip'"
        )
    return wide
