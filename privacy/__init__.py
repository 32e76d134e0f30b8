"""Mechanisms with a proof; each states adjacency, sensitivity, what is protected, from whom, and what is not."""

from privacy.dp.gaussian import ClippedGaussian

__all__ = ["ClippedGaussian"]
