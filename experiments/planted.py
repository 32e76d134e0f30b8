"""What an audit must tell apart: mechanisms broken on purpose, and honest ones, each in worlds that suit a fault.

Nothing here is to be used: the broken ones are those that published code is known to have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn

from privacy.dp import (
    Accounted,
    Budget,
    ClippedGaussian,
    ClippedLaplace,
    GaussianRelease,
    LaplaceRelease,
    PoissonBatches,
    PrivateLearner,
    PrivateMean,
    RandomisedResponse,
    calibrate,
)
from privacy.dp.audit import Bound, audit, audit_guard
from splitlearn import Guard, Learner, vanilla

__all__ = ["CASES", "Case"]

DELTA = 1e-5
ROWS, WIDTH = 4, 4  # of a frame
STEPS = 2  # of a training that is audited; the second one tells
COMMON = 32  # samples in both worlds of a training
TRAININGS = 1000  # draws of a world: log(1000 / 7.6) is 4.9
# Randomised response and Laplace meet their claims exactly: at 95 % each would be accused in one of 40 audits.
CONFIDENCE = 0.999
Frames = Callable[[Tensor, float], Tensor]  # frames [n, rows, width] and a noise multiplier to what is sent


@dataclass(frozen=True)
class Case:
    """A mechanism under a claim of ε; ``bound(epsilon, draws)`` audits it, at 99.9 %. ``broken``: it is false."""

    name: str
    broken: bool
    bound: Callable[[float, int], Bound]


def _honest(frames: Tensor, noise: float) -> Tensor:
    return ClippedGaussian(1.0, noise).activation(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def _half_noise(frames: Tensor, noise: float) -> Tensor:
    return _honest(frames, noise / 2)


def _batch_max(frames: Tensor, noise: float) -> Tensor:
    """Scale the noise to the largest norm in the batch, which is itself private."""
    largest = frames.norm(dim=2, keepdim=True).amax(1, keepdim=True)
    return frames + noise * 2 * largest * torch.randn_like(frames)


def _shared_noise(frames: Tensor, noise: float) -> Tensor:
    """Draw one noise row for all samples of a batch: whoever knows one of them takes it off all others."""
    return frames + noise * 2 * torch.randn(len(frames), 1, WIDTH)


def _opposite(which: int) -> Tensor:
    """One frame: the sample in question at either end of the ball, the others at its middle."""
    frame = torch.zeros(ROWS, WIDTH)
    frame[0, 0] = 1.0 if which else -1.0
    return frame


def _outlier(which: int) -> Tensor:
    """One frame of small rows, in which the sample in question is as small, or at the clip."""
    frame = torch.full((ROWS, WIDTH), 0.1)
    frame[0] = 0.5 if which else 0.1  # a norm of 1, or of 0.2
    return frame


def _frames(mechanism: Frames, world: Callable[[int], Tensor], epsilon: float, draws: int) -> Bound:
    """Audit a mechanism on frames that the attacker knows but for one row."""
    noise = calibrate(GaussianRelease, epsilon=epsilon, delta=DELTA)

    def worlds(which: int, count: int) -> Tensor:
        return mechanism(world(which).expand(count, ROWS, WIDTH), noise)

    return audit(worlds, delta=DELTA, draws=draws, confidence=CONFIDENCE)


def _guard(build: Callable[[float], ClippedGaussian | ClippedLaplace], epsilon: float, draws: int) -> Bound:
    ends = torch.zeros(2, WIDTH)
    ends[:, 0] = torch.tensor([-1.0, 1.0])
    return audit_guard(build(epsilon), ends[0], ends[1], delta=DELTA, draws=draws, confidence=CONFIDENCE)


def _gaussian(epsilon: float) -> ClippedGaussian:
    return ClippedGaussian(1.0, calibrate(GaussianRelease, epsilon=epsilon, delta=DELTA))


def _laplace(epsilon: float) -> ClippedLaplace:
    return ClippedLaplace(1.0, calibrate(LaplaceRelease, epsilon=epsilon, delta=DELTA))


def _response(epsilon: float, draws: int) -> Bound:
    guard = RandomisedResponse(epsilon, 10)
    return audit_guard(guard, torch.tensor(0), torch.tensor(1), delta=DELTA, draws=draws, confidence=CONFIDENCE)


def _accounted(epsilon: float, draws: int) -> Bound:
    """Three epochs of a guard whose noise the budget chose, seen as one observation."""
    budget = Budget(epsilon, DELTA)
    account = budget.account("server", "client", "replace one input", shaped_by=())
    noise = account.noise_for(GaussianRelease, releases=3)

    def worlds(which: int, count: int) -> Tensor:
        rows = _opposite(which)[:1].expand(count, WIDTH)
        guard: Guard = Accounted(
            ClippedGaussian(1.0, noise),
            Budget(epsilon, DELTA).account("server", "client", "replace one input", shaped_by=()),
            over=count,
        )  # fmt: skip
        return torch.stack([guard.activation(rows) for _ in range(3)], 1)

    return audit(worlds, delta=DELTA, draws=draws, confidence=CONFIDENCE)


def _training(top: str, epsilon: float, draws: int) -> Bound:
    """Audit DP-SGD on a bottom by its weights after each step; a neighbour has one sample more, made to turn the top.

    ``top``: "plain" trains on the same samples without privacy, "frozen" not at all, "private" in the same account.
    """
    noise = calibrate(GaussianRelease, epsilon=epsilon, delta=0.99 * DELTA, releases=STEPS)
    if top == "private":
        noise *= sqrt(2)  # two parties a step, which are together one release of the noise multiplier asked for
    return audit(
        partial(_trainings, top, noise), delta=DELTA, draws=min(draws, TRAININGS), confidence=CONFIDENCE,
        fitting=min(draws, TRAININGS) // 2,
    )  # fmt: skip


def _trainings(top: str, noise: float, which: int, count: int) -> Tensor:
    x = torch.tensor([[1.0, 0.0]] * COMMON + [[0.0, 50.0]] * which)
    y = torch.tensor([0] * COMMON + [1] * which)
    seeds = torch.randint(2**31, (count,)).tolist()
    return torch.stack([_one_training(top, noise, x, y, seed) for seed in seeds])


def _one_training(top: str, noise: float, x: Tensor, y: Tensor, seed: int) -> Tensor:
    below, above = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        below.weight.copy_(torch.tensor([[0.5, 0.5]]))
        above.weight.copy_(torch.tensor([[0.5], [-0.5]]))
    options = {"clip": 0.01, "noise_multiplier": noise, "expected_batch_size": COMMON, "seed": seed}
    client = PrivateLearner("client", below, torch.optim.SGD(below.parameters(), lr=1.0), **options)  # type: ignore[arg-type]
    server = _above(top, above, options)
    account = Budget().account(
        "users of the model", "client", "add or remove one sample", model="central",
        # The planted fault is that nobody asked what shapes the gradients: shaped_by=[client, server] would refuse.
        shaped_by=[client] if top == "plain" else [client, server],
    )  # fmt: skip
    private = [one for one in (client, server) if isinstance(one, PrivateLearner)]
    batches = PoissonBatches(x, y, rate=1.0, account=account, parties=private, steps=STEPS, seed=seed)
    seen = []
    for _ in range(STEPS):
        for part, labels in batches:
            vanilla(client, server, part, labels)
            seen.append(below.weight.detach().clone().flatten())
    return torch.cat(seen)


def _above(top: str, stage: nn.Module, options: dict[str, float | int]) -> Learner:
    if top == "private":
        return PrivateLearner("server", stage, torch.optim.SGD(stage.parameters(), lr=1.0), **options)  # type: ignore[arg-type]
    from privacy.dp import PaddedCrossEntropy

    optimizer = torch.optim.SGD(stage.parameters(), lr=10.0) if top == "plain" else None
    return Learner("server", stage, optimizer, loss=PaddedCrossEntropy(COMMON))


def _user_level(epsilon: float, draws: int) -> Bound:
    """One average of a member's weights that is there, far away, or is not."""
    noise = calibrate(GaussianRelease, epsilon=epsilon, delta=DELTA)

    def worlds(which: int, count: int) -> Tensor:
        account = Budget().account("members", "any client", "add or remove one client", model="central")
        aggregate = PrivateMean(1.0, noise, 2.0, account)
        start = {"w": torch.zeros(2)}
        weights = [{"w": torch.zeros(2)}, {"w": torch.tensor([100.0, 0.0])}][: 1 + which]
        return torch.stack([aggregate(weights, [1] * len(weights), start)["w"] for _ in range(count)])

    return audit(worlds, delta=DELTA, draws=min(draws, 20_000), confidence=CONFIDENCE, fitting=2_000)


CASES: tuple[Case, ...] = (
    Case("half the noise", True, partial(_frames, _half_noise, _opposite)),
    Case("noise scaled to the batch's largest norm", True, partial(_frames, _batch_max, _outlier)),
    Case("one noise tensor for different samples", True, partial(_frames, _shared_noise, _opposite)),
    Case("DP-SGD below a top that trains without privacy", True, partial(_training, "plain")),
    Case("Gaussian, one input at either end", False, partial(_frames, _honest, _opposite)),
    Case("Gaussian, an outlier in the batch", False, partial(_frames, _honest, _outlier)),
    Case("Gaussian, exact likelihood ratio", False, partial(_guard, _gaussian)),
    Case("Gaussian, three epochs in one account", False, _accounted),
    Case("Laplace, exact likelihood ratio", False, partial(_guard, _laplace)),
    Case("randomised response", False, _response),
    Case("DP-SGD below a frozen top", False, partial(_training, "frozen")),
    Case("DP-SGD on both stages in one account", False, partial(_training, "private")),
    Case("user-level average", False, _user_level),
)
