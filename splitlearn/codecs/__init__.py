"""Codecs: what is done to tensors on the wire to save bytes. None of them is a privacy mechanism."""

from splitlearn.codecs.combined import ErrorFeedback, PerKind, through
from splitlearn.codecs.levels import Float16, Int8, Palette, Uniform
from splitlearn.codecs.lossless import Ans, Zstd
from splitlearn.codecs.padded import Padded
from splitlearn.codecs.sparse import RandomK, TopK, kept_of

__all__ = [
    "Ans", "ErrorFeedback", "Float16", "Int8", "Padded", "Palette", "PerKind", "RandomK", "TopK", "Uniform", "Zstd",
    "kept_of", "through",
]  # fmt: skip
