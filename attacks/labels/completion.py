"""Model completion: the party without labels puts a head on its own trained bottom and learns it from a few labels.

Fu, Zhang, Ji, Chen, Wu, Guo, Zhou, Liu and Wang 2022, "Label inference attacks against vertical federated learning"
(USENIX Security): the passive attack fine-tunes bottom and head by MixMatch (Berthelot et al. 2019, arXiv:1905.02249);
in the active one the party trains its bottom by a malicious local optimizer, so that the top comes to rely on it.
Deviations:

- hundreds of steps in place of ten thousands; the average of the weights is of the last steps at first: its decay is
  min(.999, (1 + t) / (10 + t));
- no weight decay, and one pass for all of a batch's mixed parts;
- augmentation by small shifts and noise, in place of flips and crops;
- ratios of gradients where the one before is 0 count as 0, and the gradients are those before momentum, unscaled.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad

from attacks.inversion.reconstruction import seeded
from attacks.labels.guess import LabelGuess
from attacks.labels.rows import hinted
from splitlearn import View

__all__ = ["HintedHead", "MaliciousOptimizer", "ModelCompletion", "augmented", "mixed_up"]

SHIFT = 1  # greatest shift of an image or a signal, in pixels or samples
NOISE = 0.05  # standard deviation of what is added, in units of each feature's
DROPPED = 0.1  # share of a table's columns that are set to their mean
SLOWEST = 0.999  # decay of the average of the weights


@dataclass(frozen=True)
class HintedHead:
    """Party without labels that learns a head on its bottom as it is, from the known labels alone. Labels, [N].

    The baseline of ``ModelCompletion``: it makes nothing of the unlabelled inputs. ``head`` builds it, from the
    bottom's output to ``classes`` logits; by default one linear layer.
    """

    classes: int
    head: Callable[[], nn.Module] | None = None
    steps: int = 300
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.classes, self.steps, self.lr)

    def __call__(self, view: View) -> LabelGuess:
        """Return the labels of all own inputs, in order; ``LookupError`` without own inputs or hints."""
        x, stage = view.own_x, view.encoder.stage
        known, labels = hinted(view, x)
        with seeded(self.seed, x.device):
            with torch.no_grad():
                z, every = stage(known), torch.cat([stage(part) for part in x.split(256)])
            head = _head(self.head, z, self.classes)
            adam = torch.optim.Adam(head.parameters(), self.lr)
            for _ in range(self.steps):
                adam.zero_grad()
                cross_entropy(head(z), labels).backward()
                adam.step()
        with torch.no_grad():
            return _guess(head.eval()(every))


@dataclass(frozen=True)
class ModelCompletion:
    """Honest but curious party without labels that completes its own bottom. Returns the labels of its inputs, [N].

    It knows some labels (hints; four of each class in the paper's setting of 40) and all its inputs, holds its bottom,
    and reads nothing of the wire: protections of gradients reach it only through what the bottom learned. What it finds
    is not all leaked: where a few labels suffice to learn the task, it finds as much without what training told. Score
    it beside the same attack with ``bottom``, which builds a bottom that was not trained, in place of its own: on
    digits that one reaches .90 to .96 too, while a ``HintedHead`` gains .2 at a late cut from what was learned.

    ``head`` builds the head, from the bottom's output to ``classes`` logits; by default one linear layer. ``augment``
    makes another version of inputs [n, …]. ``temperature`` sharpens guesses, ``alpha`` is mixup's, ``unlabelled`` the
    weight of the unlabelled loss at the end of its ramp. Inputs must be numbers: tokens cannot be mixed.
    """

    classes: int
    head: Callable[[], nn.Module] | None = None
    bottom: Callable[[], nn.Module] | None = None
    augment: Callable[[Tensor], Tensor] | None = None
    steps: int = 300
    batch_size: int = 32
    lr: float = 2e-3
    versions: int = 2
    temperature: float = 0.8
    alpha: float = 0.75
    unlabelled: float = 50.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.classes, self.steps, self.lr)
        if min(self.batch_size, self.versions) < 1 or not min(self.temperature, self.alpha) > 0 or self.unlabelled < 0:
            raise ValueError(
                f"expected a batch size and versions of 1 or more, got {self.batch_size} and {self.versions}, a "
                f"temperature and an alpha above 0, got {self.temperature} and {self.alpha}, and an unlabelled weight "
                f"of 0 or more, got {self.unlabelled}"
            )

    def __call__(self, view: View) -> LabelGuess:
        """Return the labels of all own inputs, in order; ``LookupError`` without own inputs or hints.

        ``evidence`` holds the share on which a head learned from hints alone (``HintedHead``) agrees, and the loss.
        """
        x, stage = view.own_x, view.encoder.stage
        known, labels = hinted(view, x)
        if not x.is_floating_point():
            raise ValueError(f"expected inputs that are numbers, got {x.dtype}; MixMatch mixes inputs, not tokens")
        with seeded(self.seed, x.device):
            bottom = copy.deepcopy(stage) if self.bottom is None else self.bottom().to(x)
            bottom.requires_grad_()
            with torch.no_grad():
                z = bottom(known)
            model = nn.Sequential(bottom, _head(self.head, z, self.classes))
            average, loss = self._completed(model, x, known, one_hot(labels, self.classes).to(x))
            with torch.no_grad():
                found = _guess(torch.cat([average(part) for part in x.split(256)]))
        alone = HintedHead(self.classes, self.head, seed=self.seed)(view)
        evidence = {"agreement": _agreement(alone.labels, found.labels), "loss_last": loss}
        return LabelGuess(found.labels, found.scores, evidence=evidence)

    def _completed(self, model: nn.Module, x: Tensor, known: Tensor, labels: Tensor) -> tuple[nn.Module, float]:
        """Return the average of the models that MixMatch went through, in evaluation mode, and the last loss."""
        augment = self.augment if self.augment is not None else lambda part: augmented(part, x)
        average = copy.deepcopy(model).eval().requires_grad_(False)
        adam = torch.optim.Adam(model.parameters(), self.lr)
        loss = torch.zeros(())
        for step in range(self.steps):
            model.train()
            rows = torch.randint(len(known), (self.batch_size,), device=x.device)
            others = x[torch.randint(len(x), (self.batch_size,), device=x.device)]
            versions = torch.cat([augment(others) for _ in range(self.versions)])
            with torch.no_grad():
                shares = model(versions).softmax(1).unflatten(0, (self.versions, -1)).mean(0)
                sharp = shares ** (1 / self.temperature)
                guessed = (sharp / sharp.sum(1, keepdim=True)).repeat(self.versions, 1)
            inputs, targets = torch.cat([augment(known[rows]), versions]), torch.cat([labels[rows], guessed])
            mixed, aims = mixed_up(inputs, targets, self.alpha)
            logits = model(mixed)
            told, n = logits.log_softmax(1), self.batch_size
            supervised = -(aims[:n] * told[:n]).sum(1).mean()
            consistent = (told[n:].exp() - aims[n:]).square().mean()
            loss = supervised + self.unlabelled * (step + 1) / self.steps * consistent
            adam.zero_grad()
            loss.backward()
            adam.step()
            _averaged(average, model, min(SLOWEST, (1 + step) / (10 + step)))
        return average, loss.item()


class MaliciousOptimizer(torch.optim.Optimizer):
    """A malicious client's optimizer: ``inner``, with each entry of the gradient scaled up where it keeps its sign.

    The factor is clip(1 + γ · g_t / g_{t−1}, ``lowest``, ``highest``), entry by entry. The bottom so learns faster than
    the others', and the top comes to rely on it. It is passed to the client's own ``Learner`` and changes nothing on
    the wire but what is learned; ``inner`` was built over the same parameters, and gains where its step grows with the
    gradient (SGD): Adam divides the factor out again.

    What it brings, on digits cut late with one client, two epochs of SGD and eight seeds: a ``HintedHead`` gains .04 to
    .05 in the mean (seven seeds of eight); ``ModelCompletion``, which fits the bottom anew, gains nothing (−.004 and
    .001, standard errors .003 and .005), unlike in the paper, where several parties compete for the top.
    """

    def __init__(self, inner: torch.optim.Optimizer, *, gamma: float = 1.0, lowest: float = 1.0, highest: float = 5.0):
        if not (gamma >= 0 and 0 < lowest <= highest):
            raise ValueError(
                f"expected gamma of 0 or more and bounds 0 < lowest ≤ highest, got {gamma}, {lowest} and {highest}"
            )
        super().__init__([parameter for group in inner.param_groups for parameter in group["params"]], {})
        self.inner, self.gamma, self.lowest, self.highest = inner, gamma, lowest, highest
        self.param_groups = inner.param_groups  # one and the same: schedulers set its learning rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients, and let the inner optimizer step; closures are not supported (``ValueError``)."""
        if closure is not None:
            raise ValueError("expected no closure, got one; gradients are scaled once a step")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                g, before = parameter.grad, self.state[parameter].get("before")
                self.state[parameter]["before"] = g.clone()
                if before is not None:
                    ratio = torch.where(before == 0, torch.zeros_like(g), g / before)
                    parameter.grad = g * (1 + self.gamma * ratio).clamp(self.lowest, self.highest)
        return self.inner.step()

    def __getstate__(self) -> dict[str, Any]:
        own = ("inner", "gamma", "lowest", "highest")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def state_dict(self) -> dict[str, Any]:
        """Return the last gradients and the inner optimizer's state."""
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups


def augmented(part: Tensor, x: Tensor) -> Tensor:
    """Return another version of inputs [n, …]: images and signals shifted and noised, tables noised, columns dropped.

    Noise is in units of the standard deviation of all inputs ``x`` [N, …]. A shift is by at most one place along each
    axis, and fills up with zeros.
    """
    spread = x.std(0) if part.ndim == 2 else x.std()
    noised = part + NOISE * spread * torch.randn_like(part)
    if part.ndim == 2:
        dropped = torch.rand(part.shape, device=part.device) < DROPPED
        return torch.where(dropped, x.mean(0).expand_as(part), noised)
    if part.ndim < 3:
        return noised
    return torch.stack([_shifted(one) for one in noised])


def mixed_up(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return inputs [n, …] and label shares [n, C] each mixed with another's, its own part being the greater.

    The parts are drawn from Beta(α, α), one a sample (Zhang et al. 2018, arXiv:1710.09412).
    """
    concentration = torch.full((len(x),), alpha)
    own = torch.distributions.Beta(concentration, concentration).sample().to(x)
    own = torch.maximum(own, 1 - own)
    other = torch.randperm(len(x), device=x.device)
    wide = own.reshape(-1, *[1] * (x.ndim - 1))
    return wide * x + (1 - wide) * x[other], own[:, None] * y + (1 - own[:, None]) * y[other]


def _shifted(one: Tensor) -> Tensor:
    axes = one.ndim - 1  # [C, H, W] or [C, L]
    by = torch.randint(0, 2 * SHIFT + 1, (axes,)).tolist()
    padded = pad(one, [SHIFT] * (2 * axes))
    for axis, start in enumerate(by, start=1):
        padded = padded.narrow(axis, start, one.shape[axis])
    return padded


def _averaged(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for mean, now in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)


def _head(build: Callable[[], nn.Module] | None, z: Tensor, classes: int) -> nn.Module:
    head = build() if build is not None else nn.Sequential(nn.Flatten(), nn.Linear(z.flatten(1).shape[1], classes))
    return head.to(z)


def _guess(logits: Tensor) -> LabelGuess:
    scores = logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else None
    return LabelGuess(logits.argmax(1), scores)


def _agreement(one: Tensor | None, other: Tensor | None) -> float:
    assert one is not None
    assert other is not None
    return one.eq(other).double().mean().item()


def _check(classes: int, steps: int, lr: float) -> None:
    if classes < 2 or steps < 1 or not lr > 0:
        raise ValueError(
            f"expected two classes or more, a step at least and a learning rate above 0, got {classes}, {steps}, {lr}"
        )
