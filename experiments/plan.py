"""Where to cut a model, what to compress, and what leaks: one function for a model and data of one's own.

The command ``splitlearn plan`` calls it, too.
"""

import copy
import importlib.util
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path

import torch
from torch import nn

from experiments.advice import advice, plan_table
from experiments.ingredients import ATTACKS
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
from splitlearn.devices import DEVICES, Device, Radio
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
    radio: Radio | None = None,
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
    ``batch`` samples a frame, of predictions or of ``training`` steps; a ``network`` of your own needs its ``radio``.
    The time to pack and unpack is not in them.

    Every candidate that affords its costs is glimpsed: the unsplit model trains on under it for a fifth of the epochs,
    from one seed, and meets the smallest attack. Those that are within reach of the bounds are trained whole, over all
    seeds, and meet the whole of ``settings.attacks``, cheapest first, until one keeps the bounds by the means over its
    seeds; ``docs/costs.md`` says how often that is what measuring everything would give. With ``whole_front`` all that
    are not hopeless are measured. Records lie under ``out``; the same call goes on where it was interrupted.

    What it does not tell: leakage by attacks that were not run, and of labels, which cross in the clear in training.
    """
    _check(network, batch, bounds, minimise, compressions, protections, settings)
    _check_attacks(settings.attacks, own=model is not None)
    devices = _device(edge), _device(cloud)
    source = model.path.read_text() if isinstance(model, FromFile) and model.path.is_file() else ""
    subject = Subject(data, splits if callable(splits) else _Held(splits), _maker(model), source)
    if jobs > 1:
        _check_picklable(subject)
    loaded = subject.load()
    _check_data(loaded, batch, protections, settings)
    fresh = subject.make(loaded, settings.seeds[0])
    _check_fits(fresh, loaded)
    bench = Workbench(subject, Site(*devices, network, batch, training, radio), settings, out, jobs, progress)
    candidates, skipped = candidates_of(fresh, cuts, compressions, protections)
    costs = bench.costs(candidates)
    found = bench.plan(candidates, bounds, minimise, whole_front=whole_front)
    whole = tuple(bench.measure([Candidate(0), Candidate(len(fresh))]))
    accuracy = sum(bench.baseline.values()) / len(bench.baseline)
    against = minimise if minimise in KNOWN else "seconds"
    drawn = plan_picture(found, costs, bounds, against, out / "plan.png")
    answer = Plan(found, costs, bounds, minimise, bench.site, whole, accuracy, tuple(skipped), drawn)
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
        raise ValueError(
            f"expected a model with a place to cut below a second layer with weights, got {len(model)} layers and "
            "none; name places with --cuts, or split a layer in two"
        )
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


def _check(
    network: str | Profile,
    batch: int,
    bounds: Bounds,
    minimise: str,
    compressions: Sequence[str],
    protections: Sequence[str],
    settings: Settings,
) -> None:
    """Raise for numbers and names that make no sense, before anything is loaded."""
    if minimise not in OBJECTIVES:
        raise ValueError(f"expected something to minimise among {', '.join(OBJECTIVES)}, got {minimise!r}")
    if batch < 1:
        raise ValueError(f"expected a batch of at least one sample, got {batch}")
    if isinstance(network, str):
        find("network", network, PROFILES)
    if any(isnan(value) for value in vars(bounds).values()):
        raise ValueError(f"expected bounds that are numbers, got {bounds}; leave out those that are none")
    if not bounds.leakage >= 0:
        raise ValueError(f"expected a bound on leakage of 0 or more, got {bounds.leakage}")
    if not settings.seeds or settings.targets < 1:
        raise ValueError(f"expected at least one seed and one target, got {settings.seeds} and {settings.targets}")
    settings.training(Candidate(0), settings.seeds[0], settings.epochs)
    if not (compressions and protections):
        raise ValueError("expected at least one compression and one protection, got none; none is one, too")
    for compression in compressions:  # a spelling that is none ends here, a combination that cannot be does not
        shield_of(Candidate(1, "layer", compression))


def _check_attacks(attacks: Sequence[str], *, own: bool) -> None:
    """Refuse attacks that are none, and for a model of one's own those that build a model by themselves: the zoo's."""
    if not attacks:
        raise ValueError("expected at least one attack, got none: without one nothing is known of what leaks")
    for name in attacks:
        attack = find("attack", name, ATTACKS)
        if own and (attack.steps or any("architecture" in one for one in attack.knows)):
            raise ValueError(
                f"expected attacks on what crosses, got {name}, which trains along with, or builds, a model of the "
                "zoo, and not yours; as in decoder or rmle"
            )


def _check_picklable(subject: Subject) -> None:
    try:
        pickle.dumps(subject)
    except Exception as error:
        raise ValueError(
            "expected model and data that a worker process can take, got a function that it cannot find (a lambda, or "
            "one inside another); define it at the top of a module, or use jobs=1"
        ) from error


def _check_data(splits: Splits, batch: int, protections: Sequence[str], settings: Settings) -> None:
    private = splits.private
    if not private.x.is_floating_point():
        raise ValueError("expected inputs that are numbers, got tokens, on which no attack here works; plan on others")
    protections_for([one for one in protections if one != "none"], private)
    check_auxiliary(settings.attacks, len(splits.auxiliary))
    if misfits := [name for name in settings.attacks if private.kind not in ATTACKS[name].inputs]:
        raise ValueError(f"expected attacks that work on {private.kind}, got {', '.join(misfits)}; leave them out")
    if batch > len(splits.test):
        raise ValueError(f"expected a batch of at most the {len(splits.test)} test samples, got {batch}")


@torch.no_grad()
def _check_fits(model: nn.Sequential, splits: Splits) -> None:
    """Raise where the model does not take these inputs to logits of these classes."""
    x, y = splits.private.x[:2], torch.cat([splits.private.y, splits.auxiliary.y, splits.test.y])
    try:
        logits = copy.deepcopy(model).eval()(x)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"expected a model that takes inputs {tuple(x.shape)}, got: {reason}") from error
    classes = int(y.max()) + 1
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < classes:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"expected a model that puts out logits [2, {classes}] for two samples, since labels go from "
            f"{int(y.min())} to {classes - 1}, got {got}; widen the last layer, or number the labels from 0"
        )


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
        sys.modules[spec.name] = module  # where dataclasses look for it
        sys.path.insert(0, str(self.path.parent))  # for what lies beside it
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"expected a Python file that runs, got {self.path}: {told}") from error
        finally:
            sys.path.remove(str(self.path.parent))
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
