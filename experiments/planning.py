"""Which noise meets an ε over so many releases: asked before anything is trained."""

from collections.abc import Iterator
from functools import cache, partial

from privacy.dp import GaussianRelease, LaplaceRelease, Release, ResponseRelease, calibrate, epsilon

__all__ = ["plan", "sgd_noise"]


def plan(
    target: float, delta: float, releases: int, *, sampling: float = 1.0, classes: int = 10
) -> Iterator[tuple[str, str, float, float]]:
    """Yield mechanism, what its figure is, the least one that meets (``target``, δ), and the ε that Rényi DP gives it.

    With ``sampling`` below 1 for DP-SGD alone, whose samples are in each of ``releases`` steps with that probability.
    """
    if not 0 < sampling <= 1:
        raise ValueError(f"expected a sampling probability above 0 and of at most 1, got {sampling}; 1 for local noise")
    if sampling < 1:
        noise = calibrate(partial(GaussianRelease, sampling=sampling), epsilon=target, delta=delta, releases=releases)
        yield _row("DP-SGD", "noise multiplier (std ÷ clip)", noise, GaussianRelease(noise, sampling), releases, delta)
        return
    noise = calibrate(GaussianRelease, epsilon=target, delta=delta, releases=releases)
    yield _row("Gaussian", "noise multiplier (std ÷ 2·clip, L2)", noise, GaussianRelease(noise), releases, delta)
    noise = calibrate(LaplaceRelease, epsilon=target, delta=delta, releases=releases)
    yield _row("Laplace", "noise multiplier (scale ÷ 2·clip, L1)", noise, LaplaceRelease(noise), releases, delta)
    noise = calibrate(lambda one: ResponseRelease(1 / one, classes), epsilon=target, delta=delta, releases=releases)
    answer = ResponseRelease(1 / noise, classes)
    yield _row(f"randomised response, {classes} classes", "ε of one answer", 1 / noise, answer, releases, delta)


@cache
def sgd_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return the noise multiplier of DP-SGD; a hundredth of δ is left for batches over their capacity."""
    make = partial(GaussianRelease, sampling=rate)
    return calibrate(make, epsilon=epsilon, delta=0.99 * delta, releases=steps)


def _row(
    name: str, unit: str, figure: float, release: Release, releases: int, delta: float
) -> tuple[str, str, float, float]:
    return name, unit, figure, epsilon({release: releases}, delta, by="rdp")
