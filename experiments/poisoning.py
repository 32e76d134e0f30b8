"""What do bad members do to a federation, and what survives them? Attacks × defenses × protocols; four questions of it.

A trial is one defense under one protocol: a training without attack, and one with each attack. Utility is that of the
first. Of an attack on accuracy the advantage is the share of what the training had gained over the commonest class that
the attack took away; of a backdoor its success, over that of the same trigger on the unattacked model and over what the
attacked model takes for the class without any trigger, so that a model that answers nothing else is no success.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defenses.aggregation import Robust
from experiments.bad_members import (
    Federated,
    Sabotage,
    Safeguard,
    answers,
    federate,
    member_shares,
)
from experiments.experiment import Experiment, Options, reproduction
from experiments.names import find
from experiments.parts import told
from experiments.poison_ingredients import POISON_ATTACKS, POISON_DEFENSES, VERTICAL, PoisonAim
from experiments.poison_options import Backdoor, Config, Privacy, Surface
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.training import (
    Training,
    build_model,
    described,
    device_of,
    load_splits,
    places,
    sizes_of,
    warm_up,
)
from experiments.vertical_poison import KNOWN, train_vertically
from splitlearn.cut import cut
from splitlearn.data import DATASETS, Splits
from splitlearn.metrics import accuracy_advantage, utility

__all__ = ["BACKDOOR", "POISONING", "PRIVACY_MEETS_POISONING", "ROUNDS", "SURFACE", "Config"]

ROUNDS = {"splitfed_v1": 40, "splitfed_v2": 30, "splitfed_v3": 30, "parallel": 40, "fedavg": 30, "vertical": 30}
RATES = {
    "splitfed_v1": 0.05,
    "splitfed_v2": 0.02,
    "splitfed_v3": 0.05,
    "parallel": 0.05,
    "fedavg": 0.05,
    "vertical": 0.05,
}
UNCUT = ("fedavg", VERTICAL)  # members hold whole models, or small ones of their own
CLIPPED_RATE = 0.03  # of a shared top whose steps are clipped


@dataclass(frozen=True)
class Trial:
    """One defense under one protocol, against no attack and each of several."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    defense: str
    attacks: tuple[str, ...]
    bad: int
    alpha: float

    def described(self, splits: Splits) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        aim = aim_of(replace(self, training=replace(self.training, seed=0)), splits)
        return {
            **described(self.data, self.sizes, self.training),
            "bad": self.bad, "alpha": self.alpha,
            "defense": {"name": self.defense, **_settings(POISON_DEFENSES[self.defense].build(self.bad, aim.members))},
            "attacks": {name: _settings(POISON_ATTACKS[name].build(aim)) for name in self.attacks},
        }  # fmt: skip


def tasks(config: Config, options: Options, *, name: str) -> list[Task]:
    """Return one task for each protocol, cut, defense, number of bad members, alpha and seed; all is checked first."""
    find("data set", options.data, DATASETS)
    for one in config.attacks:
        find("attack", one, POISON_ATTACKS)
    for one in config.defenses:
        find("defense", one, POISON_DEFENSES)
    for one in config.protocols:
        find("protocol", one, ROUNDS)
    _check(config)
    device = device_of(options.device)
    sizes = _sizes(options.data, config)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    if splits.private.kind == "tokens":
        raise ValueError(f"expected inputs that are numbers, got {options.data}, which holds tokens")
    for one in config.defenses:
        if POISON_DEFENSES[one].images and splits.private.kind != "image":
            raise ValueError(f"expected images for {one}, got {options.data}; leave it out, or take another --data")
    federations = any(protocol != VERTICAL for protocol in config.protocols)
    for alpha, seed in product(config.alphas if federations else (), options.seeds):
        member_shares(splits.private.y, config.clients, alpha, seed)  # too few samples are told now
    found = []
    for protocol in config.protocols:
        attacks = tuple(one for one in config.attacks if protocol in POISON_ATTACKS[one].protocols)
        defenses = [one for one in config.defenses if attacks and protocol in POISON_DEFENSES[one].protocols]
        cuts = places(config.cuts, splits)[: 1 if protocol in UNCUT else None]
        clients, bads, alphas = config.clients, config.bad, config.alphas
        if protocol == VERTICAL:  # two halves of every sample, one of them bad
            clients, bads, alphas = 2, (1,), (0.0,)
        for place, defense, bad in product(cuts, defenses, bads):
            _check_limit(defense, bad, config, protocol)
            lr = config.lr or _rate(protocol, defense, bad, clients)
            for alpha, seed in product(alphas, options.seeds):
                training = Training(
                    protocol=protocol, cut=place, epochs=config.rounds or ROUNDS[protocol],
                    batch_size=config.batch_size, optimizer="sgd", lr=lr, clients=clients, seed=seed,
                    device=device,
                )  # fmt: skip
                trial = Trial(options.data, sizes, training, defense, attacks, bad, alpha)
                alone = replace(
                    config, protocols=(protocol,), cuts=(place,), defenses=(defense,), bad=(bad,), alphas=(alpha,)
                )
                command = reproduction(name, alone, data=options.data, device=device, seed=seed)
                labels = {
                    "seed": seed, "data": options.data, "protocol": protocol,
                    "cut": "" if protocol in UNCUT else place, "protection": defense,
                    "strength": f"{bad} of {clients} bad" + ("" if protocol == VERTICAL else f", α {alpha:g}"),
                }  # fmt: skip
                call = partial(run_trial, trial, options.data_dir)
                found.append(Task(name, trial.described(splits), command, labels, call))
    if not found:
        raise ValueError(
            f"expected a protocol in which attacks and defenses have a surface, got {', '.join(config.protocols)} with "
            f"{', '.join(config.attacks)} and {', '.join(config.defenses)}; see splitlearn list poisoning"
        )
    return found


def _rate(protocol: str, defense: str, bad: int, clients: int) -> float:
    """Return the usual learning rate; a shared top that is not clipped diverges sooner."""
    clipped = POISON_DEFENSES[defense].build(bad, clients).clip is not None
    return CLIPPED_RATE if clipped and protocol == "splitfed_v2" else RATES[protocol]


def _check(config: Config) -> None:
    """Refuse numbers that no federation can be made of."""
    if config.clients < 2:
        raise ValueError(f"expected --clients of 2 or more, one of them bad, got {config.clients}")
    for bad in config.bad:
        if not 1 <= bad < config.clients:
            raise ValueError(f"expected --bad members from 1 to {config.clients - 1} of {config.clients}, got {bad}")
    if config.rounds < 0:
        raise ValueError(f"expected --rounds of 0 (the usual number) or more, got {config.rounds}")
    if config.auxiliary < 1:
        raise ValueError(f"expected --auxiliary of 1 sample or more, got {config.auxiliary}")
    if not config.attacks:
        raise ValueError("expected at least one attack, got none: nothing to do; name one with --attacks")


def _check_limit(defense: str, bad: int, config: Config, protocol: str) -> None:
    """Refuse more bad members than a rule is defined for, and fewer members or rounds than a defense needs."""
    entry, rounds = POISON_DEFENSES[defense], config.rounds or ROUNDS[protocol]
    entry.build(bad, config.clients)
    rule = entry.rule
    least = max(entry.least_members, rule(bad, config.clients).least if rule is not None else 0)
    if least > config.clients:
        raise ValueError(
            f"expected at least {least} clients for {defense} against {bad} bad ones, got {config.clients}; lower "
            "--bad, raise --clients, or leave it out"
        )
    if rounds < entry.least_rounds:
        raise ValueError(f"expected at least {entry.least_rounds} rounds for {defense}, got {rounds}; raise --rounds")


def aim_of(trial: Trial, splits: Splits) -> PoisonAim:
    """Return what is public to the bad members."""
    defense, training = POISON_DEFENSES[trial.defense], trial.training
    rule = None if defense.rule is None else defense.rule(trial.bad, training.clients)
    bounds = (0.0, 1.0) if splits.private.kind == "image" else None
    bottom = partial(_bottom, replace(training, seed=training.seed + 1), splits)  # another start than the members'
    return PoisonAim(splits.private.num_classes, training.clients, trial.bad, bounds, training.seed, rule, bottom)


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train without attack, then with each, and return what came of it."""
    warm_up()
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    defense, aim = POISON_DEFENSES[trial.defense], aim_of(trial, splits)
    x, y = splits.test.x.to(trial.training.device), splits.test.y.to(trial.training.device)
    seconds: dict[str, float] = {}
    claims = []

    def trained(name: str, sabotage: Sabotage) -> Federated:
        begun = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial.training.seed)
            safeguard = defense.build(trial.bad, trial.training.clients)
            if trial.training.protocol == VERTICAL:
                done = train_vertically(trial.training, splits, sabotage=sabotage, safeguard=safeguard)
            else:
                done = federate(
                    trial.training, splits, alpha=trial.alpha, bad=trial.bad, sabotage=sabotage, safeguard=safeguard
                )
        claims.extend([safeguard.account.claim()] if safeguard.account is not None else [])
        seconds[name] = time.perf_counter() - begun
        return done

    clean = trained("train", Sabotage())
    worth = utility(clean.logits(x).nan_to_num(), y)
    worth["accuracy"] = _accuracy(clean, x, y)
    traces = {"accuracy (no attack)": clean.accuracy}
    leakage, notes = [], [clean.stopped] if clean.stopped else []
    if worth["accuracy"] <= torch.bincount(y).max().item() / len(y):
        notes.append("nothing was learned even without attack: what attacks did says nothing of the defense")
    for name in trial.attacks:
        sabotage = POISON_ATTACKS[name].build(aim)
        done = trained(f"attack_{name}", sabotage)
        leakage.append(_scored(name, sabotage, done, clean, x, y))
        traces[f"accuracy ({name})"] = done.accuracy
        notes += [f"{name}: {done.stopped}"] if done.stopped else []
    if trial.training.protocol != VERTICAL:
        parameters = sum(one.numel() for one in _bottom(trial.training, splits).parameters())
        notes.append(f"{parameters} parameters of bottoms are averaged; bad members: {clean.bad}")
    return Outcome(
        utility=worth, leakage=leakage, seconds=seconds, nbytes=clean.nbytes, traces=traces,
        visible={f"attacker ({name})": POISON_ATTACKS[name].in_words for name in trial.attacks},
        epsilon=claims[0].epsilon if claims else None, delta=claims[0].delta if claims else None,
        notes=notes,
    )  # fmt: skip


def _scored(name: str, sabotage: Sabotage, done: Federated, clean: Federated, x: Tensor, y: Tensor) -> Leakage:
    """Return what one attack did, beside the training that nobody attacked."""
    metrics, unattacked = {"accuracy": _accuracy(done, x, y)}, _accuracy(clean, x, y)
    baselines = {"accuracy_unattacked": unattacked}
    trigger = done.trigger or sabotage.trigger
    if trigger is not None or sabotage.tail is not None:
        others = y != sabotage.target
        meant = others if sabotage.tail is None else torch.zeros_like(others)
        if sabotage.tail is not None:
            meant[sabotage.tail.rows(x, y)] = True

        def success(model: Federated, trigger: Callable[[Tensor], Tensor] | None, on: Tensor) -> float:
            said = answers(model.logits(x, trigger, inner=sabotage.on_activations))[on]
            return (said == sabotage.target).double().mean().item()

        metrics["success"] = success(done, trigger, meant)
        baselines["success_unattacked"] = success(clean, trigger, meant)
        baselines["success_untriggered"] = success(done, None, others)
        best = max(baselines["success_unattacked"], baselines["success_untriggered"])
        advantage = accuracy_advantage(metrics["success"], best) if best < 1 else 0.0
    else:
        gained = unattacked - torch.bincount(y).max().item() / len(y)
        advantage = min(1.0, max(0.0, (unattacked - metrics["accuracy"]) / gained)) if gained > 0 else 0.0
    if done.out:
        bad, honest = set(done.bad), done.members - len(done.bad)
        metrics["out_of_bad"] = sum(len(bad & set(one)) for one in done.out) / (len(done.out) * len(bad))
        metrics["out_of_honest"] = sum(len(set(one) - bad) for one in done.out) / (len(done.out) * honest)
    if clean.out:
        baselines["out_unattacked"] = sum(map(len, clean.out)) / (len(clean.out) * clean.members)
    if done.flagged is not None:
        found = {"flagged_poison": done.flagged.tpr, "flagged_honest": done.flagged.fpr}
        metrics |= {what: rate for what, rate in found.items() if rate == rate}  # nan where nobody is poisoned, or all
    if clean.flagged is not None:
        baselines["flagged_honest_unattacked"] = clean.flagged.fpr
    if clean.suspects is not None and done.suspects is not None:
        metrics |= _classes(done.suspects, sabotage)
        baselines |= _classes(clean.suspects, sabotage, "_unattacked")
    details = {
        "best": name, "surface": POISON_ATTACKS[name].surface, "bad": done.bad, "not_finite": done.lost,
        "skipped_steps": done.skipped, "stopped": done.stopped,
    }  # fmt: skip
    return Leakage(
        attack=name, family=POISON_ATTACKS[name].goal, advantage=advantage, metrics=metrics, baselines=baselines,
        details=details,
    )  # fmt: skip


def _classes(classes: Tensor, sabotage: Sabotage, suffix: str = "") -> dict[str, float]:
    """Return whether the trigger's class is among those flagged [C], and what share of the others is."""
    others = torch.arange(len(classes)) != (sabotage.target if sabotage.trigger is not None else -1)
    found = {f"flagged_others{suffix}": classes[others].double().mean().item()}
    return found if bool(others.all()) else {f"flagged_target{suffix}": float(classes[sabotage.target]), **found}


def _accuracy(model: Federated, x: Tensor, y: Tensor) -> float:
    return (answers(model.logits(x)) == y).double().mean().item()


def _bottom(training: Training, splits: Splits) -> torch.nn.Module:
    """Return a fresh bottom as members start with; the whole model in FedAvg."""
    model = build_model(splits, seed=training.seed).to(training.device)
    return model if training.protocol == "fedavg" else cut(model, training.cut)[0]


def _sizes(data: str, config: Config) -> tuple[int, int, int]:
    usual = DATASETS[data].sizes
    auxiliary = config.auxiliary
    private = config.private or usual[0] + usual[1] - auxiliary
    return sizes_of(data, private=private, auxiliary=auxiliary)


def _settings(thing: Sabotage | Safeguard) -> dict[str, str]:
    """Return what is set, as text: a function that makes something shows what it makes."""
    found = {}
    for key, value in vars(thing).items():
        made: object = value
        if key in ("data", "guard") and value is not None:
            made = value(0)
        if key == "villain" and value is not None:
            made = value(tuple(range(KNOWN)))
        if key == "noise" and value is not None:
            made = value()
        if value not in (None, False, 0):
            found[key] = told(made.rule if isinstance(made, Robust) else made)
    return found


POISONING = Experiment(
    "poisoning",
    "What do bad members do to accuracy, and what survives? Attacks × defenses × protocols, the worst attack counts",
    Config,
    partial(tasks, name="poisoning"),
)
BACKDOOR = Experiment(
    "backdoor",
    "Does a backdoor get in, and at what accuracy is it kept out? Backdoors × defenses × protocols",
    Backdoor,
    partial(tasks, name="backdoor"),
)
SURFACE = Experiment(
    "surface",
    "Which surface does a defense cover, and how deep is the cut? One attack a surface × defenses × depths",
    Surface,
    partial(tasks, name="surface"),
)
PRIVACY_MEETS_POISONING = Experiment(
    "privacy_meets_poisoning",
    "Does what is there for privacy help against poison? Clipping and noise × attacks, with the ε that they claim",
    Privacy,
    partial(tasks, name="privacy_meets_poisoning"),
)
