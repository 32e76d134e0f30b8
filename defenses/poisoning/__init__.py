"""Protections of the training from malicious clients: steps, samples and turns; heuristics, measured and not proven."""

from defenses.poisoning.cleanse import Cleansed, NeuralCleanse
from defenses.poisoning.clipping import ClippedGradient, ClippedSteps
from defenses.poisoning.clusters import ActivationClustering
from defenses.poisoning.filtered import FilteredServer
from defenses.poisoning.graph import NeighbourGraph
from defenses.poisoning.per_client import PerClientServer, batch_sizes
from defenses.poisoning.safesplit import SafeSplitServer, safesplit
from defenses.poisoning.spectral import SpectralSignatures
from defenses.poisoning.suspects import Rates, Suspects, flagged_shares, rates
from defenses.poisoning.witnesses import WitnessedServer

__all__ = [
    "ActivationClustering", "Cleansed", "ClippedGradient", "ClippedSteps", "FilteredServer", "NeighbourGraph",
    "NeuralCleanse", "PerClientServer", "Rates", "SafeSplitServer", "SpectralSignatures", "Suspects",
    "WitnessedServer", "batch_sizes", "flagged_shares", "rates", "safesplit",
]  # fmt: skip
