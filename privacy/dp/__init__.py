"""Differential privacy: mechanisms whose guarantee has a proof, one account of all they release, and an audit of it."""

from privacy.dp.accountants import calibrate, epsilon
from privacy.dp.accounted import Accounted
from privacy.dp.adjacency import Adjacency
from privacy.dp.budget import Account, Budget, BudgetExceeded, Claim
from privacy.dp.fisher import bayesian_mse_bound, dfil, dfil_of, mse_bound
from privacy.dp.gaussian import ClippedGaussian
from privacy.dp.gradient import OnGradient
from privacy.dp.label_gradient import LaplaceLabels
from privacy.dp.labels import ForwardCrossEntropy, RandomisedResponse, UnbiasedCrossEntropy
from privacy.dp.laplace import ClippedLaplace
from privacy.dp.poisson import PaddedCrossEntropy, PoissonBatches, joint_noise_multiplier
from privacy.dp.releases import Clear, GaussianRelease, LaplaceRelease, Release, Releases, ResponseRelease
from privacy.dp.sgd import PrivateLearner
from privacy.dp.shapers import Shaper
from privacy.dp.user_level import PrivateMean, poisson_members

__all__ = [
    "Account", "Accounted", "Adjacency", "Budget", "BudgetExceeded", "Claim", "Clear", "ClippedGaussian",
    "ClippedLaplace", "ForwardCrossEntropy", "GaussianRelease", "LaplaceLabels", "LaplaceRelease", "OnGradient",
    "PaddedCrossEntropy", "PoissonBatches", "PrivateLearner", "PrivateMean", "RandomisedResponse", "Release",
    "Releases", "ResponseRelease", "Shaper", "UnbiasedCrossEntropy", "bayesian_mse_bound", "calibrate", "dfil",
    "dfil_of", "epsilon", "joint_noise_multiplier", "mse_bound", "poisson_members",
]  # fmt: skip
