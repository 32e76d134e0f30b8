"""What computing on shares costs: accuracy, seconds, bytes and rounds, against plaintext and ciphertexts on one cut."""

import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks import FirstParty
from experiments.encrypted import WAYS, Setup, encrypted_cut
from experiments.experiment import Experiment, Options, reproduction
from experiments.names import find
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.setups import counted
from experiments.shares import SHARED_WAYS, Run, crossed
from experiments.timing import timed_epochs
from experiments.training import (
    Training,
    build_model,
    check_numbers,
    described,
    device_of,
    load_splits,
    sizes_of,
    warm_up,
)
from privacy.he import FAST, Parameters
from privacy.mpc import LAN, MOST_LR, WAN, Costs, Servers, described_layers
from splitlearn.cut import cut, layer_names
from splitlearn.data import DATASETS, Splits
from splitlearn.threat import Threat, observe
from splitlearn.train import evaluate, predict

__all__ = ["MPC_OVERHEAD", "PROVIDERS", "Config"]

USUAL_CUT = "flatten"  # a top of linear layers remains
PROVIDERS = {
    "ttp": "a dealer makes the multiplication triples",
    "insecure_first_party": "INSECURE: server 0 makes them, and can read every secret",
}


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    ways: tuple[str, ...] = field(
        default=tuple(SHARED_WAYS), metadata={"help": f"ways to train, of {', '.join(SHARED_WAYS)}"}
    )
    providers: tuple[str, ...] = field(
        default=("ttp",),
        metadata={"help": f"where masks come from, of {', '.join(PROVIDERS)} (the latter can read every secret)"},
    )
    cut: str = field(
        default="default", metadata={"help": "last layer below the cut; default: flatten, or below the last weights"}
    )
    epochs: int = field(default=8, metadata={"help": "epochs of training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch"})
    lr: float = field(default=0.05, metadata={"help": "learning rate of SGD with momentum 0.9, in every way"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})


@dataclass(frozen=True)
class Trial:
    """One way, and where its masks come from if it computes on shares."""

    data: str
    sizes: tuple[int, int, int]  # private, auxiliary, test
    way: str
    provider: str  # "" where nothing is shared
    training: Training

    def described(self) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        return {
            **described(self.data, self.sizes, self.training),
            "way": self.way,
            "provider": self.provider,
            **({} if self.parameters is None else {"parameters": asdict(self.parameters)}),
            "insecure_trust_first_party": self.insecure,
        }

    @property
    def insecure(self) -> bool:
        """Whether server 0 deals the triples."""
        return self.provider == "insecure_first_party"

    @property
    def parameters(self) -> Parameters | None:
        """The parameter set of a way on ciphertexts."""
        return FAST if self.way in WAYS and WAYS[self.way].encrypted else None

    def setup(self, splits: Splits, *, max_nbytes: int = 0) -> Setup:
        """Return what a way starts from."""
        return Setup(splits, self.training, self.parameters or FAST, max_nbytes=max_nbytes)

    def servers(self, *, remember: bool = False) -> Any:
        """Return two servers and their dealer as a context, or one of nothing where nothing is shared."""
        if not SHARED_WAYS[self.way].shares:
            return nullcontext()
        return Servers(insecure_trust_first_party=self.insecure, remember=remember)


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each way, provider and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.ways:
        find("way", name, SHARED_WAYS)
    for name in config.providers:
        find("provider", name, PROVIDERS)
    if not config.ways or not config.providers:
        raise ValueError(f"expected at least one way among {', '.join(SHARED_WAYS)} and one provider, got none")
    if not config.lr < MOST_LR:
        raise ValueError(f"expected --lr below {MOST_LR:g}, with which shares can be trained, got {config.lr:g}")
    sizes = sizes_of(options.data, private=config.private)
    if device_of(options.device) != "cpu" and options.device != "auto":
        raise ValueError(f"expected --device cpu, on which shares are computed, got {options.device}")
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    check_numbers(splits, options.data)
    model = build_model(splits, seed=0)
    usual = USUAL_CUT if USUAL_CUT in layer_names(model) else encrypted_cut(model)
    place = usual if config.cut == "default" else config.cut
    described_layers(cut(model, place)[1])  # what cannot be evaluated on shares is told of now
    base = Training(
        cut=place, epochs=config.epochs, batch_size=config.batch_size, optimizer="sgd", lr=config.lr, device="cpu"
    )
    found = []
    for way in config.ways:
        for provider in config.providers if SHARED_WAYS[way].shares else ("",):
            for seed in options.seeds:
                trial = Trial(options.data, sizes, way, provider, replace(base, protocol=way, seed=seed))
                alone = replace(config, ways=(way,), cut=place, providers=(provider,) if provider else config.providers)
                command = reproduction("mpc_overhead", alone, data=options.data, device="cpu", seed=seed)
                labels = {
                    # No protocol: what is compared is ways to train, each a protocol of its own.
                    "seed": seed, "data": options.data, "protocol": "", "cut": place,
                    "protection": way, "strength": provider,
                }  # fmt: skip
                found.append(
                    Task(
                        "mpc_overhead", trial.described(), command, labels, partial(run_trial, trial, options.data_dir)
                    )
                )
    return found


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train that way; return accuracy, bytes, rounds, seconds by operation, and what one server reads."""
    warm_up()
    splits, way = load_splits(trial.data, data_dir, sizes=trial.sizes), SHARED_WAYS[trial.way]
    epochs = trial.training.epochs if way.trains else 1
    with trial.servers() as servers:
        run = way.ready(trial.setup(splits), servers)
        if servers is not None:
            predict(run.chain, splits.test.x[:1])  # the first answer waits seconds for what is set up on demand
            _count_anew(run, servers)
        losses, lasted = timed_epochs(run.step, run.batches, epochs)
        notes = [f"loss of the last epoch: {losses[-1]:.4f}", f"losses: {', '.join(f'{loss:.4f}' for loss in losses)}"]
        bill = _bill(run, servers, statistics.median(lasted), epochs) if way.trains else None
        _count_anew(run, servers)
        begun = time.perf_counter()
        utility = evaluate(run.chain, splits.test.x, splits.test.y)
        tested = time.perf_counter() - begun
        if bill is None:
            bill = _bill(run, servers, tested, 1, of=f"{len(splits.test)} predictions")
            notes.append(f"bytes, rounds and seconds are those of {len(splits.test)} predictions")
            bill["seconds"] = {f"test_{n}" if n in ("lan", "wan") else n: s for n, s in bill["seconds"].items()}
            bill["seconds"].pop("epoch")
        security = [] if servers is None else servers.security
    if trial.parameters is not None:
        notes.append(trial.parameters.in_words())
    bill["seconds"]["test"] = tested
    return Outcome(
        utility=utility, leakage=_leakage(trial, splits) if way.trains else [], nbytes=bill["nbytes"],
        seconds=bill["seconds"], visible={who: list(what) for who, what in run.visible.items()},
        notes=[*notes, *bill["notes"], *security],
    )  # fmt: skip


def _count_anew(run: Run, servers: Servers | None) -> None:
    for meter in run.meters:
        meter.clear()
    if run.stage is not None:
        run.stage.seconds.clear()
    if servers is not None:
        servers.count_anew()


def _bill(run: Run, servers: Servers | None, epoch: float, epochs: int, *, of: str = "an epoch") -> dict[str, Any]:
    """Return bytes in all, and seconds an epoch: measured, by operation, and on modelled networks."""
    nbytes, frames = counted(run.meters), max(meter.frames for meter in run.meters) / epochs
    to_client = sum(meter.total_nbytes for meter in run.meters) / epochs
    seconds, notes = {"epoch": epoch}, []
    rounds, between = 0.0, 0.0
    if servers is not None:
        costs: Costs = servers.costs()
        rounds, between = costs.rounds / epochs, costs.crossed / epochs
        nbytes = crossed(run.meters, costs)
        seconds |= {f"servers_{name}": spent / epochs for name, spent in costs.seconds.items()}
        notes.append(
            f"{rounds:.0f} rounds between the servers and {between / 1e6:.1f} MB ({costs.nbytes / epochs / 1e6:.1f} by "
            f"CrypTen's count), of {of}"
        )
    if run.stage is not None:
        seconds |= {f"client_{name}": spent / epochs for name, spent in run.stage.seconds.items()}
    for network in (LAN, WAN):
        seconds[network.name.lower()] = epoch + network.seconds(rounds + frames, between + to_client)
        notes.append(
            f"modelled {network.name}: {1000 * network.latency:g} ms one way, {network.bandwidth / 1e6:g} Mbit/s, "
            f"{rounds + frames:.0f} rounds and frames one after the other, beside what was measured on loopback"
        )
    return {"nbytes": nbytes, "seconds": seconds, "notes": notes}


def _leakage(trial: Trial, splits: Splits) -> list[Leakage]:
    """Return what one server makes of the activations of a first batch, in a training that is then given up."""
    with trial.servers(remember=True) as servers:
        run = SHARED_WAYS[trial.way].ready(trial.setup(splits, max_nbytes=1 << 32), servers)
        x, y = next(iter(run.batches))
        z, blind = _activations(trial, splits, x), _activations(trial, splits, splits.auxiliary.x).mean(0, keepdim=True)
        if servers is not None:
            servers.observed("server 0")  # the opening of the stage is no part of it
        run.step(x, y)
        found: Tensor | None = None
        if servers is not None:
            found = FirstParty(tuple(z.shape))(observe(servers.observed("server 0"), threat=Threat()))
        elif run.line is not None:
            found = observe(run.line.record, threat=Threat()).activations(verb="learn")
    guess = (blind.expand_as(z), found)
    errors = [float((z.double() - one.double()).square().mean()) for one in guess if one is not None]
    return [
        Leakage(
            attack="held_activation", family="reconstruction",
            advantage=max(0.0, 1 - errors[1] / errors[0]) if found is not None else 0.0,
            metrics={"mse": errors[-1]}, baselines={"mse_mean_activation": errors[0]},
            details={
                "of": "the activation at the cut, not the input",
                **({} if found is not None else {"why": "one server holds ciphertexts alone: nothing to read"}),
            },
        )
    ]  # fmt: skip


def _activations(trial: Trial, splits: Splits, x: Tensor) -> Tensor:
    bottom = cut(build_model(splits, seed=trial.training.seed), trial.training.cut)[0]
    with torch.no_grad():
        return bottom(x)


MPC_OVERHEAD = Experiment(
    "mpc_overhead",
    "What does computing on shares cost? Accuracy, seconds, bytes and rounds, against plaintext and ciphertexts",
    Config,
    tasks,
)
