"""Detectors: a client's own learner, watched, so that it notices a server that hijacks the training."""

from defenses.detectors.policies import Average, Fast, Voting, batches_until
from defenses.detectors.scrutinizer import GradientsScrutinizer
from defenses.detectors.splitguard import SplitGuard
from defenses.detectors.splitout import SplitOut, honest_gradients

__all__ = [
    "Average", "Fast", "GradientsScrutinizer", "SplitGuard", "SplitOut", "Voting", "batches_until", "honest_gradients",
]  # fmt: skip
