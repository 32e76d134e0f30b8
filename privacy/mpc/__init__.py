"""Secure multi-party computation: computing on values that no single server sees (CrypTen)."""

from privacy.mpc.compat import load_crypten

__all__ = ["load_crypten"]
