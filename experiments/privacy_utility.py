"""What does an ε buy: accuracy and leakage under each DP mechanism, beside what an audit can show of it."""

import copy
import time
from dataclasses import dataclass, field, replace
from functools import partial
from math import isinf
from pathlib import Path
from typing import Any

import torch

from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import ATTACKS
from experiments.mechanisms import MECHANISMS, Reached
from experiments.names import find
from experiments.public_start import PrivateSGD, Start, public_model
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import attack_victim
from experiments.training import Training, build_model, described, device_of, load_splits, sizes_of, warm_up
from privacy.dp import dfil_of, mse_bound
from splitlearn.cut import cut, layer_names
from splitlearn.data import DATASETS, Splits
from splitlearn.metrics import accuracy, accuracy_advantage
from splitlearn.party import Learner
from splitlearn.threat import Threat, observe
from splitlearn.train import evaluate

__all__ = ["PRIVACY_UTILITY", "Config"]

BOUNDED = 8  # targets whose Fisher information is worked out
READING = {name: one for name, one in ATTACKS.items() if one.family == "reconstruction" and not one.steps}


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    mechanisms: tuple[str, ...] = field(
        default=tuple(MECHANISMS), metadata={"help": f"mechanisms to compare, of {', '.join(MECHANISMS)}"}
    )
    epsilons: tuple[float, ...] = field(default=(1.0, 4.0, 16.0, 64.0), metadata={"help": "ε that each is to meet"})
    delta: float = field(default=1e-5, metadata={"help": "δ of every claim"})
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: the last hidden one"})
    public: int = field(default=50, metadata={"help": "public samples (of the auxiliary) that the model starts from"})
    passes: int = field(default=1, metadata={"help": "releases of each sample in training; the server learns on"})
    epochs: int = field(default=20, metadata={"help": "epochs of the server on what it was sent"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate of Adam"})
    rate: float = field(default=0.25, metadata={"help": "DP-SGD: probability of a sample to be in a batch"})
    steps: int = field(default=40, metadata={"help": "DP-SGD: steps"})
    clip: float = field(default=0.5, metadata={"help": "DP-SGD and user level: norm that one contribution is cut to"})
    sgd_lr: float = field(default=0.5, metadata={"help": "DP-SGD: learning rate"})
    clients: int = field(default=20, metadata={"help": "user level: clients among which the private data is divided"})
    rounds: int = field(default=10, metadata={"help": "user level: rounds"})
    attacks: tuple[str, ...] = field(
        default=("rmle", "decoder"), metadata={"help": "attacks on the activations, of rmle, decoder; '' for none"}
    )
    targets: int = field(default=100, metadata={"help": "private samples that are attacked"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    auxiliary: int = field(default=0, metadata={"help": "auxiliary samples; 0: the data set's usual number"})
    audit_draws: int = field(default=100_000, metadata={"help": "draws of each world in an audit"})
    canaries: int = field(default=200, metadata={"help": "canaries in the one-run audit of DP-SGD"})


@dataclass(frozen=True)
class Trial:
    """One mechanism at one ε."""

    data: str
    sizes: tuple[int, int, int]  # private, auxiliary, test
    mechanism: str
    epsilon: float
    training: Training
    config: Config

    def described(self) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        used = ("delta", "public", "targets", *MECHANISMS[self.mechanism].settings)
        chosen = {name: getattr(self.config, name) for name in used}
        return {
            **described(self.data, self.sizes, self.training),
            "mechanism": self.mechanism,
            "epsilon": "none" if isinf(self.epsilon) else self.epsilon,
            "attacks": list(self.config.attacks),
            **chosen,
        }


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each mechanism, ε and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.mechanisms:
        find("mechanism", name, MECHANISMS)
    for name in config.attacks:
        find("attack", name, READING)
    if not config.epsilons or not all(0 < one < float("inf") for one in config.epsilons):
        raise ValueError(f"expected --epsilons above 0, got {','.join(map(str, config.epsilons)) or 'none'}")
    _check_numbers(config)
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    device = device_of(options.device)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    _check(config, splits)
    place = layer_names(build_model(splits, seed=0))[-1] if config.cut == "default" else config.cut
    cut(build_model(splits, seed=0), place)
    found = []
    for mechanism in config.mechanisms:
        for epsilon in (float("inf"),) if mechanism == "none" else config.epsilons:
            for seed in options.seeds:
                protocol = MECHANISMS[mechanism].protocol
                training = Training(
                    cut=place, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, seed=seed,
                    clients=config.clients if protocol == "splitfed_v1" else 1, device=device, protocol=protocol,
                )  # fmt: skip
                trial = Trial(options.data, sizes, mechanism, epsilon, training, config)
                some = config.epsilons if isinf(epsilon) else (epsilon,)
                alone = replace(config, mechanisms=(mechanism,), epsilons=some, cut=place)
                command = reproduction("privacy_utility", alone, data=options.data, device=device, seed=seed)
                labels = {
                    # No protocol: what is compared is mechanisms, each under the protocol that it needs.
                    "seed": seed, "data": options.data, "protocol": "", "cut": place,
                    "protection": mechanism, "strength": "" if isinf(epsilon) else f"{epsilon:g}",
                }  # fmt: skip
                call = partial(run_trial, trial, options.data_dir)
                found.append(Task("privacy_utility", trial.described(), command, labels, call))
    return found


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train under the mechanism, audit its claim, attack what crossed, and return what came of it."""
    warm_up()
    seconds: dict[str, float] = {}
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    clock = time.perf_counter()
    model = public_model(splits, trial.config.public, trial.training)
    public = splits.auxiliary.x[: trial.config.public].to(trial.training.device)
    config = trial.config
    public_y = splits.auxiliary.y[: trial.config.public].to(trial.training.device)
    start = Start(
        splits, model, public, public_y, trial.training, trial.epsilon, config.delta, config.passes,
        PrivateSGD(config.rate, config.steps, config.clip, config.sgd_lr), config.rounds, config.audit_draws,
        config.canaries,
    )  # fmt: skip
    seconds["public"], clock = time.perf_counter() - clock, time.perf_counter()
    mechanism = MECHANISMS[trial.mechanism]
    reached = mechanism.run(start)
    seconds["train"], clock = time.perf_counter() - clock, time.perf_counter()
    trained = reached.trained
    utility = evaluate(trained.chain, splits.test.x, splits.test.y)
    utility["accuracy_public"] = evaluate([Learner("public", model)], splits.test.x, splits.test.y)["accuracy"]
    seconds["evaluate"] = time.perf_counter() - clock
    leakage = _label_leakage(start, reached) if reached.label_attacks else []
    # The bottom is frozen where samples are noised one by one: what crosses now is as it was in training, noise anew.
    attacks = attack_victim(
        config.attacks if mechanism.inverted else (),
        trained,
        splits,
        trial.training,
        targets=config.targets,
        releases=reached.releases,
    )
    claimed = reached.claims[0] if reached.claims else None
    return Outcome(
        utility=utility, leakage=leakage + attacks.leakage, nbytes=trained.nbytes, seconds=seconds | attacks.seconds,
        visible=trained.visible | attacks.visible, images=attacks.images,
        epsilon=None if claimed is None else claimed.epsilon, delta=None if claimed is None else claimed.delta,
        epsilon_lower=None if claimed is None else reached.lower, accounts=[str(claim) for claim in reached.claims],
        mse_bound=_mse_bound(reached), notes=_notes(trial, reached, mechanism.adjacency),
    )  # fmt: skip


def _label_leakage(start: Start, reached: Reached) -> list[Leakage]:
    """Return what the server makes of the labels, beside the public model's guess, which saw activations alone."""
    assert reached.true_y is not None
    assert reached.blind is not None
    assert reached.trained.record is not None
    view = observe(reached.trained.record, threat=Threat("server"), device=start.training.device)
    truth = reached.true_y.cpu()
    verb = "learn" if any(exchange.request.verb == "learn" for exchange in view.exchanges) else "forward"
    with torch.no_grad():
        blind = reached.blind(view.activations(verb=verb)[: len(truth)]).cpu()
    guesses = {name: attack(view).cpu() for name, attack in reached.label_attacks.items()}
    majority = start.splits.auxiliary.y.bincount(minlength=start.splits.private.num_classes).argmax()
    baselines = {
        "accuracy_majority": (truth == majority).double().mean().item(),
        "accuracy_public_model": accuracy(blind, truth),
    }
    scores = {name: (guess == truth).double().mean().item() for name, guess in guesses.items()}
    best = max(scores, key=lambda name: scores[name])
    advantage = accuracy_advantage(scores[best], max(baselines.values()))
    return [
        Leakage(
            attack=reached.label_attack, family="label", advantage=advantage, metrics={"accuracy": scores[best]},
            baselines=baselines, details={"best": best, "accuracy_by_member": scores},
        )
    ]  # fmt: skip


def _mse_bound(reached: Reached) -> float | None:
    """Return the mean over some targets of the least error of an unbiased attacker; None without noise of a density."""
    x = reached.trained.victim_x
    if reached.guard is None or not x.is_floating_point() or reached.trained.encoder is None:
        return None
    stage = copy.deepcopy(reached.trained.encoder.stage)
    found = dfil_of(stage, reached.guard, x[:BOUNDED].to(next(stage.buffers()).device), releases=reached.releases)
    return mse_bound(found).mean().item()


def _notes(trial: Trial, reached: Reached, adjacency: object) -> list[str]:
    notes = [f"loss of the last epoch: {reached.trained.losses[-1]:.4f}", *reached.notes]
    if adjacency is not None:
        notes += [f"strength: ε at δ = {trial.config.delta:g}, to {adjacency}", f"audit: {reached.audit}"]
        if reached.lower > reached.claims[0].epsilon:
            notes.append(f"REFUTED: the audit finds ε above {reached.lower:.4g}, more than is claimed")
    return notes


def _check_numbers(config: Config) -> None:
    for name, least in (("passes", 1), ("rounds", 1), ("steps", 1), ("canaries", 2), ("audit_draws", 100)):
        if getattr(config, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"expected --{option} of {least} or more, got {getattr(config, name)}")
    if config.passes > config.epochs:
        raise ValueError(
            f"expected --passes of at most the {config.epochs} --epochs, got {config.passes}: noise is made for as "
            "many releases as are made"
        )
    for name in ("clip", "sgd_lr"):
        if not 0 < getattr(config, name) < float("inf"):
            option = name.replace("_", "-")
            raise ValueError(f"expected --{option} above 0, got {getattr(config, name)}")
    if not 0 < config.rate <= 1:
        raise ValueError(f"expected --rate above 0 and of at most 1, got {config.rate}")


def _check(config: Config, splits: Splits) -> None:
    private, auxiliary = splits.private, splits.auxiliary
    if not private.x.is_floating_point():
        raise ValueError(
            f"expected inputs that noise can be calibrated for and inverted, got {private.name}, which holds tokens; "
            "use images, signals or a table"
        )
    if not 10 <= config.public <= len(auxiliary):
        raise ValueError(
            f"expected --public between 10 and {len(auxiliary)}, got {config.public}: clips are taken from public "
            "activations, never from private ones"
        )
    if config.attacks and not 1 <= config.targets <= len(private):
        raise ValueError(f"expected --targets between 1 and {len(private)}, got {config.targets}")
    most = int(0.8 * len(private))  # half of them join the private samples, and batches are to stay as large
    if "dpsgd" in config.mechanisms and min(config.canaries, len(auxiliary)) > most:
        raise ValueError(f"expected --canaries of at most {most}, got {config.canaries}: {len(private)} are private")
    if not 1 <= config.clients <= len(private):
        raise ValueError(f"expected --clients between 1 and {len(private)}, got {config.clients}")
    if not 0 < config.delta < 1 / len(private):
        raise ValueError(
            f"expected --delta above 0 and below one over the {len(private)} private samples, got {config.delta}"
        )


PRIVACY_UTILITY = Experiment(
    "privacy_utility",
    "What does an ε buy? Accuracy, leakage and an audit of each DP mechanism, on one axis of ε",
    Config,
    tasks,
)
