"""Scores of binary labels from activations: along their first singular direction the classes come apart.

Sun, Yang, Yao and Wang 2022, "Label leakage and protection from forward embedding in vertical federated learning"
(arXiv:2203.01451), after the spectral signatures of backdoors (Tran, Li and Mądry 2018, arXiv:1811.00636). Deviations:

- one direction for all batches of the view, each centred on its own mean (which moves as the bottom learns);
- the direction's sign, which no spectrum gives, is by known samples, or by skew: the rarer class is the longer tail;
- scores alone, without the split into two clusters: 2-means parts the commoner class where the other is rare.
"""

from dataclasses import dataclass

import torch

from attacks.labels.guess import LabelGuess, crossed
from attacks.labels.rows import hinted
from splitlearn import View

__all__ = ["Spectral"]


@dataclass(frozen=True)
class Spectral:
    """Honest but curious party without labels that goes by its own activations alone. Scores of binary labels, [N].

    It works where the class is what its activations vary by most: at a late cut, once training has moved the bottom;
    and there it stands whatever is done to gradients. ``rare`` says which label is the rarer one, where no hints do.
    """

    rare: int = 1

    def __post_init__(self) -> None:
        if self.rare not in (0, 1):
            raise ValueError(f"expected label 0 or 1 as the rarer one, got {self.rare}; scores are for two classes")

    def __call__(self, view: View) -> LabelGuess:
        """Return the scores; ``evidence`` holds the share of the variance along the direction, and its skew."""
        parts = [one.z.flatten(1) for one in crossed(view)]
        rows = torch.cat([part - part.mean(0) for part in parts])
        _, values, directions = torch.linalg.svd(rows, full_matrices=False)
        scores = rows @ directions[0]
        tiny = torch.finfo(scores.dtype).tiny
        skew = (scores**3).mean() / (scores.square().mean() ** 1.5 + tiny)
        if view.threat.hints:
            known, labels = hinted(view, scores)
            upwards = bool(known[labels == 1].mean() > known[labels == 0].mean())
        else:
            upwards = bool((skew > 0) == (self.rare == 1))
        share = values[0].square() / (values.square().sum() + tiny)
        evidence = {"variance": share.item(), "skew": abs(skew.item())}
        return LabelGuess(scores=scores if upwards else -scores, evidence=evidence)
