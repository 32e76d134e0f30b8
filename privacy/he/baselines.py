"""TenSEAL's own tensors doing the same products, as published work has them do: what ours is measured against.

``[60, 40, 40, 60]`` at degree 8192 and a scale of 2^40, the setting of Split Ways (Khan et al. 2023, arXiv:2301.08778).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from privacy.extra import load
from privacy.he.layout import Real

__all__ = ["by_ckks_tensor", "by_ckks_vector", "high_level_context"]


def high_level_context(degree: int = 8192, prime_bits: tuple[int, ...] = (60, 40, 40, 60), scale_bits: int = 40) -> Any:
    """Return TenSEAL's context with all keys that its products ask for."""
    tenseal = load("tenseal")
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=list(prime_bits))
    context.global_scale = 2.0**scale_bits
    context.generate_galois_keys()
    return context


def by_ckks_tensor(context: Any, x: Real, m: Real) -> Callable[[], Real]:
    """Return a function that encrypts X [rows, inner], multiplies by M [inner, outer], and decrypts.

    One ciphertext an entry of a row, all rows in its slots (``batch=True``): the layout of Split Ways.
    """
    tenseal = load("tenseal")
    rows, weights = tenseal.plain_tensor(x[:, None].tolist()), tenseal.plain_tensor(m.tolist())

    def product() -> Real:
        encrypted = tenseal.ckks_tensor(context, rows, batch=True)
        return np.array(encrypted.mm(weights).decrypt().tolist())[:, 0]

    return product


def by_ckks_vector(context: Any, x: Real, m: Real) -> Callable[[], Real]:
    """Return a function that does the same one row at a time: a vector in one ciphertext, which is rotated."""
    tenseal = load("tenseal")
    weights = m.tolist()

    def product() -> Real:
        return np.array([tenseal.ckks_vector(context, row).mm(weights).decrypt() for row in x.tolist()])

    return product
