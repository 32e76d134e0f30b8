"""Labels from a gradient in the clear: the one negative entry of cross-entropy's gradient in the outputs.

∂J/∂h = (softmax(h) − onehot(y)) / n (Zhao, Mopuri and Bilen 2020, "iDLG", arXiv:2001.02610, use its sign; here it is
sent as it is, by the published protocols on ciphertexts: Khan et al. 2023, arXiv:2301.08778).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn import Kind, View

__all__ = ["ClearGradientLabels"]


@dataclass(frozen=True)
class ClearGradientLabels:
    """Honest but curious server that is sent the gradient at the model's outputs. Returns the labels, [N].

    In the order in which the samples crossed in backward requests. Exact; needs nothing but the wire.
    """

    def __call__(self, view: View) -> Tensor:
        """Return the label of each sample, the smallest entry of its row."""
        rows = [
            exchange.request.tensors[Kind.GRADIENT]
            for exchange in view.exchanges
            if exchange.request.verb == "backward" and Kind.GRADIENT in exchange.request.tensors
        ]
        if not rows:
            raise LookupError(
                "this attack reads gradients of outputs in backward requests, and none crossed in the clear; record "
                "training by a protocol that sends them"
            )
        return torch.cat([g.argmin(1) for g in rows])
