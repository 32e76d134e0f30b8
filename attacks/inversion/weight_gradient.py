"""Activations from a weight gradient in the clear: ∂J/∂W = gᵀa, solved for a, where g is sent beside it.

With n samples and O outputs gᵀ is [O, n], of rank min(n, O − 1), since the rows of cross-entropy's gradient add up
to 0: for n ≤ O − 1 the solution is the activations, exactly; above it is that of least norm. (Known of linear layers
since Phong et al. 2018, "Privacy-preserving deep learning via additively homomorphic encryption", for one sample.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn import Kind, View

__all__ = ["WeightGradientActivations"]


@dataclass(frozen=True)
class WeightGradientActivations:
    """Honest but curious server that is sent g and gᵀa. Returns the activations [N, F], in the order of the wire."""

    def __call__(self, view: View) -> Tensor:
        """Return the activations of each sample: the solution of least norm."""
        weight = f"{Kind.GRADIENT}/weight"
        found = [
            torch.linalg.lstsq(sent[Kind.GRADIENT].double().T, sent[weight].double(), driver="gelsd").solution
            for sent in (exchange.request.tensors for exchange in view.exchanges)
            if Kind.GRADIENT in sent and weight in sent
        ]
        if not found:
            raise LookupError(
                "this attack reads weight gradients beside gradients, and none crossed in the clear; record training "
                "by a protocol that sends them"
            )
        return torch.cat(found).float()
