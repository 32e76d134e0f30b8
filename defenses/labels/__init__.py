"""Protections of labels, for whoever holds them: heuristics without a proof; none of them claims an ε."""

from defenses.labels.bottlenecked import BottleneckedTop
from defenses.labels.coae import CoAE
from defenses.labels.decorrelation import LabelDecorrelation
from defenses.labels.fedpass import FedPass
from defenses.labels.marvell import Marvell
from defenses.labels.mixup import Mixup
from defenses.labels.perturbation import Isotropic, MaxNorm

__all__ = ["BottleneckedTop", "CoAE", "FedPass", "Isotropic", "LabelDecorrelation", "Marvell", "MaxNorm", "Mixup"]
