"""Heuristic protections: they make leakage smaller as measured, without a proof; none of them claims an ε."""

from defenses.nopeek import NoPeek

__all__ = ["NoPeek"]
