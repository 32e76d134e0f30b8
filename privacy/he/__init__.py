"""Homomorphic encryption on the cut: a layer whose inputs, gradients and, if wanted, weights the server never sees."""

from privacy.he.cipher_holder import CipherHolder
from privacy.he.ciphertexts import Ciphertexts
from privacy.he.geometry import Geometry
from privacy.he.holder import LayerHolder
from privacy.he.keys import Keys
from privacy.he.layer import EncryptedLayer
from privacy.he.layout import Layout
from privacy.he.opening import Update
from privacy.he.parameters import DEPTH2, FAST, PRECISE, PRESETS, Parameters, tight
from privacy.he.product import plan
from privacy.he.protocols import LEARNS, he_encw, he_inference, he_u_dp
from privacy.he.split_ways import LEAKS, SplitWaysHolder, split_ways

__all__ = [
    "DEPTH2", "FAST", "LEAKS", "LEARNS", "PRECISE", "PRESETS", "CipherHolder", "Ciphertexts", "EncryptedLayer",
    "Geometry", "Keys", "LayerHolder", "Layout", "Parameters", "SplitWaysHolder", "Update", "he_encw", "he_inference",
    "he_u_dp", "plan", "split_ways", "tight",
]  # fmt: skip
