"""DP-SGD on one party's stage, driven across the cut (Abadi et al. 2016, arXiv:1607.00133; per-sample part by Opacus).

The gradient at the cut has one row a sample, so that a party turns it into per-sample gradients of its own parameters
without help from the party above: dL_i/dθ = (dz_i/dθ)ᵀ · g_i. It clips each sample's, adds them up, and adds noise.

Several parties that train on the same Poisson batches clip each for itself: that is per-layer clipping (McMahan et al.
2018, arXiv:1710.06963), and their steps are together one Gaussian release of noise multiplier (Σ 1/m²)^(−1/2); see
``PoissonBatches``, which enters it.
"""

import warnings
from collections import deque
from collections.abc import Mapping
from math import isfinite
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from privacy.dp.clipping import check_clip
from privacy.dp.extra import load
from privacy.dp.poisson import PaddedCrossEntropy
from splitlearn.party import Guard, Learner, Loss

__all__ = ["PrivateLearner"]


class PrivateLearner(Learner):
    """An honest party whose updates are differentially private: per-sample gradients clipped, summed, noised.

    - Adjacency: one sample is added or removed.
    - Sensitivity: ``clip`` in L2, of the sum of clipped per-sample gradients of all parameters of this stage.
    - Noise: N(0, (``noise_multiplier`` · ``clip``)²) on every entry of that sum, once a step; the sum is then divided
      by ``expected_batch_size``, which is public.
    - Protects: what this party's weights, after any number of steps, tell of one sample, from whoever receives them (a
      fed server, other clients, users of the model).
    - Does not protect: the activations that this party sends, the gradients that it returns, its labels, or the loss
      that it reports. Nor anything at all while another stage trains on the same samples without privacy: a changed
      sample changes that stage, and with it every sample's gradient. ``Budget.account(shaped_by=…)`` asks for it.

    Steps are made on batches of ``PoissonBatches`` only, which enters each into its account and allows it; any other
    batch is refused, since amplification by sampling holds for nothing else. ``loss`` and the loss of whichever party
    is above divide by ``expected_batch_size`` (``PaddedCrossEntropy``): one that divides by how many samples there
    really are changes every sample's gradient when one is added, and voids ε.

    ``ghost`` finds the clipping factors first and the clipped sum in a second pass, without keeping all per-sample
    gradients (Li et al. 2022, arXiv:2110.05679): the same sum in less memory.

    Batch norm and whatever else mixes samples is refused: torch's layers when the party is made, others at its first
    step, by what one sample of that batch does. So are penalties. What is trainable is settled when the party is made.
    Noise comes from the party's own generator, which is not cryptographic and starts from ``seed`` and name: keep the
    seed secret outside of experiments. It is floating-point, whose lowest bits are no part of the proof (Mironov 2012).
    """

    trains_privately = True

    def __init__(
        self,
        name: str,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer,
        guard: Guard | None = None,
        *,
        clip: float,
        noise_multiplier: float,
        expected_batch_size: float,
        ghost: bool = False,
        loss: Loss | None = None,
        seed: int = 0,
    ):
        check_clip(clip, "L2")
        if not (isfinite(noise_multiplier) and noise_multiplier > 0 and expected_batch_size > 0):
            raise ValueError(
                f"{name}: expected a finite noise multiplier and an expected batch size above 0, got "
                f"{noise_multiplier} and {expected_batch_size}; without noise use a Learner"
            )
        _check_stage(name, stage)
        if optimizer is None or not any(parameter.requires_grad for parameter in stage.parameters()):
            raise ValueError(
                f"{name}: expected something to train, got no optimizer or frozen parameters; use a Learner"
            )
        _check_all_held(name, stage, optimizer)
        hooks, wrapped = _private(stage, optimizer, clip, noise_multiplier, expected_batch_size, ghost)
        super().__init__(
            name, stage, wrapped, guard, loss=loss or PaddedCrossEntropy(expected_batch_size), seed=seed
        )  # fmt: skip
        if self.guard.penalises:
            raise ValueError(
                f"{name}: expected a guard without a penalty, got {self.guard!r}: a penalty over the batch has no "
                "per-sample gradient to clip"
            )
        self.clip, self.noise_multiplier, self.ghost = clip, noise_multiplier, ghost
        self.expected_batch_size = float(expected_batch_size)
        self._hooks = hooks
        self._trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
        # Of the part that PoissonBatches has entered and handed out: is it a batch's last? Sessions share it.
        self._allowed: deque[bool] = deque(maxlen=1)
        self._passed: tuple[Tensor, Tensor] | None = None  # input and output of the stage in the open step
        self._proved = False  # whether one sample was followed through the stage

    def allow(self, *, first: bool = True, last: bool) -> None:
        """Let the next batch train this party: the ``first`` part of a Poisson batch, or the ``last``, or both.

        At the last one the noised step is made. At the first one whatever is left of an unfinished batch is dropped:
        two batches under one draw of noise would count a sample twice that is in both.
        """
        if first:
            self._drop()
        self._allowed.append(last)

    def replica(self, name: str) -> Self:
        """Refuse: a copy would release under noise of its own, which no account knows of."""
        raise ValueError(
            f"{self.name}: expected one account for each private party, got a replica; build a PrivateLearner for each"
        )

    def abandon(self) -> None:
        """Give up the open step; the batch that it was for stays entered as released, and trains nothing more."""
        if self._turn.keep(self) or not self._turn.taken:  # never the step of another session of this stage
            self._forget()
            self._allowed.clear()
        super().abandon()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on; never in the middle of a Poisson batch."""
        if self._allowed or self._summing:
            raise ValueError(
                f"{self.name}: expected the end of a Poisson batch, got one that is still under way; finish it first"
            )
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; a Poisson batch that was under way is void."""
        super().load_state_dict(state)
        self._drop()
        self._forget()

    @property
    def _summing(self) -> bool:
        return bool(self.optimizer._is_last_step_skipped)  # type: ignore[union-attr]

    def _output(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super()._output(x)
        self._forget()
        self._hooks.enable_hooks()
        try:
            # An input that asks for a gradient, so that the first layer's backward hook has one to see.
            x = x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_()
            output = super()._output(x)
        finally:
            self._hooks.disable_hooks()
        self._passed = (x, output)
        return output

    def _step(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        """Clip each sample's gradient and add it up; at the end of a Poisson batch add noise and update."""
        if not self._allowed:
            raise ValueError(
                f"{self.name}: expected a batch of PoissonBatches(…, parties=[…]) with this party among them, got one "
                "from elsewhere: DP-SGD's ε holds for samples drawn by chance and in secret, and for no other loader"
            )
        now = {name for name, parameter in self.stage.named_parameters() if parameter.requires_grad}
        if now != self._trained:
            raise ValueError(
                f"{self.name}: expected the same trainable parameters as when this party was made, got "
                f"{', '.join(sorted(now ^ self._trained))} frozen or unfrozen since, which nobody would clip; build a "
                "PrivateLearner anew"
            )
        assert self._passed is not None
        assert self.optimizer is not None
        x, output = self._passed
        last = self._allowed.popleft()
        self.optimizer.zero_grad()
        # The gradient in the stage's own output: past the guard, or from the loss.
        (g,) = torch.autograd.grad(outputs, [output], gradients)
        rows = g * self.expected_batch_size  # each sample's own, not its share of the mean
        with warnings.catch_warnings():  # tokens have no gradient, which torch says at the first layer
            warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed")
            self._clip(x, output, rows)
        # Not signal_skip_step, whose queue would keep the word for a step that failed.
        self.optimizer._step_skip_queue = [not last]  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()  # keeps the sum of a batch that has not ended
        if x.grad is not None:
            x.grad /= self.expected_batch_size
        self._passed = None
        self.steps += last

    def _clip(self, x: Tensor, output: Tensor, rows: Tensor) -> None:
        """Leave what the optimizer sums up: per-sample gradients, or with ``ghost`` their clipped sum."""
        alone = None if self._proved else self._alone(x, output, rows)
        for layer in self.stage.modules() if self.ghost else ():  # Opacus' norms take views of what it kept
            kept = layer.__dict__.get("activations", [])
            kept[:] = [[tensor.contiguous() for tensor in inputs] for inputs in kept]
        self._hooks.enable_hooks()
        try:
            output.backward(rows, retain_graph=self.ghost)
        finally:
            self._hooks.disable_hooks()
        self._check_rows(len(rows))
        if alone is not None:
            self._prove(rows, *alone)
        if self.ghost:
            self._ghost(output, rows)

    def _ghost(self, output: Tensor, rows: Tensor) -> None:
        """Leave in each parameter's gradient the sum of clipped per-sample gradients, without keeping them all."""
        factors = self._hooks.get_clipping_coef()
        parameters = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
        scaled = rows * factors.reshape(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)
        for parameter, summed in zip(parameters, torch.autograd.grad(output, parameters, scaled), strict=True):
            parameter.grad = summed

    def _check_rows(self, count: int) -> None:
        """Raise ``ValueError`` where a parameter's per-sample gradients, or their norms, are not one a sample."""
        kind = "_norm_sample" if self.ghost else "grad_sample"
        for name, parameter in self.stage.named_parameters():
            if not parameter.requires_grad:
                continue
            found = getattr(parameter, kind, None)
            if not isinstance(found, Tensor) or len(found) != count:
                rows = f"{len(found)}" if isinstance(found, Tensor) else "none"
                raise ValueError(
                    f"{self.name}: expected {count} per-sample gradients of {name!r}, one a sample, got {rows}; give "
                    "its layer inputs whose first dimension is the sample (no flatten(0, 1)), use it in every pass, "
                    "and without ghost=True if its inputs have more than 3 dimensions"
                )

    def _alone(self, x: Tensor, output: Tensor, rows: Tensor) -> tuple[int, float] | None:
        """Return the number of a sample and the norm of its gradient, by torch; ``ValueError`` where it moves others.

        None where no sample has a gradient.
        """
        if not rows.any():
            return None
        at = int(rows.reshape(len(rows), -1).norm(dim=1).argmax())
        one = torch.zeros_like(rows)
        one[at] = rows[at]
        trained = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
        inputs = [x] if x.requires_grad else []
        found = torch.autograd.grad(output, [*trained, *inputs], one, retain_graph=True, allow_unused=True)
        if inputs and found[-1] is not None:
            moved = found[-1].reshape(len(rows), -1).abs().amax(1)
            if moved.sum() - moved[at] > 1e-6 * moved[at]:
                raise ValueError(
                    f"{self.name}: expected layers that treat each sample on its own, which ε for one sample rests on, "
                    "got an output that depends on other samples of its batch; leave out what mixes them"
                )
        norm = float(torch.stack([g.double().norm() for g in found[: len(trained)] if g is not None]).norm())
        return (at, norm) if norm else None

    def _prove(self, rows: Tensor, at: int, norm: float) -> None:
        """Raise ``ValueError`` where the gradient that is clipped for a sample is not all of its gradient."""
        if self.ghost:
            clipped = float(self._hooks.get_norm_sample()[at])
        else:
            samples = [p.grad_sample[at].double().norm() for p in self.stage.parameters() if p.requires_grad]  # type: ignore[attr-defined]
            clipped = float(torch.stack(samples).norm())
        if abs(clipped - norm) > max(1e-3, 3 * torch.finfo(rows.dtype).eps ** 0.5) * norm:  # what rounding makes
            raise ValueError(
                f"{self.name}: expected a gradient of norm {norm:.4g} to clip for a sample, got {clipped:.4g}; use "
                "weights only by calling the layer that they belong to (no h @ layer.weight)"
            )
        self._proved = True

    def _drop(self) -> None:
        """Drop what is left of a Poisson batch that did not come to its end: permission and sum."""
        self._allowed.clear()
        self.optimizer._is_last_step_skipped = False  # type: ignore[union-attr]
        self.optimizer.zero_grad()  # type: ignore[union-attr]

    def _forget(self) -> None:
        """Drop what the hooks kept of a step that was given up."""
        self._passed = None
        for layer in self.stage.modules():
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)
        for parameter in self.stage.parameters():
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.grad_sample = None  # type: ignore[attr-defined]
            for kept in ("_current_grad_sample", "_norm_sample"):
                parameter.__dict__.pop(kept, None)


def _private(
    stage: nn.Module, optimizer: torch.optim.Optimizer, clip: float, noise: float, expected: float, ghost: bool
) -> tuple[Any, Any]:
    """Return Opacus' hooks on the stage, switched off, and its optimizer around ``optimizer``."""
    if ghost:
        from_module = load("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")
        hooks = from_module.GradSampleHooksFastGradientClipping(stage, loss_reduction="sum", max_grad_norm=clip)
        kind = load("opacus.optimizers.optimizer_fast_gradient_clipping").DPOptimizerFastGradientClipping
    else:
        hooks = load("opacus.grad_sample.grad_sample_module").GradSampleHooks(stage, loss_reduction="sum")
        kind = load("opacus.optimizers.optimizer").DPOptimizer
    hooks.disable_hooks()
    # "mean": the noised sum is divided by the expected batch size, and by nothing that depends on the data.
    wrapped = kind(optimizer, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=expected)
    return hooks, wrapped


def _check_all_held(name: str, stage: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ValueError`` for trainable parameters that the optimizer does not hold."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [title for title, one in stage.named_parameters() if one.requires_grad and id(one) not in held]
    if left:
        raise ValueError(
            f"{name}: expected an optimizer of all trainable parameters of its stage, which are clipped together, got "
            f"none for {', '.join(left)}; freeze them with requires_grad_(False), or hand them to it"
        )


def _check_stage(name: str, stage: nn.Module) -> None:
    """Raise ``ValueError`` for layers that mix samples or keep what they saw of them."""
    errors = load("opacus.validators").ModuleValidator.validate(stage, strict=False)
    # Opacus looks at layers with parameters alone.
    errors += [f"BatchNorm {title!r} goes by the batch" for title, one in stage.named_modules() if _mixes(one)]
    if errors:
        told = " ".join(str(errors[0]).split())
        raise ValueError(
            f"{name}: expected layers that treat each sample on its own, which ε for one sample rests on; {told}"
        )


def _mixes(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)
