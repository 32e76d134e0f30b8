"""Scores of binary labels from gradients: their norms, and their cosine with that of a known positive.

Li, Sun, Yang, Gao, Zhang, Xie, Smith and Wang 2022, "Label leakage and protection in two-party split learning"
(arXiv:2102.08504). Deviation: the cosine is with the mean direction of all positives that are known, not with one.
"""

from dataclasses import dataclass

from attacks.labels.guess import LabelGuess, crossed
from attacks.labels.rows import gradients, hinted, normalised
from splitlearn import View

__all__ = ["CosineScores", "NormScores"]


@dataclass(frozen=True)
class NormScores:
    """Honest but curious party without labels. Scores of binary labels [N]: the norm of each sample's gradient.

    A model is surer of the commoner label, whose samples then have the smaller gradients: ``rare`` says which label is
    the rarer one (1 by default), and is all that the adversary must know. On balanced labels the norm tells little, and
    so it does once the top is as sure of the rare label: of an easy one, norms may then be the smaller.
    """

    rare: int = 1

    def __post_init__(self) -> None:
        if self.rare not in (0, 1):
            raise ValueError(f"expected label 0 or 1 as the rarer one, got {self.rare}; norms are for two classes")

    def __call__(self, view: View) -> LabelGuess:
        """Return the scores; no labels, for which the attack has no threshold."""
        norms = gradients(crossed(view)).norm(dim=1)
        return LabelGuess(scores=norms if self.rare else -norms)


@dataclass(frozen=True)
class CosineScores:
    """Honest but curious party without labels that knows some positives (hints). Scores of binary labels, [N].

    The score is the cosine of each sample's gradient with the mean direction of the known positives' gradients; a
    sample is guessed to be of label 1 where it is above 0, as it is for one linear layer above the cut. A known
    positive of which the top is entirely sure has a gradient of 0 and tells nothing: take more hints, or an earlier
    epoch.
    """

    def __call__(self, view: View) -> LabelGuess:
        """Return scores and labels."""
        rows = normalised(gradients(crossed(view)))
        known, labels = hinted(view, rows)
        if not bool((labels == 1).any()):
            raise ValueError(
                f"expected a known sample of label 1, got labels {labels.unique().tolist()}; hints are for two classes"
            )
        positive = normalised(known[labels == 1].mean(0, keepdim=True))
        scores = rows @ positive[0]
        return LabelGuess((scores > 0).long(), scores)
