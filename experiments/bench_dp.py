"""What DP costs in time, and whether the audit of a claimed ε convicts and acquits as it should."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiments.planted import CASES, DELTA
from experiments.timing import median_ratio, paired_seconds
from privacy.dp import ClippedGaussian, GaussianRelease, PaddedCrossEntropy, PrivateLearner, calibrate
from privacy.dp.audit import audit_guard
from splitlearn.cut import cut
from splitlearn.models import digits_cnn
from splitlearn.party import Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.wire import Framed, serve

__all__ = ["audit_power", "dp_overhead"]

BATCH = 64
CLAIM = 4.0  # ε that the planted faults and their honest neighbours claim


def dp_overhead(*, rounds: int = 150) -> dict[str, Any]:
    """Return time ratios of one step on the digits CNN, cut after relu2, batch 64, over real frames.

    ``step_ratio``: DP-SGD on the client's bottom by per-sample clipping, over the plain split step;
    ``ghost_step_ratio``: by ghost clipping. ``joint_step_ratio`` and ``joint_ghost_step_ratio``: on both stages.
    Medians over rounds of neighbouring steps.
    """
    model = digits_cnn()
    steps = {
        "plain": _step(model, (), False),
        "step": _step(model, ("client",), False),
        "ghost_step": _step(model, ("client",), True),
        "joint_step": _step(model, ("client", "server"), False),
        "joint_ghost_step": _step(model, ("client", "server"), True),
    }
    seconds = paired_seconds(steps, rounds)
    ratios = {f"{name}_ratio": median_ratio(seconds[name], seconds["plain"]) for name in steps if name != "plain"}
    return {
        **ratios,
        "plain_step_ms": 1000 * statistics.median(seconds["plain"]),
        "threads": torch.get_num_threads(),
    }


def audit_power(*, repetitions: int = 200, draws: int = 100_000) -> dict[str, Any]:
    """Return how close the audit comes to a true ε, and how it judges mechanisms broken on purpose and honest ones.

    ``lower_bound_eps1`` and ``lower_bound_eps4``: the median over repetitions of the 95 % lower bound for the Gaussian
    mechanism at δ = 1e-5; ``above_eps1`` and ``above_eps4``: in how many repetitions it was above ε, which is to happen
    in one of 20 at most. ``faults_planted``, ``faults_caught`` and ``false_accusations``: at a claim of ε = 4.
    """
    begun = time.perf_counter()
    figures: dict[str, Any] = {}
    torch.manual_seed(0)
    world = torch.zeros(4)
    world[0] = 1.0
    for claim in (1.0, 4.0):
        guard = ClippedGaussian(1.0, calibrate(GaussianRelease, epsilon=claim, delta=DELTA))
        found = [audit_guard(guard, -world, world, delta=DELTA, draws=draws).lower for _ in range(repetitions)]
        figures[f"lower_bound_eps{claim:g}"] = statistics.median(found)
        figures[f"above_eps{claim:g}"] = sum(lower > claim for lower in found)
    bounds = {case: case.bound(CLAIM, draws) for case in CASES}
    return {
        **figures,
        "repetitions": repetitions,
        "faults_planted": sum(case.broken for case in CASES),
        "faults_caught": sum(case.broken and bound.convicts(CLAIM) for case, bound in bounds.items()),
        "honest": sum(not case.broken for case in CASES),
        "false_accusations": sum(not case.broken and bound.convicts(CLAIM) for case, bound in bounds.items()),
        "lower_bounds": {case.name: round(bound.lower, 3) for case, bound in bounds.items()},
        "seconds": time.perf_counter() - begun,
    }


def _step(model: nn.Sequential, private: tuple[str, ...], ghost: bool) -> Callable[[], object]:
    """Return one training step, of which the parties named are private."""
    x, y = torch.rand(BATCH, 1, 8, 8), torch.randint(0, 10, (BATCH,))
    bottom, top = cut(copy.deepcopy(model), "relu2")
    parties = {
        name: _party(name, stage, name in private, ghost) for name, stage in (("client", bottom), ("server", top))
    }
    server = Remote("server", Framed(serve(Service({"server": parties["server"]}))), "server")

    def step() -> object:
        for party in parties.values():
            if isinstance(party, PrivateLearner):
                party.allow(last=True)
        return vanilla(parties["client"], server, x, y)

    return step


def _party(name: str, stage: nn.Module, private: bool, ghost: bool) -> Learner:
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.01, momentum=0.9)
    if not private:
        return Learner(name, stage, optimizer, loss=PaddedCrossEntropy(BATCH))
    return PrivateLearner(
        name, stage, optimizer, clip=1.0, noise_multiplier=1.0, expected_batch_size=BATCH, ghost=ghost
    )  # fmt: skip
