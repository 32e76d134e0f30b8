"""Membership inference: was this sample trained on? Asked by whoever has the sample, at each point of the split."""
