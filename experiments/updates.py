"""Attacks on the updates of a federation: one round of FedAvg, one sample and one step of SGD a member."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.gradients import (
    DLG,
    IDLG,
    AnalyticInversion,
    BottomGradientMatching,
    InvertingGradients,
    UpdateLabels,
    seen_updates,
)
from experiments.experiment import Options, reproduction
from experiments.parts import Aim, told
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import aim_of, scored, shown
from experiments.training import Training, build_model, depths, described, load_splits
from splitlearn.cut import cut
from splitlearn.data import Splits
from splitlearn.federation import Member, RemoteMember, fedavg_round, splitfed_v1_round
from splitlearn.frames import Kind
from splitlearn.metrics import accuracy_advantage
from splitlearn.party import Learner
from splitlearn.service import Service
from splitlearn.threat import Threat, View, observe
from splitlearn.wire import Framed, Recorded, serve

__all__ = ["UPDATE_ATTACKS", "update_tasks"]

LR = 0.1  # of the members' step; public
UPDATES = Threat(name="honest-but-curious fed server", sees=frozenset({Kind.WEIGHTS, Kind.UPDATE, Kind.COUNT}))
HIDDEN = 32  # units of the small net


@dataclass(frozen=True)
class UpdateAttack:
    """An attack on updates. ``net`` is the model that is trained: ``sigmoid``, small and smooth, or the ``cnn``."""

    summary: str
    net: str
    build: Callable[[nn.Module, Aim], Any]
    labels: bool = False  # whether it is after labels, not inputs
    below: bool = False  # whether the fed server sees the bottom alone (SplitFed)


SEEN = partial(seen_updates, lr=LR)
UPDATE_ATTACKS: dict[str, UpdateAttack] = {
    "analytic": UpdateAttack(
        "the input of a fully connected first layer from its gradient (Phong et al. 2018)",
        "sigmoid",
        lambda model, aim: AnalyticInversion(model, SEEN, aim.shape, bounds=aim.bounds),
    ),
    "dlg": UpdateAttack(
        "deep leakage from gradients, small smooth net (Zhu et al. 2019)",
        "sigmoid",
        lambda model, aim: DLG(model, SEEN, aim.shape, bounds=aim.bounds, seed=aim.seed),
    ),
    "idlg": UpdateAttack(
        "the same with the label read off first (Zhao et al. 2020)",
        "sigmoid",
        lambda model, aim: IDLG(model, SEEN, aim.shape, bounds=aim.bounds, seed=aim.seed),
    ),
    "update_labels": UpdateAttack(
        "labels by the sign of the last layer's gradient (Zhao et al. 2020)",
        "cnn",
        lambda model, aim: UpdateLabels(model, SEEN),
        labels=True,
    ),
    "inverting_gradients": UpdateAttack(
        "inverting gradients by their cosine (Geiping et al. 2020)",
        "cnn",
        lambda model, aim: InvertingGradients(model, SEEN, aim.shape, bounds=aim.bounds, seed=aim.seed),
    ),
    "bottom_gradient": UpdateAttack(
        "SplitFed's fed server alone: the bottom's gradient, that at the cut unknown (at the deepest of three cuts)",
        "cnn",
        lambda model, aim: BottomGradientMatching(model, SEEN, aim.shape, bounds=aim.bounds, seed=aim.seed, restarts=2),
        below=True,
    ),
}


@dataclass(frozen=True)
class Trial:
    """All update attacks of one protocol, on the first step of an untrained model."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    attacks: tuple[str, ...]
    targets: int

    def described(self, splits: Splits) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on, those of the attacks included."""
        aim = aim_of(splits, 0)
        return {
            **described(self.data, self.sizes, self.training),
            "lr": LR,
            "targets": self.targets,
            "attacks": {
                name: _described(UPDATE_ATTACKS[name], splits, self.training.cut, aim) for name in self.attacks
            },
        }


def update_tasks(name: str, config: Any, options: Options, *, sizes: tuple[int, int, int]) -> list[Task]:
    """Return a task for each protocol whose fed server reads updates, and seed. ``config`` has the attacks' names.

    The fed server of SplitFed is given the gradient of the bottom below the deepest of the usual cuts.
    """
    if not config.update_attacks:
        return []
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    if not splits.private.x.is_floating_point():
        raise ValueError(
            f"expected inputs that are numbers for {', '.join(config.update_attacks)}, got {options.data}, which holds "
            "tokens; use --update-attacks ''"
        )
    found = []
    for protocol, below in (("fedavg", False), ("splitfed_v1", True)):
        chosen = tuple(one for one in config.update_attacks if UPDATE_ATTACKS[one].below is below)
        for seed in options.seeds if chosen else ():
            place = depths(splits)[-1] if below else ""
            training = Training(protocol=protocol, cut=place, epochs=1, batch_size=1, optimizer="sgd", lr=LR, seed=seed)
            trial = Trial(options.data, sizes, training, chosen, config.update_targets)
            alone = replace(config, attacks=(), update_attacks=chosen)
            command = reproduction(name, alone, data=options.data, device="cpu", seed=seed)
            labels = {
                "seed": seed, "data": options.data, "protocol": protocol, "cut": place, "protection": "none",
                "strength": "",
            }  # fmt: skip
            call = partial(run_trial, trial, options.data_dir)
            found.append(Task(name, trial.described(splits), command, labels, call))
    return found


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Have each target's owner take one step, and attack what the fed server sees of it."""
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    x, y = splits.private.x[: trial.targets], splits.private.y[: trial.targets]
    seconds, leakage = {}, []
    images: dict[str, Tensor] = {}
    aim = aim_of(splits, trial.training.seed)
    for name in trial.attacks:
        attack, begun = UPDATE_ATTACKS[name], time.perf_counter()
        model = _net(attack, splits, trial.training.seed)
        known, view = _round(model, x.to(next(model.parameters()).dtype), y, place=trial.training.cut)
        found = attack.build(known, aim)(view)
        seconds[f"attack_{name}"] = time.perf_counter() - begun
        if attack.labels:
            leakage.append(_label_leakage(name, found, splits, y))
            continue
        leak, x_hat = scored(name, {name: found}, splits, x, y)
        leakage.append(leak)
        images |= shown(x, name, x_hat)
    return Outcome(
        leakage=leakage, seconds=seconds, images=images,
        visible={"fed server": ["the weights before and after each member's step", "how many samples it has"]},
        notes=[f"untrained model, one sample and one step of SGD a member, lr {LR:g}, {len(x)} members"],
    )  # fmt: skip


def _round(model: nn.Sequential, x: Tensor, y: Tensor, *, place: str) -> tuple[nn.Module, View]:
    """Return the part of the model that the fed server knows, and its view of one round, a sample a member."""
    bottom, top = cut(model, place) if place else (model, None)
    known, main = copy.deepcopy(bottom), None if top is None else Learner("main", top, _sgd(top))
    sessions = {} if main is None else {f"c{n}": main.replica(f"c{n}") for n in range(len(x))}
    members = []
    for n in range(len(x)):
        own = copy.deepcopy(bottom)
        batch = (x[n : n + 1], y[n : n + 1])
        members.append(Member(Learner(f"c{n}", own, _sgd(own)), sessions.get(f"c{n}"), [batch]))
    records = [Recorded(Service({member.name: member})) for member in members]
    remote = [
        RemoteMember(member.name, Framed(serve(record)), member.name)
        for member, record in zip(members, records, strict=True)
    ]
    everywhere = Learner("all", bottom)
    if main is None:
        fedavg_round(remote, everywhere)
    else:
        splitfed_v1_round(remote, sessions, everywhere, main)
    return known, observe(*records, threat=UPDATES)


def _described(attack: UpdateAttack, splits: Splits, place: str, aim: Aim) -> dict[str, Any]:
    """Return what an attack's result depends on: its settings, and the net whose updates it reads, as for seed 0."""
    model = _net(attack, splits, seed=0)
    built = attack.build(cut(model, place)[0] if place else model, aim)
    return {"net": attack.net, "below": attack.below, "labels": attack.labels, "settings": told(built)}


def _sgd(stage: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(stage.parameters(), lr=LR)


def _net(attack: UpdateAttack, splits: Splits, seed: int) -> nn.Sequential:
    """Return a fresh model: that of the experiments, or a small one of sigmoids, in float64."""
    if attack.net == "cnn":
        return build_model(splits, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = splits.private.x[0].numel()
        hidden, outputs = nn.Linear(features, HIDDEN), nn.Linear(HIDDEN, splits.private.num_classes)
        return nn.Sequential(nn.Flatten(), hidden, nn.Sigmoid(), outputs).double()


def _label_leakage(name: str, found: Tensor, splits: Splits, y: Tensor) -> Leakage:
    """Return the share of labels that was right, beside the share of the auxiliary samples' commonest class."""
    right = float((found.cpu() == y).double().mean())
    blind = float((y == splits.auxiliary.y.bincount().argmax()).double().mean())
    return Leakage(
        attack=name, family="label", advantage=accuracy_advantage(right, blind), metrics={"accuracy": right},
        baselines={"accuracy_commonest_class": blind}, details={"of": f"{len(y)} labels, one a member"},
    )  # fmt: skip
