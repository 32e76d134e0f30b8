"""Mechanisms with a proof; each states adjacency, sensitivity, what is protected, from whom, and what is not."""

from privacy.dp import (
    Accounted,
    Adjacency,
    Budget,
    BudgetExceeded,
    ClippedGaussian,
    ClippedLaplace,
    GaussianRelease,
    LaplaceRelease,
    OnGradient,
    PoissonBatches,
    PrivateLearner,
    PrivateMean,
    RandomisedResponse,
)

__all__ = [
    "Accounted",
    "Adjacency",
    "Budget",
    "BudgetExceeded",
    "ClippedGaussian",
    "ClippedLaplace",
    "GaussianRelease",
    "LaplaceRelease",
    "OnGradient",
    "PoissonBatches",
    "PrivateLearner",
    "PrivateMean",
    "RandomisedResponse",
]
