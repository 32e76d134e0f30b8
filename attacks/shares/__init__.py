"""Attacks on secret shares: what a curious party makes of what it receives and draws itself."""
