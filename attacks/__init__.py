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
from attacks.labels.averaged import AveragedGradients
from attacks.labels.completion import HintedHead, MaliciousOptimizer, ModelCompletion
from attacks.labels.direct import DirectLabels
from attacks.labels.exploit import ExPLoit
from attacks.labels.guess import LabelGuess
from attacks.labels.matching import GradientMatching
from attacks.labels.norm import CosineScores, NormScores
from attacks.labels.sent import SentLabels
from attacks.labels.similarity import Similarity
from attacks.labels.spectral import Spectral
from attacks.membership.lira import LiRA, halves, likelihood_ratio
from attacks.membership.points import ActivationPoint, GradientPoint, LogitPoint, Point
from attacks.membership.threshold import LossThreshold
from attacks.properties.attribute import AttributeInference
from attacks.properties.sizes import SizeGuess
from attacks.shares.first_party import FirstParty

__all__ = [
    "FORA",
    "FSHA",
    "GRN",
    "PCAT",
    "SDAR",
    "URVFL",
    "ActivationPoint",
    "AttributeInference",
    "AveragedGradients",
    "Convolutional",
    "CosineScores",
    "Decoder",
    "Dense",
    "DirectLabels",
    "ExPLoit",
    "FSHAProperty",
    "FirstParty",
    "GradientMatching",
    "GradientPoint",
    "HintedHead",
    "Inference",
    "Infiltration",
    "Insider",
    "Inversion",
    "KeyRecovery",
    "LabelGuess",
    "LatentSearch",
    "LiRA",
    "LogitPoint",
    "LossThreshold",
    "MaliciousOptimizer",
    "MaximumLikelihood",
    "ModelCompletion",
    "NormScores",
    "Point",
    "Reconstruction",
    "SentLabels",
    "Shadow",
    "Similarity",
    "SizeGuess",
    "Spectral",
    "SplitSpy",
    "UnSplit",
    "WeightGradientActivations",
    "decoder_family",
    "halves",
    "likelihood_ratio",
]
