"""Differential privacy: mechanisms whose guarantee has a proof."""

from privacy.dp.gaussian import ClippedGaussian

__all__ = ["ClippedGaussian"]
