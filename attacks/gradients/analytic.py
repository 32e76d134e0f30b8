"""The input of a fully connected first layer, read off its gradient: ∂J/∂W = g xᵀ beside ∂J/∂b = g.

Phong et al. 2018, "Privacy-preserving deep learning via additively homomorphic encryption" (x = (∂W)_i / (∂b)_i);
Geiping et al. 2020, arXiv:2003.14053, Proposition 3.1. Deviation: all rows are used, by least squares, which averages
rounding and noise.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from attacks.gradients.updates import Seen, some
from attacks.inversion.reconstruction import Bounds, Reconstruction, bounded
from splitlearn import View

__all__ = ["AnalyticInversion"]

RANK_ONE = 1e-6  # share of the weight gradient's square that g xᵀ may leave, in float32 and below


@dataclass(frozen=True)
class AnalyticInversion:
    """Server that sees updates of one sample, if only of the bottom. Exact where ``model`` begins fully connected.

    ``seen`` reads the updates off the view. ``evidence`` holds what one sample cannot explain of the weight's gradient,
    as a share of its square: 0 for an honest update of one, close to 1 for noise. More samples are an error: their
    gradient is a sum of such products.
    """

    model: nn.Module
    seen: Seen
    input_shape: tuple[int, ...]
    bounds: Bounds | None = (0.0, 1.0)

    def __call__(self, view: View) -> Reconstruction:
        """Return the input behind each update."""
        weight, bias = self._first()
        inputs, left = [], []
        for update in some(self.seen(view)):
            if update.count != 1:
                raise ValueError(
                    f"expected updates of one sample, got one of {update.count}; use DLG or InvertingGradients"
                )
            g, products = update.gradient[bias].double(), update.gradient[weight].double()
            if not (g.isfinite().all() and products.isfinite().all() and g.any()):
                raise ValueError("expected a finite bias gradient that is not all 0, got none; no unit was moved")
            if products.shape[1] != prod(self.input_shape):
                raise ValueError(
                    f"expected inputs of {products.shape[1]} entries, as many as the first layer takes, got an "
                    f"input_shape of {tuple(self.input_shape)}; set it to the shape of one input"
                )
            x = g @ products / g.square().sum()
            left.append(((products - g.outer(x)).square().sum() / products.square().sum().clamp(min=1e-300)).item())
            inputs.append(x.to(update.gradient[weight].dtype).reshape(self.input_shape))
        evidence = {"objective_last": sum(left) / len(left), "converged": float(max(left) < RANK_ONE)}
        return Reconstruction(bounded(torch.stack(inputs), self.bounds), evidence)

    def _first(self) -> tuple[str, str]:
        """Return the names of the first layer's weight and bias."""
        first = [(name, parameter) for name, parameter in self.model.named_parameters()][:2]
        layers = {name.rpartition(".")[0] for name, _ in first}
        if [parameter.ndim for _, parameter in first] != [2, 1] or len(layers) != 1:
            told = ", ".join(f"{name} of shape {tuple(parameter.shape)}" for name, parameter in first)
            raise ValueError(
                f"expected a fully connected first layer with a bias, got {told}; use DLG or InvertingGradients"
            )
        return first[0][0], first[1][0]
