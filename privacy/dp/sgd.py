"""DP-SGD on one party's stage, driven across the cut (Abadi et al. 2016, arXiv:1607.00133; per-sample part by Opacus).

The gradient at the cut has one row a sample, so that a party turns it into per-sample gradients of its own parameters
without help from the party above: dL_i/dθ = (dz_i/dθ)ᵀ · g_i. It clips each sample's, adds them up, and adds noise.

Several parties that train on the same Poisson batches clip each for itself: that is per-layer clipping (McMahan et al.
2018, arXiv:1710.06963), and their steps are together one Gaussian release of noise multiplier (Σ 1/m²)^(−1/2); see
``PoissonBatches``, which enters it.
"""

import secrets
from collections import deque
from collections.abc import Mapping
from math import isfinite
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from privacy.dp.clipping import check_clip
from privacy.dp.per_sample import PerSample
from privacy.dp.poisson import PaddedCrossEntropy
from splitlearn.party import Guard, Learner, Loss

__all__ = ["PrivateLearner"]


@runtime_checkable
class PassesOn(Protocol):
    """A layer whose weights are held elsewhere: what a noised step has made of its parameters here goes there."""

    def pass_on(self) -> None:
        """Send the step; the parameters are then 0 again."""


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
    Noise comes from the
    party's own generator, which is not cryptographic and starts from ``seed`` and name: without a seed it is drawn by
    chance, as it must be outside of experiments. It is floating-point, whose lowest bits are no part of the proof
    (Mironov 2012).
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
        seed: int | None = None,
    ):
        check_clip(clip, "L2")
        if not (isfinite(noise_multiplier) and noise_multiplier > 0 and expected_batch_size > 0):
            raise ValueError(
                f"{name}: expected a finite noise multiplier and an expected batch size above 0, got "
                f"{noise_multiplier} and {expected_batch_size}; without noise use a Learner"
            )
        samples = PerSample(
            name, stage, optimizer, clip=clip, noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size, ghost=ghost,
        )  # fmt: skip
        seed = secrets.randbits(48) if seed is None else seed
        super().__init__(
            name, stage, samples.optimizer, guard, loss=loss or PaddedCrossEntropy(expected_batch_size), seed=seed
        )  # fmt: skip
        if self.guard.penalises:
            raise ValueError(
                f"{name}: expected a guard without a penalty, got {self.guard!r}: a penalty over the batch has no "
                "per-sample gradient to clip"
            )
        self.clip, self.noise_multiplier, self.ghost = clip, noise_multiplier, ghost
        self.expected_batch_size = float(expected_batch_size)
        self._samples = samples
        # Of the part that PoissonBatches has entered and handed out: is it a batch's last? Sessions share it.
        self._allowed: deque[tuple[bool, int | None]] = deque(maxlen=1)
        self._passed: tuple[Tensor, Tensor] | None = None  # input and output of the stage in the open step

    def allow(self, *, first: bool = True, last: bool, rows: int | None = None) -> None:
        """Let the next batch, of ``rows`` rows, train this party: the ``first`` part of a Poisson batch, the ``last``.

        At the last one the noised step is made. At the first one whatever is left of an unfinished batch is dropped:
        two batches under one draw of noise would count a sample twice that is in both.
        """
        if first:
            self._drop()
        self._allowed.append((last, rows))

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
        if self._allowed or self._samples.summing:
            raise ValueError(
                f"{self.name}: expected the end of a Poisson batch, got one that is still under way; finish it first"
            )
        return super().state_dict()

    def _load_training(self, state: Mapping[str, Any]) -> None:
        """Take over the training state; a Poisson batch that was under way is void."""
        super()._load_training(state)
        self._drop()
        self._forget()

    def _output(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super()._output(x)
        self._forget()
        # An input that asks for a gradient, so that the first layer's backward hook has one to see.
        x = x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_()
        with self._samples.watched():
            output = super()._output(x)
        self._passed = (x, output)
        return output

    def _step(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        """Clip each sample's gradient and add it up; at the end of a Poisson batch add noise and update."""
        if not self._allowed:
            raise ValueError(
                f"{self.name}: expected a batch of PoissonBatches(…, parties=[…]) with this party among them, got one "
                "from elsewhere: DP-SGD's ε holds for samples drawn by chance and in secret, and for no other loader"
            )
        self._samples.check_trained()
        assert self._passed is not None
        x, output = self._passed
        last, rows = self._allowed.popleft()
        if rows is not None and len(output) != rows:
            raise ValueError(
                f"{self.name}: expected the {rows} rows that PoissonBatches handed out, got {len(output)}; train on "
                "its batches as they come"
            )
        # The gradient in the stage's own output: past the guard, or from the loss.
        (g,) = torch.autograd.grad(outputs, [output], gradients)
        self._samples.sum(x, output, g * self.expected_batch_size)  # each sample's own, not its share of the mean
        self._samples.step(last=last)
        for layer in self.stage.modules() if last else ():
            if isinstance(layer, PassesOn):
                layer.pass_on()
        if x.grad is not None:
            x.grad /= self.expected_batch_size
        self._passed = None
        self.steps += last

    def _drop(self) -> None:
        """Drop what is left of a Poisson batch that did not come to its end: permission and sum."""
        self._allowed.clear()
        self._samples.drop()

    def _forget(self) -> None:
        """Drop what is kept of a step that was given up."""
        self._passed = None
        self._samples.forget()
