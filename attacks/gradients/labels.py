"""The label of an update of one sample: the one negative entry of the gradient in the last layer's bias.

Zhao, Mopuri & Bilen 2020, "iDLG" (arXiv:2001.02610): under cross-entropy it is softmax(h) − onehot(y). Without a bias
each row of the weight's gradient is that entry times the same input, so that the label's row points away from all
others. Exact, whatever the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.gradients.updates import Seen, Update, some
from splitlearn import View

__all__ = ["UpdateLabels", "label_of"]


@dataclass(frozen=True)
class UpdateLabels:
    """Server that sees whole updates of one sample each. Returns the labels [N], in the order of the updates.

    ``model`` is the architecture, whose last parameters are those of a fully connected last layer; ``seen`` reads the
    updates off the view.
    """

    model: nn.Module
    seen: Seen

    def __call__(self, view: View) -> Tensor:
        """Return the label behind each update."""
        return torch.cat([label_of(self.model, update) for update in some(self.seen(view))])


def label_of(model: nn.Module, update: Update) -> Tensor:
    """Return the label [1] of an update of one sample."""
    if update.count != 1:
        raise ValueError(f"expected an update of one sample, got one of {update.count}; DLG finds labels of several")
    name, parameter = list(model.named_parameters())[-1]
    g = update.gradient.get(name)
    if g is None:
        raise LookupError(
            f"this attack reads the gradient of the last layer, got none of {name}; it needs the update of a whole "
            "model, which servers that collude put together"
        )
    if parameter.ndim > 2 or (parameter.ndim == 2 and len(parameter) < 3):
        raise ValueError(
            f"expected a last layer with a bias, or of three classes or more, got {name} of shape "
            f"{tuple(parameter.shape)}; without a bias two classes look alike"
        )
    if not (g.isfinite().all() and g.any()):
        raise ValueError(f"expected a finite gradient of {name} that is not all 0, got none; its label left no trace")
    if g.ndim == 1:
        return g.argmin().reshape(1)
    along = g @ g.T
    return (along.sum(1) - along.diagonal()).argmin().reshape(1)
