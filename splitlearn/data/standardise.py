"""Standardise tables with statistics of the private part alone, so that no other part leaks into training."""

from dataclasses import replace

import torch

from splitlearn.data.dataset import Dataset, Splits

__all__ = ["standardise"]


def standardise(splits: Splits) -> Splits:
    """Return the parts with each column's private mean taken off, divided by its private standard deviation.

    Columns that hold only 0 and 1 in the private part (one-hot) stay as they are, and a constant column is only
    centred. Raises ``ValueError`` for anything but tables: images lie in [0, 1] and signals have units.
    """
    private = splits.private
    if private.kind != "table":
        raise ValueError(f"{private.name}: expected a table, got kind {private.kind}; only tables are standardised")
    if not len(private):
        raise ValueError(f"{private.name}: expected private rows to fit on, got none; ask for some in split(…)")
    x = private.x.double()
    std, mean = torch.std_mean(x, dim=0, correction=0)
    flat = std <= 1e-9 * (1 + mean.abs())  # rounding alone leaves about 1e-16 of the mean
    std = torch.where(flat, torch.ones_like(std), std)
    binary = ((x == 0) | (x == 1)).all(0)
    mean, std = mean.masked_fill(binary, 0.0), std.masked_fill(binary, 1.0)

    def scaled(part: Dataset) -> Dataset:
        return replace(part, x=((part.x.double() - mean) / std).float())

    return Splits(scaled(private), scaled(splits.auxiliary), scaled(splits.test))
