"""Where to cut a model, what to compress, and what leaks: one function for a model and data of one's own.

The command ``splitlearn plan`` calls it, too.
"""

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from experiments.advice import advice, plan_table
from experiments.names import find
from experiments.plan_plot import plan_picture
from experiments.planner import KNOWN, OBJECTIVES, Bounds, Candidate, Found, Measured
from experiments.protected import protections_for
from experiments.store import write_atomically
from experiments.tables import Table
from experiments.tradeoff import check_auxiliary
from experiments.training import build_model
from experiments.workbench import Settings, Site, Subject, Workbench, shield_of, weighted_places
from splitlearn.cost import Cost
from splitlearn.cut import cut, layer_names
from splitlearn.data import Splits
from splitlearn.devices import DEVICES, Device
from splitlearn.network import PROFILES, Profile

__all__ = ["COMPRESSIONS", "PROTECTIONS", "FromFile", "Plan", "candidates_of", "plan", "zoo"]

COMPRESSIONS = ("none", "int8", "ans4", "ans2")
PROTECTIONS = ("none", "noise:0.02", "noise:0.05", "nopeek:3")


@dataclass(frozen=True)
class Plan:
    """The answer: what was found, under which bounds, on which site; a table, a picture and plain words."""

    found: Found
    costs: Mapping[Candidate, Cost]
    bounds: Bounds
    minimise: str
    site: Site
    whole: tuple[Measured, ...]  # all in the cloud, all on the device
    accuracy: float  # of the unsplit model, mean over the seeds
    skipped: tuple[str, ...]  # candidates that cannot be, and why
    picture: Path

    @property
    def best(self) -> Measured | None:
        """The plan, or None where nothing keeps the bounds."""
        return self.found.best

    @property
    def front(self) -> tuple[Measured, ...]:
        """What was measured that nothing else measured beats in time, loss and leakage at once."""
        return self.found.front

    @property
    def advice(self) -> list[str]:
        """The recommendation in plain sentences."""
        return advice(self)

    @property
    def table(self) -> Table:
        """All that was measured, cheapest first."""
        return plan_table(self)


def plan(
    model: "Callable[[], nn.Sequential] | nn.Sequential | FromFile | None",
    splits: Splits | Callable[[], Splits],
    *,
    data: str = "own data",
    edge: str | Device = "phone",
    cloud: str | Device = "server_gpu",
    network: str | Profile = "wifi",
    batch: int = 1,
    training: bool = False,
    bounds: Bounds = Bounds(loss=2.0, leakage=0.5),
    minimise: str = "seconds",
    whole_front: bool = False,
    cuts: Sequence[str] = ("weighted",),
    compressions: Sequence[str] = COMPRESSIONS,
    protections: Sequence[str] = PROTECTIONS,
    settings: Settings = Settings(),
    out: Path = Path("runs/plan"),
    jobs: int = 1,
    progress: bool = True,
) -> Plan:
    """Return where to cut ``model``, what to compress and how to protect, at least ``minimise`` within ``bounds``.

    ``model`` is a function without arguments that makes an ``nn.Sequential`` (it is called once a seed), an
    ``nn.Sequential`` whose weights every seed then starts from, or None for the zoo's. ``splits`` are private,
    auxiliary and test samples, disjoint by index, or a function that loads them; with several ``jobs`` both functions
    must be such that a worker can take them (top-level ones of a module). ``cuts`` are names of last layers below a
    cut; ``weighted`` stands for one below each layer with weights, ``all`` for every place. Costs are per sample, at
    ``batch`` samples a frame, of predictions or of ``training`` steps.

    Every candidate that affords its costs is glimpsed: the unsplit model trains on under it for a fifth of the epochs,
    from one seed, and meets the smallest attack. Those that are within reach of the bounds are trained whole, over all
    seeds, and meet the whole of ``settings.attacks``, cheapest first, until one keeps the bounds by the means over its
    seeds; ``docs/costs.md`` says how often that is what measuring everything would give. With ``whole_front`` all that
    are not hopeless are measured. Records lie under ``out``; the same call goes on where it was interrupted.

    What it does not tell: leakage by attacks that were not run, and of labels, which cross in the clear in training.
    """
    site = Site(_device(edge), _device(cloud), network, batch, training)
    _check(site, bounds, minimise, compressions, protections)
    subject = Subject(data, splits if callable(splits) else _Held(splits), _maker(model))
    loaded = subject.load()
    if not loaded.private.x.is_floating_point():
        raise ValueError("expected inputs that are numbers, got tokens, on which no attack here works; plan on others")
    protections_for([one for one in protections if one != "none"], loaded.private)
    check_auxiliary(settings.attacks, len(loaded.auxiliary))
    bench = Workbench(subject, site, settings, out, jobs, progress)
    fresh = subject.make(loaded, settings.seeds[0])
    candidates, skipped = candidates_of(fresh, cuts, compressions, protections)
    costs = bench.costs(candidates)
    found = bench.plan(candidates, bounds, minimise, whole_front=whole_front)
    whole = tuple(bench.measure([Candidate(0), Candidate(len(fresh))]))
    accuracy = sum(bench.baseline.values()) / len(bench.baseline)
    against = minimise if minimise in KNOWN else "seconds"
    drawn = plan_picture(found, costs, bounds, against, out / "plan.png")
    answer = Plan(found, costs, bounds, minimise, site, whole, accuracy, tuple(skipped), drawn)
    write_atomically(out / "plan.txt", ("\n".join(answer.advice) + "\n").encode())
    return answer


def candidates_of(
    model: nn.Sequential, cuts: Sequence[str], compressions: Sequence[str], protections: Sequence[str]
) -> tuple[list[Candidate], list[str]]:
    """Return every cut × compression × protection that can be, and a line on each combination that cannot."""
    names = layer_names(model)
    groups = {"weighted": weighted_places(model), "all": names}
    places = list(dict.fromkeys(place for one in cuts for place in groups.get(one, [one])))
    if not places:
        raise ValueError("expected at least one place to cut at, got none; name layers with --cuts, or take all")
    found, skipped = [], []
    for place in places:
        cut(model, place)
        for compression in compressions:
            for protection in protections:
                one = Candidate(names.index(place) + 1, place, compression, protection)
                try:
                    shield_of(one)
                except ValueError as error:
                    if place == places[0]:
                        skipped.append(f"{compression} with {protection} was left out: {error}")
                    continue
                found.append(one)
    if not found:
        raise ValueError(skipped[0])
    return found, skipped


def _check(site: Site, bounds: Bounds, minimise: str, compressions: Sequence[str], protections: Sequence[str]) -> None:
    """Raise for numbers and names that make no sense, before anything is loaded."""
    if minimise not in OBJECTIVES:
        raise ValueError(f"expected something to minimise among {', '.join(OBJECTIVES)}, got {minimise!r}")
    if site.batch < 1:
        raise ValueError(f"expected a batch of at least one sample, got {site.batch}")
    if isinstance(site.network, str):
        find("network", site.network, PROFILES)
    if not bounds.leakage >= 0:
        raise ValueError(f"expected a bound on leakage of 0 or more, got {bounds.leakage}")
    if not (compressions and protections):
        raise ValueError("expected at least one compression and one protection, got none; none is one, too")
    for compression in compressions:  # a spelling that is none ends here, a combination that cannot be does not
        shield_of(Candidate(1, "layer", compression))


def _device(name: str | Device) -> Device:
    if isinstance(name, Device):
        return name
    if name == "here":
        from splitlearn.calibration import calibrate

        return calibrate()
    return find("device", name, {**DEVICES, "here": DEVICES["laptop"]})


@dataclass(frozen=True)
class _Held:
    """Splits that are in memory."""

    splits: Splits

    def __call__(self) -> Splits:
        """Return them."""
        return self.splits


@dataclass(frozen=True)
class FromFile:
    """A model made by ``name`` of a Python file: a function without arguments, or an ``nn.Sequential``."""

    path: Path
    name: str

    def __call__(self, splits: Splits, seed: int) -> nn.Sequential:
        """Return the model, seeded; every call runs the file anew."""
        spec = importlib.util.spec_from_file_location("own_model", self.path)
        if spec is None or spec.loader is None or not self.path.is_file():
            raise ValueError(f"expected a Python file with a model, got {self.path}; as in --model my_model.py:make")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, self.name):
            raise LookupError(f"nothing in {self.path} is named {self.name!r}; give the function that makes the model")
        return _seeded(getattr(module, self.name), seed)


def _maker(
    model: "Callable[[], nn.Sequential] | nn.Sequential | FromFile | None",
) -> Callable[[Splits, int], nn.Sequential]:
    if model is None:
        return zoo
    return model if isinstance(model, FromFile) else partial(_own, model)


def zoo(splits: Splits, seed: int) -> nn.Sequential:
    """Return the zoo's model for the data."""
    return build_model(splits, seed=seed)


def _own(model: Callable[[], nn.Sequential] | nn.Sequential, splits: Splits, seed: int) -> nn.Sequential:
    return _seeded(model, seed)


def _seeded(model: Callable[[], nn.Sequential] | nn.Sequential, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(made, nn.Sequential):
        raise ValueError(f"expected an nn.Sequential, got {type(made).__name__}; make the model a chain of layers")
    return made
