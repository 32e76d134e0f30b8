"""Does it pay to move the cut while network, load and battery change? Rules, bandits and Q-learning × traces.

A trial trains a model by split learning, keeps the arms (a cut and a codec) that are accurate enough, fit the device
and are not worse than another in both work and bytes, trains the policies on traces of one set of seeds and plays them
on others. A request of --images samples costs

    seconds + λ · joules of the device,    λ = --joule-price / max(battery, 0.1)

by ``splitlearn.cost``: the trace's load multiplies the device's compute time, its bandwidth is the network's. What
policies know is the last request's bandwidth, latency and load, each off by --noise, and battery. A change of cut costs
the seconds that the weights of the layers that move take over --network, since each layer has one holder. The server
keeps the layers above the last cut, so that all on the device is no arm. Codecs' own time is left out.

Bandwidths are ten times those of the 4G traces, as Wi-Fi has them: on slower networks the deepest cut of so small a
model is best nearly always, and there is nothing to decide (``--network 4g --bandwidth 1 --latency 1``).

The load of "recorded" is one series of one machine, a half for training and a half for what is held out, in steps of
its own interval. A trace is at most a half long, starts at any place of it and goes round: traces of one half are not
independent in their load, only in their bandwidth.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.arms import (
    BATTERY,
    CODECS,
    LOAD,
    UP,
    Apart,
    Arm,
    Shared,
    arms_of,
    check_memory,
    contexts_of,
    costs_of,
    switching,
)
from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import PROTOCOLS
from experiments.names import find
from experiments.parts import Shield
from experiments.runner import Outcome, Task
from experiments.training import (
    Training,
    build_model,
    default_cut,
    described,
    device_of,
    load_splits,
    sizes_of,
    warm_up,
)
from splitlearn.controllers import (
    Fixed,
    Game,
    LinUCB,
    Matrix,
    Policy,
    QLearning,
    Threshold,
    best_fixed,
    oracle,
    play,
)
from splitlearn.cost import Layer, count
from splitlearn.cut import join
from splitlearn.data import DATASETS, Splits
from splitlearn.devices import DEVICES, RADIOS, Device
from splitlearn.network import PROFILES
from splitlearn.traces import GENERATORS, Trace, load_trace, walk

__all__ = ["ARMS", "CONTROLLER", "POLICIES", "RECORDED", "RECORDING", "SHOWN", "TRACES", "Config", "tasks"]

RECORDING = Path(__file__).parent / "traces" / "machine_load.csv"
RECORDED = "recorded"  # the load of a machine as it was, on a walk's bandwidth
TRACES = {**GENERATORS, RECORDED: walk}
ARMS = "arms, a cut and a codec each, by number from 0: "  # how the note starts that names them
SHOWN = ("oracle", "bandit", "q_learning", "threshold")  # whose arms are kept, of the first held-out trace
APART = 500_000  # between the seeds of training traces and of those that are held out
NOISIEST = 3.0  # a standard deviation of logs: measurements are then off by twenty times, up or down


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    generators: tuple[str, ...] = field(
        default=tuple(TRACES), metadata={"help": f"of {', '.join(TRACES)}; each is a trial"}
    )
    edge: str = field(default="phone", metadata={"help": f"the device, of {', '.join(DEVICES)}"})
    cloud: str = field(default="server_gpu", metadata={"help": "the server, of the same"})
    network: str = field(
        default="wifi", metadata={"help": f"whose radio sends, and moves weights, of {', '.join(PROFILES)}"}
    )
    bandwidth: float = field(default=10.0, metadata={"help": "times that of the traces, which are of a 4G network"})
    latency: float = field(default=0.1, metadata={"help": "times that of the traces"})
    images: int = field(default=256, metadata={"help": "samples in a request"})
    joule_price: float = field(default=0.003, metadata={"help": "seconds that a joule is worth on a full battery"})
    tolerance: float = field(default=0.02, metadata={"help": "accuracy that an arm may lose, on auxiliary samples"})
    noise: float = field(
        default=0.1, metadata={"help": "how far off measurements are, as a standard deviation of logs"}
    )
    steps: int = field(default=600, metadata={"help": "requests in a trace"})
    training_traces: int = field(default=8, metadata={"help": "traces that policies are trained on"})
    held_out: int = field(default=5, metadata={"help": "traces that they are judged on"})
    epochs: int = field(default=10, metadata={"help": "epochs of the model's training"})


@dataclass(frozen=True)
class Trial:
    """One kind of trace."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    generator: str
    config: Config

    def described(self) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        own = {name: value for name, value in vars(self.config).items() if name not in ("generators", "epochs")}
        ends = [DEVICES[name] for name in (self.config.edge, self.config.cloud)]
        devices = {one.name: {**vars(one), "factors": dict(one.factors)} for one in ends}
        recording = hashlib.sha256(RECORDING.read_bytes()).hexdigest()[:16] if self.generator == RECORDED else ""
        return {
            **described(self.data, self.sizes, self.training),
            "generator": self.generator, **own, "codecs": list(CODECS), "devices": devices, "recording": recording,
            "radio": asdict(RADIOS[self.config.network]), "profile": asdict(PROFILES[self.config.network]),
        }  # fmt: skip


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each kind of trace and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.generators:
        find("generator", name, TRACES)
    find("device", config.edge, DEVICES)
    find("device", config.cloud, DEVICES)
    find("network", config.network, PROFILES)
    _check(config)
    device = device_of(options.device)
    sizes = sizes_of(options.data)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    if splits.private.kind == "tokens":
        raise ValueError(f"expected inputs that are numbers, got {options.data}, which holds tokens")
    check_memory(count(build_model(splits, seed=0).eval(), _request(splits, config)), DEVICES[config.edge])
    found = []
    for name in config.generators:
        for seed in options.seeds:
            training = Training(epochs=config.epochs, cut=default_cut(splits), seed=seed, device=device)
            trial = Trial(options.data, sizes, training, name, config)
            alone = replace(config, generators=(name,))
            command = reproduction("controller", alone, data=options.data, device=device, seed=seed)
            labels = {
                "seed": seed, "data": options.data, "protocol": "vanilla", "cut": "", "protection": "none",
                "strength": name,
            }  # fmt: skip
            call = partial(run_trial, trial, options.data_dir)
            found.append(Task("controller", trial.described(), command, labels, call))
    return found


def _check(config: Config) -> None:
    """Refuse numbers that nothing can be played with."""
    if not config.generators:
        raise ValueError("expected at least one of --generators, got none; leave the option out for the default")
    for option, least in (("images", 1), ("steps", 2), ("training_traces", 2), ("held_out", 1), ("epochs", 1)):
        if getattr(config, option) < least:
            name = option.replace("_", "-")
            raise ValueError(f"expected --{name} of {least} or more, got {getattr(config, option)}")
    if not 0 < config.bandwidth < float("inf"):
        raise ValueError(f"expected --bandwidth above 0, got {config.bandwidth}")
    for option in ("latency", "joule_price", "tolerance", "noise"):
        if not 0 <= getattr(config, option) < float("inf"):
            raise ValueError(f"expected --{option.replace('_', '-')} of 0 or more, got {getattr(config, option)}")
    if config.noise > NOISIEST:
        raise ValueError(f"expected --noise of {NOISIEST:g} or less, a factor of 20, got {config.noise}; 0.1 is 10 %")


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train, choose arms, train policies, and return what each pays on traces that it has not seen."""
    warm_up()
    config, seed = trial.config, trial.training.seed
    start = time.perf_counter()
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    trained = PROTOCOLS["vanilla"].train(trial.training, splits, Shield())
    model = join(*trained.model.cpu().eval().children())  # the stages
    seconds = {"train": time.perf_counter() - start}
    start = time.perf_counter()
    x = _request(splits, config)
    layers = count(model, x)
    edge, cloud, radio = DEVICES[config.edge], DEVICES[config.cloud], RADIOS[config.network]
    arms, dropped = arms_of(
        model, layers, splits.auxiliary.x, splits.auxiliary.y, x, edge=edge, cloud=cloud, tolerance=config.tolerance
    )
    switch = switching(layers, arms, config.network)

    def game(trace: Trace, noise_seed: int) -> Game:
        costs = costs_of(trace, layers, arms, edge=edge, cloud=cloud, radio=radio, joule_price=config.joule_price)
        return costs, contexts_of(trace, config.network, noise=config.noise, seed=noise_seed)

    first = 1000 * seed
    training = [
        game(_trace(trial.generator, config, number, held_out=False), number)
        for number in range(first, first + config.training_traces)
    ]
    seeds = range(APART + first, APART + first + config.held_out)
    unseen = [_trace(trial.generator, config, number, held_out=True) for number in seeds]
    games = [game(trace, number) for trace, number in zip(unseen, seeds, strict=True)]
    seconds["arms"] = time.perf_counter() - start
    start = time.perf_counter()
    policies = {name: make(training, switch, arms, layers, edge) for name, make in POLICIES.items()}
    seconds["policies"] = time.perf_counter() - start
    start = time.perf_counter()
    best = [oracle(costs, switch) for costs, _ in games]
    played = {"oracle": best, "best_fixed": [best_fixed(costs) for costs, _ in games]}
    for name, policy in policies.items():  # each trace is met by the policy as training left it
        played[name] = [play(copy.deepcopy(policy), *game, switch) for game in games]
    least = sum(one.total for one in best)
    utility = {f"ratio_{name}": sum(one.total for one in found) / least for name, found in played.items()}
    utility |= {f"switches_{name}": sum(one.switches for one in found) / len(found) for name, found in played.items()}
    del utility["ratio_oracle"], utility["switches_best_fixed"], utility["switches_fixed"]  # 1, 0 and 0
    seconds["play"] = time.perf_counter() - start
    shown = unseen[0]
    traces = {
        "time, s": shown.seconds.tolist(), "up, Mbit/s": (shown.up / 1e6).tolist(), "load": shown.load.tolist(),
        "battery": shown.battery.tolist(),
        **{f"arm of {name}": played[name][0].arms.astype(float).tolist() for name in SHOWN},
    }  # fmt: skip
    used = sorted({int(arm) for one in best for arm in one.arms})
    notes = [
        f"{ARMS}{', '.join(arm.name for arm in arms)}",
        "bytes up a request: " + ", ".join(f"{arm.name} {arm.up_nbytes}" for arm in arms),
        "accuracy on auxiliary samples: " + ", ".join(f"{arm.name} {arm.accuracy:.3f}" for arm in arms),
        *dropped,
        f"arms that the oracle uses: {', '.join(arms[arm].name for arm in used)}",
        f"a request costs the oracle {1000 * least / sum(len(costs) for costs, _ in games):.3g} ms, energy priced in",
        "ratio: what a policy pays on held-out traces, switching included, over what the oracle pays, which knows them",
    ]
    if trial.generator == RECORDED:
        notes.append(
            f"load: one recorded series, of which training has a half and what is held out the other; {len(shown)} "
            f"requests a trace of {config.steps} asked for; traces start at other places of it and are not independent"
        )
    return Outcome(
        utility=utility, nbytes=trained.nbytes, seconds=seconds, visible=trained.visible, traces=traces, notes=notes
    )


Make = Callable[[Sequence[Game], Matrix, Sequence[Arm], Sequence[Layer], Device], Policy]

POLICIES: dict[str, Make] = {
    "fixed": lambda games, switch, arms, layers, edge: Fixed.trained(games),
    "threshold": lambda games, switch, arms, layers, edge: Threshold.trained(games, switch, columns=(UP, LOAD)),
    "bandit": lambda games, switch, arms, layers, edge: LinUCB.trained(
        games, switch, Shared.fitted(games, arms, layers, edge)
    ),
    "bandit_apart": lambda games, switch, arms, layers, edge: LinUCB.trained(games, switch, Apart.fitted(games, arms)),
    "bandit_cold": lambda games, switch, arms, layers, edge: LinUCB(
        Shared.fitted(games, arms, layers, edge), patience=10
    ),
    "q_learning": lambda games, switch, arms, layers, edge: QLearning.trained(
        games, switch, columns=(UP, LOAD, BATTERY), bins=(8, 5, 2)
    ),
}


def _trace(generator: str, config: Config, seed: int, *, held_out: bool) -> Trace:
    """Return a trace; of a recording, training has the first half, and what is held out the second.

    A recorded one has the recording's interval, and no more steps than the half: it starts anywhere and goes round.
    """
    half, steps, every = np.empty(0), config.steps, {}
    if generator == RECORDED:
        recording = load_trace(RECORDING)
        half = np.array_split(recording.load, 2)[int(held_out)]
        steps, every = min(steps, len(half)), {"every": round(float(np.median(np.diff(recording.seconds))), 3)}
    made = TRACES[generator](steps, seed=seed, **every)
    made = replace(
        made, up=config.bandwidth * made.up, down=config.bandwidth * made.down, latency=config.latency * made.latency
    )
    if generator != RECORDED:
        return made
    start = np.random.default_rng([seed, 2]).integers(len(half))
    return replace(made, name=RECORDED, load=np.roll(half, -start)[:steps])


def _request(splits: Splits, config: Config) -> Tensor:
    return splits.auxiliary.x[torch.arange(config.images) % len(splits.auxiliary)]


CONTROLLER = Experiment(
    "controller",
    "Does it pay to move the cut as network, load and battery change? Rules, bandits and Q-learning against an oracle",
    Config,
    tasks,
)
