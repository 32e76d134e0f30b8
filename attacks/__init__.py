"""Attacks: each reads a View and nothing else, or is a Party that lies. Scoring happens outside them."""

from attacks.inversion.decoder import Convolutional, Decoder, Dense, decoder_family
from attacks.inversion.maximum_likelihood import MaximumLikelihood
from attacks.inversion.reconstruction import Inversion, Reconstruction
from attacks.labels.matching import GradientMatching
from attacks.labels.sent import SentLabels

__all__ = [
    "Convolutional",
    "Decoder",
    "Dense",
    "GradientMatching",
    "Inversion",
    "MaximumLikelihood",
    "Reconstruction",
    "SentLabels",
    "decoder_family",
]
