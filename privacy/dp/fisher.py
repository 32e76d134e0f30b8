"""Diagonal Fisher information leakage (dFIL) of a noisy encoder, and what it bounds: the error of reconstruction.

Maeng, Guo, Kariyappa and Suh 2023, "Bounding the invertibility of privacy-preserving instance encoding using Fisher
information" (arXiv:2305.04146), after Guo, Karrer, Chaudhuri and van der Maaten 2022, "Bounding training data
reconstruction in private (deep) learning" (arXiv:2201.12383).

The encoder sends z = e(x) + noise, drawn anew for each entry and release. The Fisher information of z about x is
JᵀJ / σ² under Gaussian noise of standard deviation σ and JᵀJ / b² under Laplace noise of scale b, J the Jacobian of e
at x; dFIL is its trace over the number d of input entries, k times as much for k independent releases. Its unit is
1 / (unit of an input entry)², so that on images scaled to [0, 1] a bound is an MSE on that scale.

What the figure is not:

- No differential privacy. It is local: it holds at this x and this encoder, and bounds nothing at other inputs.
- No bound on attackers with a prior. 1 / dFIL binds the unbiased, whose estimate is right on average for every input
  near x. Whoever knows what inputs look like is biased and can do better: the mean image has the error of the data's
  variance, whatever the encoder sends. ``bayesian_mse_bound`` binds them, for priors that few data have.
- No measure of steps. A quantiser has derivative 0 and leaks; the encoder must be differentiable at x. At a kink (ReLU,
  max pooling, the sphere of a clip) the figure follows torch's choice of derivative; flat regions of an image can sit
  on one, inputs with a density do so with chance 0.

The trace is exact, from every row or column of J; a stochastic estimate of it would be cheaper on large inputs.
"""

import warnings
from collections.abc import Callable, Iterator
from math import isfinite
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from privacy.dp.clipping import clipped
from privacy.dp.gaussian import ClippedGaussian
from privacy.dp.laplace import ClippedLaplace

__all__ = ["bayesian_mse_bound", "dfil", "dfil_of", "mse_bound"]

Encode = Callable[[Tensor], Tensor]


def dfil(
    encode: Encode,
    x: Tensor,
    *,
    std: float | None = None,
    laplace_scale: float | None = None,
    releases: int = 1,
    chunk: int = 256,
) -> Tensor:
    """Return the dFIL of each sample of ``x`` [N, *], [N], of x's type, detached, 0 or more.

    ``encode`` is the path without noise, batch first, each row from its own sample alone (batch norm in evaluation
    mode), and deterministic. The noise on each entry of what it returns is either Gaussian of standard deviation
    ``std`` or Laplace of scale ``laplace_scale``, both in the unit of that entry; ``releases`` of each sample are seen.

    The cost is one pass an input or an output entry, whichever are fewer a sample (outputs too where torch has no
    forward mode for the encoder), ``chunk`` rows at a time, which bounds the memory. ``ValueError`` for no noise or
    both kinds, inputs that are no finite floating-point numbers, an encoder that mixes rows or has no gradient, and a
    Jacobian that is not finite.
    """
    noise = _noise(std, laplace_scale)
    if releases < 1 or chunk < 1:
        raise ValueError(f"expected at least 1 release and a chunk of at least 1 row, got {releases} and {chunk}")
    _check_inputs(x)
    x = x.detach()
    width_in, width_out = x[0].numel(), _width(encode, x)
    traces: Tensor | None = None
    if width_in < width_out:
        traces = _by_columns(encode, x, chunk)
    if traces is None:
        traces = _by_rows(encode, x, width_out, chunk)
    found = (traces * (releases / (width_in * noise**2))).to(x.dtype)
    if not torch.isfinite(found).all():
        raise ValueError(
            f"expected a finite Jacobian, got nan or inf for {int((~torch.isfinite(found)).sum())} of {len(x)} "
            "samples; look for a root or a norm at 0 in the encoder, or compute in float64"
        )
    return found


def dfil_of(stage: nn.Module, guard: ClippedGaussian | ClippedLaplace, x: Tensor, *, releases: int = 1) -> Tensor:
    """Return the dFIL, [N], of what ``guard`` sends of ``stage`` in evaluation mode, for each sample of ``x`` [N, *].

    The clipping counts into the Jacobian, the noise is the guard's. Each submodule's mode is restored, and no parameter
    is left with a gradient. ``ValueError`` as ``dfil``, and for a guard without noise or of another kind.
    """
    norm: Literal[1, 2]
    std = laplace_scale = None
    if isinstance(guard, ClippedGaussian):
        norm, std = 2, guard.std
    elif isinstance(guard, ClippedLaplace):
        norm, laplace_scale = 1, guard.scale
    else:
        raise ValueError(
            f"expected a ClippedGaussian or a ClippedLaplace, got {type(guard).__name__}; dFIL needs a known noise on "
            "every entry: pass the mechanism itself, or use dfil"
        )
    if not guard.noise_multiplier:
        raise ValueError(
            f"expected a guard with noise, got {guard!r}; without noise nothing bounds the reconstruction: raise "
            "noise_multiplier above 0"
        )
    modes = [(module, module.training) for module in stage.modules()]
    stage.eval()
    try:
        return dfil(
            lambda inputs: clipped(stage(inputs), guard.clip, norm),
            x,
            std=std,
            laplace_scale=laplace_scale,
            releases=releases,
        )
    finally:
        for module, mode in modes:
            module.training = mode


def mse_bound(dfil: Tensor) -> Tensor:
    """Return the least MSE an entry, of ``dfil``'s shape, that any unbiased attacker can have: 1 / dFIL.

    Cramér and Rao: the MSE is at least tr(I⁻¹) / d for the Fisher information I, which is at least d / tr(I); the two
    meet where I is a multiple of the identity. Infinite where dFIL is 0. It is loose where I is far from that: an
    encoder with fewer outputs than inputs admits no unbiased attacker at all, and a finite bound here. ``ValueError``
    for values that are negative or nan.
    """
    _check_dfil(dfil)
    return 1 / dfil


def bayesian_mse_bound(dfil: Tensor, *, prior_information: float) -> Tensor:
    """Return the least MSE an entry, a scalar, that any attacker can have on average over inputs from a prior.

    Van Trees' inequality (van Trees 1968; Gill and Levit 1995), for biased attackers too, who may know encoder, noise
    and prior: 1 / (mean dFIL + J). ``dfil`` [N] is of samples drawn from that prior; their mean stands for the
    expectation, so that the bound is an estimate unless dFIL is the same everywhere. ``prior_information`` is
    J = tr(E[∇log p ∇log pᵀ]) / d, the Fisher information of the prior's density p an input entry: 1 / variance for a
    Gaussian of equal variances; in dFIL's unit, above 0, finite.

    The density must be differentiable and vanish at the border of its support. Images on [0, 1] have no such prior
    exactly: their pixels are quantised and sit at 0 and 1 themselves. A J fitted to them bounds attackers on the
    fitted density, and no attacker on the images. Nor is it a bound at each x: an attacker whose guess happens to be x
    has no error there. ``ValueError`` for a J that is none, and for dFIL that is empty, negative or nan.
    """
    if not (isfinite(prior_information) and prior_information > 0):
        raise ValueError(
            f"expected a finite prior_information above 0, got {prior_information}; it is 1 / variance for a Gaussian "
            "prior, and a prior without a smooth density has none"
        )
    _check_dfil(dfil)
    return 1 / (dfil.mean() + prior_information)


def _by_rows(encode: Encode, x: Tensor, width_out: int, chunk: int) -> Tensor:
    """Return tr(JᵀJ) of each sample, one backward pass an output entry: a row of J each."""
    traces = _zeros(x)
    for samples, places in _pairs(len(x), width_out, x.device, chunk):
        with torch.enable_grad():
            inputs = x[samples].requires_grad_()
            picked = encode(inputs).unsqueeze(-1).flatten(1).gather(1, places[:, None]).sum()
        (rows,) = torch.autograd.grad(picked, inputs)
        traces.index_add_(0, samples, _squares(rows))
    return traces


def _by_columns(encode: Encode, x: Tensor, chunk: int) -> Tensor | None:
    """Return tr(JᵀJ) of each sample, one forward pass an input entry: a column of J each; None where it has no rule."""
    traces = _zeros(x)
    with warnings.catch_warnings(), torch.no_grad():
        # On its first use torch compiles its forward rules by torch.jit.script, which torch deprecates.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        for samples, places in _pairs(len(x), x[0].numel(), x.device, chunk):
            inputs = x[samples]
            direction = torch.zeros_like(inputs).unsqueeze(-1).flatten(1).scatter(1, places[:, None], 1)
            with forward_ad.dual_level():
                try:
                    z = encode(forward_ad.make_dual(inputs, direction.reshape(inputs.shape)))
                except NotImplementedError:  # fused attention, or a Function of the user's: the rows are as exact
                    return None
                columns = forward_ad.unpack_dual(z).tangent
            if columns is not None:
                traces.index_add_(0, samples, _squares(columns))
    return traces


def _pairs(num: int, width: int, device: torch.device, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every pair of a sample and one of its entries, as index tensors of at most ``chunk`` pairs."""
    for start in range(0, num * width, chunk):
        span = torch.arange(start, min(start + chunk, num * width), device=device)
        yield span // width, span % width


def _zeros(x: Tensor) -> Tensor:
    # In half precision a sum over thousands of entries would stand still.
    return torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _squares(rows: Tensor) -> Tensor:
    wide = rows.unsqueeze(-1).flatten(1)
    return wide.to(torch.promote_types(wide.dtype, torch.float32)).square().sum(1)


def _width(encode: Encode, x: Tensor) -> int:
    """Return the number of output entries a sample; ``ValueError`` if rows mix or nothing can be differentiated."""
    pair = x[[0, min(1, len(x) - 1)]]
    with torch.enable_grad():
        inputs = pair.requires_grad_()
        z = encode(inputs)
    if z.ndim < 1 or len(z) != 2 or not z.numel():
        raise ValueError(f"expected one row a sample, got shape {tuple(z.shape)} for 2; put the batch first")
    if not z.requires_grad:
        raise ValueError(
            "expected an output that can be differentiated in the input, got one without a gradient; take the path "
            "without detach or no_grad"
        )
    # Weights that differ: a plain sum would not move if the encoder ends in a normalisation.
    weights = torch.linspace(1, 2, z[0].numel(), dtype=z.dtype, device=z.device)
    with torch.enable_grad():
        weighted = (z[0].flatten() * weights).sum()
    (moved,) = torch.autograd.grad(weighted, inputs, allow_unused=True)
    if moved is None:
        raise ValueError("expected an output that depends on the input, got one that does not; dFIL would be 0")
    if moved[1].nan_to_num(0).any():  # nan is 0 times an infinite derivative, which is told as such later
        raise ValueError(
            "expected each row of the output to depend on its own sample, got one that depends on another's; put batch "
            "norm in evaluation mode"
        )
    return z[0].numel()


def _noise(std: float | None, laplace_scale: float | None) -> float:
    if std is None and laplace_scale is None:
        raise ValueError("expected std or laplace_scale, got neither; without noise nothing bounds the reconstruction")
    if std is not None and laplace_scale is not None:
        raise ValueError(f"expected std or laplace_scale, got both, {std} and {laplace_scale}; pass the one in use")
    noise, name = (std, "std") if std is not None else (laplace_scale, "laplace_scale")
    assert noise is not None
    if not (isfinite(noise) and noise > 0):
        raise ValueError(
            f"expected a finite {name} above 0, got {noise}; without noise nothing bounds the reconstruction"
        )
    return noise


def _check_inputs(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(
            f"expected inputs of a floating-point type, got {x.dtype}; tokens have no derivative: take their "
            "embeddings as the input"
        )
    if x.ndim < 1 or not x.numel():
        raise ValueError(f"expected samples [N, …], at least one, got shape {tuple(x.shape)}; put the batch first")
    if not torch.isfinite(x).all():
        raise ValueError(
            f"expected finite inputs, got {int((~torch.isfinite(x)).sum())} entries that are nan or inf; clean the data"
        )


def _check_dfil(dfil: Tensor) -> None:
    if not dfil.is_floating_point() or not dfil.numel() or not (dfil >= 0).all():
        raise ValueError(
            f"expected dFIL of 0 or more, at least one, got {dfil.dtype} of shape {tuple(dfil.shape)} with "
            f"{int((~(dfil >= 0)).sum())} entries that are negative or nan; pass what dfil returns"
        )
