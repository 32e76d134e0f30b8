"""Inversion: private inputs rebuilt from the activations that crossed."""
