"""What an experiment is: a question, its options, and the trials that answer it."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from experiments.runner import Task
from splitlearn.data import DATASETS

__all__ = ["Experiment", "Options", "reproduction"]


@dataclass(frozen=True)
class Options:
    """What every experiment is asked: on which data, over which seeds, where and how."""

    data: str = "digits"
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    out: Path = Path("runs")
    jobs: int = 0  # trials at once; 0: one a core
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None  # of a cluster; None: a Ray that is started for the run


@dataclass(frozen=True)
class Experiment:
    """A question that `splitlearn run NAME` answers.

    ``config`` is a frozen dataclass of options: the command line is made from its fields, each of which has a
    default and its help text in ``field(metadata={"help": …})``. ``tasks(config, options)`` returns one task a
    trial; it checks every name first, so that nothing starts on bad input. ``data`` is what it is about where the user
    names no data set.
    """

    name: str
    summary: str
    config: type
    tasks: Callable[[Any, Options], list[Task]]
    data: str = Options.data


def reproduction(name: str, config: Any, *, data: str, device: str, seed: int) -> str:
    """Return the command that runs one trial: ``config`` narrowed to it, options at their defaults left out."""
    words = ["splitlearn", "run", name, "--data", data]
    for option in fields(config):
        value = getattr(config, option.name)
        if value != option.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{option.name.replace('_', '-')}", text]
    command = shlex.join([*words, "--device", device, "--seeds", str(seed)])
    # Where the files lie is not part of a trial: their folder is whatever the variable names.
    return command + ' --data-dir "$SPLITLEARN_DATA"' if DATASETS[data].files else command
