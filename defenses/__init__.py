"""Heuristic protections: they make leakage smaller as measured, without a proof; none of them claims an ε."""

from defenses.adversarial import AdversarialRepresentation, proxy_decoder
from defenses.bottleneck import MID, Bottleneck
from defenses.disco import Disco
from defenses.dropout import Dropout
from defenses.noise import GaussianNoise, LaplaceNoise
from defenses.nopeek import NoPeek
from defenses.quantised import Binarised, Quantised
from defenses.ressfl import ResSFL, narrowed, pretrain_resistant
from defenses.shredder import LearnedNoise, learn_noise
from defenses.shuffle import PatchShuffle
from defenses.sparse import TopKActivations

__all__ = [
    "MID",
    "AdversarialRepresentation",
    "Binarised",
    "Bottleneck",
    "Disco",
    "Dropout",
    "GaussianNoise",
    "LaplaceNoise",
    "LearnedNoise",
    "NoPeek",
    "PatchShuffle",
    "Quantised",
    "ResSFL",
    "TopKActivations",
    "learn_noise",
    "narrowed",
    "pretrain_resistant",
    "proxy_decoder",
]
