"""Steps timed against each other in one run: neighbours in time are compared, so that the machine's mood cancels."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from splitlearn.train import epochs_of, fit

__all__ = ["Step", "median_ratio", "paired_seconds", "timed_epochs"]

Step = Callable[[], object]


def paired_seconds(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step in each round, after two to warm up; no step always follows the same one."""
    for step in steps.values():
        step(), step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(over: list[float], under: list[float]) -> float:
    """Return the median over rounds of the ratio of neighbouring steps."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def timed_epochs(
    step: Callable[[Tensor, Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], epochs: int
) -> tuple[list[float], list[float]]:
    """Train so many epochs, and return the mean loss and the seconds of each."""
    one, seconds = epochs_of(step, batches), []

    def epoch() -> float:
        begun = time.perf_counter()
        loss = one()
        seconds.append(time.perf_counter() - begun)
        return loss

    return fit(epoch, epochs=epochs).losses, seconds
