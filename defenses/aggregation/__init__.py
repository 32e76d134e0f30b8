"""Robust aggregation: one row of members' updates, some of which are bad. Each rule says how many, and of what kind."""

from defenses.aggregation.centres import CentredClipping, GeometricMedian
from defenses.aggregation.coordinates import Mean, Median, TrimmedMean
from defenses.aggregation.dnc import DnC
from defenses.aggregation.flame import FLAME
from defenses.aggregation.fltrust import FLTrust, Rooted
from defenses.aggregation.foolsgold import FoolsGold
from defenses.aggregation.krum import Bulyan, Krum, MultiKrum
from defenses.aggregation.mixing import NNM, Bucketing, Mixed
from defenses.aggregation.points import Points, Rule, Verdict
from defenses.aggregation.robust import Robust, Screened

__all__ = [
    "FLAME", "NNM", "Bucketing", "Bulyan", "CentredClipping", "DnC", "FLTrust", "FoolsGold", "GeometricMedian", "Krum",
    "Mean", "Median", "Mixed", "MultiKrum", "Points", "Robust", "Rooted", "Rule", "Screened", "TrimmedMean", "Verdict",
]  # fmt: skip
