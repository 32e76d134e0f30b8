"""LEAKY, and here to be beaten: the published way to train through an encrypted layer, gradients in the clear.

Khan, Nguyen, Michalas et al. 2023, "Split Ways" (arXiv:2301.08778), and those who follow it. Only the activations are
encrypted. Deviation: they are packed as everywhere here, hundreds of times faster than one ciphertext a feature; what
crosses in the clear is what the papers send.
"""

from collections.abc import Mapping
from typing import Self
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from privacy.he.holder import LayerHolder
from privacy.he.layer import EncryptedLayer, Holding
from splitlearn.frames import Kind
from splitlearn.party import Learner
from splitlearn.service import Answer, need

__all__ = ["LEAKS", "SplitWaysHolder", "split_ways"]

LEAKS: Mapping[str, list[str]] = {
    "server": [
        "LEAKY: the gradient at every output, and with it every label",
        "LEAKY: the gradient of its weights, Σ gᵢᵀaᵢ: every activation where a batch has fewer samples than outputs",
        "ciphertexts of activations; how many samples cross, and when",
    ],
    "client": ["the outputs, and so in effect the server's weights"],
}
_WEIGHT, _BIAS = f"{Kind.GRADIENT}/weight", f"{Kind.GRADIENT}/bias"


class SplitWaysHolder(LayerHolder):
    """LEAKY: the server of Split Ways, which takes the gradients of its linear layer in the clear, and steps.

    ``optimizer`` is over ``layer``. See ``split_ways`` for what this server learns.
    """

    def __init__(self, name: str, layer: nn.Module, optimizer: torch.optim.Optimizer | None):
        super().__init__(name, layer)
        self.optimizer = optimizer
        warn(f"{name}: split-ways is LEAKY, and a baseline: its server reads every label", stacklevel=2)

    def session(self, name: str) -> Self:
        """Return a server of the same weights and optimizer for another client, under that client's key."""
        other = type(self)(name, self.layer, self.optimizer)
        other._lock = self._lock
        return other

    def _own(self) -> Mapping[str, Answer]:
        return {"backward": self._backward}

    def _backward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take ∂J/∂h and ∂J/∂W in the clear, return ∂J/∂a = ∂J/∂h · W in the clear, and step."""
        layer, g = self.layer, need(tensors, Kind.GRADIENT)
        assert isinstance(layer, nn.Linear)
        own = {_WEIGHT: layer.weight, **({} if layer.bias is None else {_BIAS: layer.bias})}
        sent = {key: tensors[key] for key in own if key in tensors}
        fits = sent.keys() == own.keys() and all(
            sent[key].shape == own[key].shape and bool(torch.isfinite(sent[key]).all()) for key in own
        )
        if g.ndim != 2 or g.shape[1] != layer.out_features or not torch.isfinite(g).all() or not fits:
            raise ValueError(
                f"{self.name}: expected a finite gradient [n, {layer.out_features}] and those of {layer}, "
                f"got {', '.join(f'{key} {tuple(tensor.shape)}' for key, tensor in tensors.items())}"
            )
        back = linear(g, layer.weight.detach().T)
        if self.optimizer is not None:
            for key, parameter in own.items():
                parameter.grad = sent[key].to(parameter)
            self.optimizer.step()
        return {Kind.GRADIENT: back}


def split_ways(bottom: Learner, layer: EncryptedLayer, server: Holding, head: Learner, x: Tensor, y: Tensor) -> Tensor:
    """LEAKY. Train through an encrypted layer as published; the server is a ``SplitWaysHolder``.

    ::

        client: bottom, labels, key                           server: W, b
        a = bottom(x)                        ── Enc(a) ──▶
        h                                  ◀─ Enc(aWᵀ+b) ─
        g = ∂J/∂h, ∂J/∂W = gᵀa               ── g, ∂J/∂W ──▶   in the clear: g names the label of every sample
        ∂J/∂a                                ◀──── gW ─────    steps

    ``head`` holds the labels and no weights. The softmax is in the loss once, where their code applies it twice.
    The server learns every label from g, whose one negative entry a row is the label's, and with fewer samples than
    outputs every activation: ∂J/∂W = gᵀa is then solved for a. Returns the mean loss.
    """
    z = bottom.forward(x)
    with torch.no_grad():
        h = layer(z)
    loss, g = head.learn(h.requires_grad_(), head.label(y))
    assert g is not None
    sent = {Kind.GRADIENT: g, _WEIGHT: g.T @ z.detach(), _BIAS: g.sum(0)}
    back = need(server.ask("backward", sent), Kind.GRADIENT)
    bottom.backward(back.to(z))
    return loss
