"""What Opacus must know of an encrypted layer: per-sample gradients of weights that are held elsewhere."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from privacy.extra import load

if TYPE_CHECKING:
    from privacy.he.layer import EncryptedLayer

__all__ = ["teach_opacus"]


def teach_opacus(kind: "type[EncryptedLayer]") -> None:
    """Tell Opacus the per-sample gradients of this layer: those of the plain one, since x and g are known here."""
    samples = load("opacus.grad_sample.utils")

    def parts(layer: "EncryptedLayer", activations: list[Tensor], g: Tensor) -> tuple[Tensor, Tensor]:
        x = activations[0]
        out = g.unsqueeze(1) if layer.geometry.kind == "linear" else g.flatten(2).transpose(1, 2)
        return layer.rows(x), out  # [n, positions, inner], [n, positions, outer]

    @samples.register_grad_sampler(kind)
    def gradients(layer: "EncryptedLayer", activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
        x, out = parts(layer, activations, g)
        found: dict[nn.Parameter, Tensor] = {}
        if layer.weight is not None and layer.weight.requires_grad:
            found[layer.weight] = torch.einsum("npi,npo->noi", x, out).reshape(len(x), *layer.geometry.weight_shape)
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = out.sum(1)
        return found

    @samples.register_norm_sampler(kind)
    def norms(layer: "EncryptedLayer", activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
        return {own: one.flatten(1).norm(dim=1) for own, one in gradients(layer, activations, g).items()}
