"""Ray as the engine of a run: jobs on a cluster's workers, or on those of a Ray that is started for them.

A cluster needs, on every node, the same Python, Ray and splitlearn, and the data sets' files at the path that the
command names, or at ``SPLITLEARN_DATA`` there. The folder of the run is this machine's alone: workers return what
is to be kept.
"""

import re
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from experiments.workers import ONE_THREAD, Job, Reply, available_cpus
from splitlearn.actors import connected

__all__ = ["RETRIES", "ray_jobs"]

RETRIES = 3  # of a job whose worker died
LOOK_AGAIN_SECONDS = 10.0  # whether nodes have joined


def ray_jobs(
    jobs: Sequence[Job],
    *,
    processes: int = 0,
    started: Callable[..., None] = lambda name, again="": None,
    address: str | None = None,
) -> Generator[Reply, None, None]:
    """Yield a reply per job as it ends, ``processes`` at once (0: one a CPU of the cluster), on one thread each.

    ``address`` is that of a cluster; None starts a Ray here, or uses the one that this process has (``connected``).
    A job whose worker or node dies runs again, up to ``RETRIES`` times; ``started(name, again)`` says so. Closing
    this iterator, by an exception or an interrupt too, ends what runs. Raises ``ValueError`` where Ray is missing,
    no cluster answers, or it has no CPU.
    """
    if not jobs:
        return
    waiting = deque(_Attempt(job, 1) for job in jobs)
    running: dict[Any, _Attempt] = {}
    with connected(address, num_cpus=processes or available_cpus()) as ray:
        errors = ray.exceptions
        deaths = (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.OutOfMemoryError)
        remote = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": ONE_THREAD})(_call)
        begun: dict[str, datetime] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (processes or _cpus(ray)):
                    attempt = waiting.popleft()
                    begun[attempt.job.name] = datetime.now(UTC)
                    running[remote.remote(attempt.job.function, attempt.job.arguments)] = attempt
                    started(attempt.job.name, attempt.again)
                ended, _ = ray.wait(list(running), timeout=LOOK_AGAIN_SECONDS)
                for reference in ended:
                    attempt = running.pop(reference)
                    name, value, error = attempt.job.name, None, ""
                    try:
                        value = ray.get(reference)
                    except deaths:
                        if attempt.number <= RETRIES:
                            waiting.appendleft(_Attempt(attempt.job, attempt.number + 1))
                            continue
                        times = f"the worker process died in this trial, {attempt.number} times"
                        error = f"{times}; if memory ran out, use fewer --jobs"
                    except errors.RayError as failed:  # such as a job whose module a worker cannot import
                        error = re.sub(r"\x1b\[\d+m", "", str(failed)).strip()
                    yield Reply(name, value, error, begun[name])
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


@dataclass(frozen=True)
class _Attempt:
    job: Job
    number: int

    @property
    def again(self) -> str:
        """What to tell of an attempt after the first."""
        return f"a worker died: attempt {self.number} of {1 + RETRIES}" if self.number > 1 else ""


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    return function(*arguments)


def _cpus(ray: Any) -> int:
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if not cpus:
        raise ValueError("expected a Ray cluster with a CPU, got none; start a node with `ray start --address …`")
    return cpus
