"""Gradient inversion: private inputs, and their labels, rebuilt from an update that is seen."""

from attacks.gradients.analytic import AnalyticInversion
from attacks.gradients.bottom import BottomGradientMatching
from attacks.gradients.dlg import DLG, IDLG
from attacks.gradients.inverting import InvertingGradients
from attacks.gradients.labels import UpdateLabels
from attacks.gradients.updates import Update, own_update, seen_update, seen_updates, together

__all__ = [
    "DLG", "IDLG", "AnalyticInversion", "BottomGradientMatching", "InvertingGradients", "Update", "UpdateLabels",
    "own_update", "seen_update", "seen_updates", "together",
]  # fmt: skip
