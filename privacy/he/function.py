"""The autograd of an encrypted product: what crosses forward and back, and what crosses but once."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["TINIEST", "EncryptedProduct", "Multiplying"]

TINIEST = 1e-30  # a row of a gradient that is nowhere greater is none


class Multiplying(Protocol):
    """What sends rows to a holder and decrypts the products: an ``EncryptedLayer``."""

    def product(self, rows: Tensor, *, returns: bool = False) -> tuple[Tensor, Any]:
        """Return rows [n, inner] times the weights, and what the gradient's way back needs to know."""

    def product_back(self, g: Tensor, way_back: Any) -> Tensor:
        """Return gradients [n, outer] times the transposed weights of that product."""


class EncryptedProduct(torch.autograd.Function):
    """rows · Wᵀ + b on ciphertexts, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, layer: Multiplying, returns: bool
    ) -> Tensor:
        """Client: Enc(x) up. Server: Enc(xWᵀ + b) down."""
        ctx.layer, ctx.known = layer, None
        ctx.save_for_backward(*(() if weight is None else (rows, weight)))
        out, ctx.way_back = layer.product(rows, returns=returns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Client: Enc(g) up. Server: Enc(gW) down. Client: gᵀx and Σg, which it knows without anyone's help."""
        (g,) = gradients
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        back = None
        if needs_rows:
            back = again(g, *ctx.known) if ctx.known is not None else None
            if back is None:
                back = ctx.layer.product_back(g, ctx.way_back)
                ctx.known = g, back
        weight = None
        if needs_weight:
            rows, own = ctx.saved_tensors
            weight = (g.T @ rows).reshape(own.shape)
        return back, weight, g.sum(0) if needs_bias else None, None, None


def again(g: Tensor, known: Tensor, back: Tensor) -> Tensor | None:
    """Return gW from what an earlier pass brought, where each row of g is a multiple of that pass's; None elsewhere.

    So are the rows of ghost clipping's second pass, and of the one that follows a single sample: nothing crosses again,
    and how often something crosses tells nothing.
    """
    rows, own = g.double(), known.double()
    peak, height = own.abs().amax(1, keepdim=True), rows.abs().amax(1, keepdim=True)
    unit = own / torch.where(peak > 0, peak, torch.ones_like(peak))  # or squares of small rows would be 0
    factors = (rows * unit).sum(1, keepdim=True) / unit.square().sum(1, keepdim=True).clamp(min=1)
    eps = torch.finfo(g.dtype).eps
    tolerance = (100 if eps < 1e-6 else 4) * eps * height
    fits = ((rows - factors * unit).abs() <= tolerance).all(1, keepdim=True) & (peak >= TINIEST)
    if not bool((fits | (height < TINIEST)).all()):
        return None
    return (torch.where(fits, factors / peak.clamp(min=TINIEST), torch.zeros_like(factors)) * back.double()).to(back)
