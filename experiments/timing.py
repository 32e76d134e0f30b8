"""Steps timed against each other in one run: neighbours in time are compared, so that the machine's mood cancels."""

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["Step", "median_ratio", "paired_seconds"]

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
