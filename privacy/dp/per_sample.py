"""Per-sample gradients of one stage, clipped and summed: Opacus' hooks and optimizer, watched over.

Hooks sit on the plain stage, whose weights keep their names, and work only while a party trains. What Opacus would let
pass is refused here: layers that mix samples, weights used past their layers, parameters that nobody clips.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from privacy.dp.shapers import mixes
from privacy.extra import load

__all__ = ["PerSample"]

SMALLEST = 1e-18  # a gradient's norm below which its square is nothing in single precision


class PerSample:
    """The stage of ``name`` under per-sample clipping; ``optimizer`` is Opacus' around the one given.

    ``watched()`` is for the forward pass, ``sum(x, output, rows)`` clips and adds up, ``step(last=…)`` makes the noised
    step at the end of a batch. ``ghost`` finds the factors first and the clipped sum in a second pass.
    """

    def __init__(
        self,
        name: str,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        noise_multiplier: float,
        expected_batch_size: float,
        ghost: bool,
    ):
        _check_stage(name, stage)
        if optimizer is None or not any(parameter.requires_grad for parameter in stage.parameters()):
            raise ValueError(
                f"{name}: expected something to train, got no optimizer or frozen parameters; use a Learner"
            )
        _check_all_held(name, stage, optimizer)
        self.name, self.stage, self.ghost = name, stage, ghost
        self._hooks, self.optimizer = _private(stage, optimizer, clip, noise_multiplier, expected_batch_size, ghost)
        self._trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
        self._proved = False  # whether one sample was followed through the stage

    @property
    def summing(self) -> bool:
        """Whether a batch has begun that has not come to its end."""
        return bool(self.optimizer._is_last_step_skipped)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let the hooks see a pass through the stage."""
        self._hooks.enable_hooks()
        try:
            yield
        finally:
            self._hooks.disable_hooks()

    def check_trained(self) -> None:
        """Raise ``ValueError`` where other parameters train than those that are clipped."""
        now = {name for name, parameter in self.stage.named_parameters() if parameter.requires_grad}
        if now != self._trained:
            raise ValueError(
                f"{self.name}: expected the same trainable parameters as when this party was made, got "
                f"{', '.join(sorted(now ^ self._trained))} frozen or unfrozen since, which nobody would clip; build a "
                "PrivateLearner anew"
            )

    def sum(self, x: Tensor, output: Tensor, rows: Tensor) -> None:
        """Leave what the optimizer sums up: per-sample gradients, or with ``ghost`` their clipped sum.

        ``rows`` are each sample's own gradient in ``output``, which the stage made of ``x``.
        """
        self.optimizer.zero_grad()
        for layer in self.stage.modules() if self.ghost else ():  # Opacus' norms take views of what it kept
            kept = layer.__dict__.get("activations", [])
            kept[:] = [[tensor.contiguous() for tensor in inputs] for inputs in kept]
        with warnings.catch_warnings():  # tokens have no gradient, which torch says at the first layer
            warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed")
            with self.watched():
                output.backward(rows, retain_graph=self.ghost or not self._proved)
            self._check_rows(len(rows))
            # After the pass that counts: a layer whose gradient crosses a wire has it then, and asks for it once.
            alone = None if self._proved else self._alone(x, output, rows)
            if alone is not None:
                self._prove(rows, *alone)
            if self.ghost:
                self._ghost(output, rows)

    def step(self, *, last: bool) -> None:
        """Take in what ``sum`` left; at the ``last`` part of a batch add noise and update."""
        # Not signal_skip_step, whose queue would keep the word for a step that failed.
        self.optimizer._step_skip_queue = [not last]
        self.optimizer.step()
        self.optimizer.zero_grad()  # keeps the sum of a batch that has not ended

    def drop(self) -> None:
        """Drop the sum of a batch that did not come to its end."""
        self.optimizer._is_last_step_skipped = False
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Drop what the hooks kept of a step that was given up."""
        for layer in self.stage.modules():
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)
        for parameter in self.stage.parameters():
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.grad_sample = None  # type: ignore[attr-defined]
            for kept in ("_current_grad_sample", "_norm_sample"):
                parameter.__dict__.pop(kept, None)

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
        return (at, norm) if norm > SMALLEST else None

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
    # Opacus looks at layers with parameters alone.
    errors: list[Any] = [
        f"batch norm {title!r} goes by the batch: use group norm" for title, one in stage.named_modules() if mixes(one)
    ]
    errors += load("opacus.validators").ModuleValidator.validate(stage, strict=False)
    if errors:
        told = " ".join(str(errors[0]).split())
        raise ValueError(
            f"{name}: expected layers that treat each sample on its own, which ε for one sample rests on; {told}"
        )
