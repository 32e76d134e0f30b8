"""Labels from a gradient in the clear: the one negative entry of cross-entropy's gradient in the outputs.

Fu, Zhang, Ji, Chen, Wu, Guo, Zhou, Liu and Wang 2022, "Label inference attacks against vertical federated learning"
(USENIX Security), the direct attack: where the parties' outputs are summed into logits and no model stands above them,
what comes back is ∂J/∂h = (softmax(h) − onehot(y)) / n, negative at the label alone (Zhao, Mopuri and Bilen 2020,
"iDLG", arXiv:2001.02610, use the same sign). Protocols on ciphertexts publish that gradient too (Khan et al. 2023,
arXiv:2301.08778).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.labels.guess import LabelGuess
from splitlearn import Kind, View

__all__ = ["DirectLabels"]


@dataclass(frozen=True)
class DirectLabels:
    """Honest but curious party that is sent the gradient at the logits: a client whose output is summed, or a server.

    The labels [N] are in the order in which the samples crossed in backward requests. Exact for the cross-entropy of
    hard labels; needs nothing but the wire, and no training. One output a sample is a logit of label 1.
    """

    def __call__(self, view: View) -> LabelGuess:
        """Return the labels: the most negative entry of each row, or for one logit whether it is negative."""
        rows = [
            exchange.request.tensors[Kind.GRADIENT].flatten(1)
            for exchange in view.exchanges
            if exchange.request.verb == "backward" and Kind.GRADIENT in exchange.request.tensors
        ]
        if not rows:
            raise LookupError(
                "this attack reads gradients of outputs in backward requests, and none crossed in the clear; record "
                "training by a protocol that sends them"
            )
        return LabelGuess(torch.cat([_told(g) for g in rows]))


def _told(g: Tensor) -> Tensor:
    return g.argmin(1) if g.shape[1] > 1 else (g[:, 0] < 0).long()
