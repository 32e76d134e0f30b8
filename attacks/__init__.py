"""Attacks: each reads a View and nothing else, or is a Party that lies. Scoring happens outside them."""

from attacks.inversion.decoder import Convolutional, Decoder, Dense, decoder_family
from attacks.inversion.fora import FORA
from attacks.inversion.fsha import FSHA, FSHAProperty, Inference
from attacks.inversion.grn import GRN
from attacks.inversion.insider import Infiltration, Insider
from attacks.inversion.latent import LatentSearch
from attacks.inversion.maximum_likelihood import MaximumLikelihood
from attacks.inversion.pcat import PCAT
from attacks.inversion.reconstruction import Inversion, Reconstruction
from attacks.inversion.sdar import SDAR
from attacks.inversion.shadow import Shadow
from attacks.inversion.splitspy import SplitSpy
from attacks.inversion.unsplit import UnSplit
from attacks.inversion.urvfl import URVFL
from attacks.inversion.weight_gradient import WeightGradientActivations
from attacks.keys.li_micciancio import KeyRecovery
from attacks.labels.clear_gradient import ClearGradientLabels
from attacks.labels.matching import GradientMatching
from attacks.labels.sent import SentLabels
from attacks.shares.first_party import FirstParty

__all__ = [
    "FORA",
    "FSHA",
    "GRN",
    "PCAT",
    "SDAR",
    "URVFL",
    "ClearGradientLabels",
    "Convolutional",
    "Decoder",
    "Dense",
    "FSHAProperty",
    "FirstParty",
    "GradientMatching",
    "Inference",
    "Infiltration",
    "Insider",
    "Inversion",
    "KeyRecovery",
    "LatentSearch",
    "MaximumLikelihood",
    "Reconstruction",
    "SentLabels",
    "Shadow",
    "SplitSpy",
    "UnSplit",
    "WeightGradientActivations",
    "decoder_family",
]
