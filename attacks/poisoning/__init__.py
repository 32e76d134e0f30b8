"""Poisoning: members, clients and servers that train a model wrong, on purpose."""

from attacks.poisoning.adaptive import Adaptive, Candidate
from attacks.poisoning.backdoor import Backdoor, EdgeCases, Patch, backdoor_success, distributed
from attacks.poisoning.colluding import Colluding
from attacks.poisoning.data import Poison, PoisonedBatches, poisoned
from attacks.poisoning.extremal import MinMax, MinSum
from attacks.poisoning.labels import MirroredLabels, NextLabels, RandomLabels, SourceLabels
from attacks.poisoning.server import ServerBackdoor, SurrogateServer
from attacks.poisoning.smashed import EmbeddingBackdoor, SmashedMinSum, SmashedNoise, SmashedStatistics, misa
from attacks.poisoning.updates import ALIE, InnerProduct, Mimic, ModelReplacement, SignFlip, UpdateAttack
from attacks.poisoning.villain import VILLAIN, Villain

__all__ = [
    "ALIE",
    "VILLAIN",
    "Adaptive",
    "Backdoor",
    "Candidate",
    "Colluding",
    "EdgeCases",
    "EmbeddingBackdoor",
    "InnerProduct",
    "Mimic",
    "MinMax",
    "MinSum",
    "MirroredLabels",
    "ModelReplacement",
    "NextLabels",
    "Patch",
    "Poison",
    "PoisonedBatches",
    "RandomLabels",
    "ServerBackdoor",
    "SignFlip",
    "SmashedMinSum",
    "SmashedNoise",
    "SmashedStatistics",
    "SourceLabels",
    "SurrogateServer",
    "UpdateAttack",
    "Villain",
    "backdoor_success",
    "distributed",
    "misa",
    "poisoned",
]
