"""Mechanisms with a proof; each states adjacency, sensitivity, what is protected, from whom, and what is not."""

from privacy.dp import (
    Accounted,
    Adjacency,
    Budget,
    BudgetExceeded,
    ClippedGaussian,
    ClippedLaplace,
    ForwardCrossEntropy,
    GaussianRelease,
    LaplaceRelease,
    OnGradient,
    PaddedCrossEntropy,
    PoissonBatches,
    PrivateLearner,
    PrivateMean,
    RandomisedResponse,
    UnbiasedCrossEntropy,
)

__all__ = [
    "Accounted",
    "Adjacency",
    "Budget",
    "BudgetExceeded",
    "ClippedGaussian",
    "ClippedLaplace",
    "ForwardCrossEntropy",
    "GaussianRelease",
    "LaplaceRelease",
    "OnGradient",
    "PaddedCrossEntropy",
    "PoissonBatches",
    "PrivateLearner",
    "PrivateMean",
    "RandomisedResponse",
    "UnbiasedCrossEntropy",
]
