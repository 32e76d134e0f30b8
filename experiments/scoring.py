"""An attack on the activations, run on its view and scored outside of it, beside what one reaches who saw nothing."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import Tensor, nn

from attacks import Infiltration, Insider, Reconstruction
from experiments.ingredients import ATTACKS, PROTOCOLS
from experiments.parts import Aim, Attack, Shield
from experiments.progress import counted
from experiments.record import IMPROVING, Leakage
from experiments.training import Trained, Training, build_model
from splitlearn.cut import cut
from splitlearn.data import Splits
from splitlearn.metrics import score_reconstruction
from splitlearn.party import Guard, Learner
from splitlearn.threat import Encoder, Grants, View, granted, observe
from splitlearn.train import predict

__all__ = ["Attacked", "aim_of", "attack_victim", "fresh_bottom", "grants_of", "scored", "shown"]

SHOWN = 8  # reconstructions kept for the picture
KEPT = 25  # batches of the training, which stay in the view
STAGES = 2  # of a model whose second is the server's, down to the logits
UNDERTRAINED = 1.02  # times the error of the mean image


@dataclass(frozen=True)
class Attacked:
    """What several attacks on the activations got: fields of an ``Outcome``."""

    leakage: list[Leakage] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    visible: dict[str, list[str]] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def attack_victim(
    names: Sequence[str],
    trained: Trained,
    splits: Splits,
    training: Training,
    *,
    targets: int,
    releases: int,
    shield: Shield | None = None,
    among: Mapping[str, Attack] = ATTACKS,
) -> Attacked:
    """Let the victim send its first ``targets`` inputs, as often as ``releases`` says, and run each attack on that.

    An attack that takes part in the training has one of its own, under the same shield, of as many steps as it asks.
    """
    done = Attacked()
    _send(trained, targets, releases)
    for name in names:
        start = time.perf_counter()
        attack = replace(among[name], threat=replace(among[name].threat, releases=releases))
        top = trained.model[1] if isinstance(trained.model, nn.Sequential) and len(trained.model) == STAGES else None
        if attack.needs_top and top is None:
            done.notes.append(f"{name} was left out: the server holds no stage that puts out logits here")
            continue
        aim = aim_of(splits, training.seed, cut_at=training.cut, shield=shield)
        aim = aim if top is None else replace(aim, top=top)
        results: dict[str, Reconstruction] = {}
        x = trained.victim_x[:targets]
        for member, one in attack.build(aim).items():
            if attack.steps:
                victim, insider = _infiltrated(one, attack, training, splits, shield or Shield())
                _send(victim, targets, releases)
                results[member] = insider(_view(attack, victim, splits, training))
            else:
                results[member] = one(_view(attack, trained, splits, training))
        labelled = attack.threat.auxiliary_labels
        leak, x_hat = scored(name, results, splits, x, trained.victim_y[:targets], labels_known=labelled)
        done.seconds[f"attack_{name}"] = time.perf_counter() - start
        done.leakage.append(leak)
        done.visible[f"attacker ({name})"] = attack.in_words
        done.notes.extend(_doubts(leak))
        if attack.steps:
            batches = ceil(len(splits.private) / training.batch_size)
            epochs = _epochs(attack, training, splits)
            done.notes.append(
                f"{name}: the victim trained {counted(epochs * batches, 'step')} ({counted(epochs, 'epoch')}) under "
                f"it; utility is that of {counted(training.epochs, 'epoch')}"
            )
        done.images.update(shown(x, name, x_hat))
    return done


def aim_of(splits: Splits, seed: int, *, cut_at: str = "", shield: Shield | None = None) -> Aim:
    """Return what is public about the inputs that an attack is after, and the architecture of who holds them.

    Who knows the architecture knows the protection, which is part of it. A guard that goes with layers of its own is
    known there alone, since it cannot be put behind another stage.
    """
    private, shield = splits.private, shield or Shield()
    bounds = (0.0, 1.0) if private.kind == "image" else None
    stage = fresh_bottom(cut_at, splits, shield) if cut_at else nn.Identity
    guard = shield.guard if shield.layers is None else Guard()
    return Aim(tuple(private.x.shape[1:]), bounds, seed, private.num_classes, stage, guard=guard)


def fresh_bottom(place: str, splits: Splits, shield: Shield) -> Callable[[], nn.Module]:
    """Return what builds an untrained bottom below a cut, and what the shield does to its activations."""
    return _Fresh(place, splits, shield)


def shown(x: Tensor, name: str, x_hat: Tensor) -> dict[str, Tensor]:
    """Return the first originals and estimates for the pictures; nothing where inputs are no images."""
    return {"original": x[:SHOWN].cpu(), name: x_hat[:SHOWN].float().cpu()} if x.ndim == 4 else {}


def scored(
    name: str,
    results: Mapping[str, Reconstruction],
    splits: Splits,
    x: Tensor,
    y: Tensor,
    *,
    labels_known: bool = False,
) -> tuple[Leakage, Tensor]:
    """Return what the best member of an attack's family got of the private inputs ``x``, and its estimate.

    The attack saw its view and nothing else; ``x`` and the labels ``y`` serve to score what it returned. The advantage
    is over the mean image, or, with ``labels_known``, over that of the sample's class if that is better.
    """
    auxiliary = splits.auxiliary
    scores = {
        member: score_reconstruction(
            x, result.x_hat.to(x.device), auxiliary_x=auxiliary.x, y=y, auxiliary_y=auxiliary.y,
            labels_known=labels_known,
        )
        for member, result in results.items()
    }  # fmt: skip
    best = min(scores, key=lambda member: scores[member].metrics["mse"])
    score = scores[best]
    details = {
        "best": best,
        "mse_by_member": {member: score.metrics["mse"] for member, score in scores.items()},
        "evidence": {member: dict(result.evidence) for member, result in results.items()},
        # Who saw nothing does better: what failed is the attacker's training, and no protection has been shown to work.
        "undertrained": score.metrics["mse"] > UNDERTRAINED * score.baselines["mse_mean_image"],
    }
    leak = Leakage(
        attack=name, family="reconstruction", advantage=score.advantage, metrics=dict(score.metrics),
        baselines=dict(score.baselines), details=details,
    )  # fmt: skip
    return leak, results[best].x_hat


def _send(trained: Trained, targets: int, releases: int) -> None:
    assert trained.record is not None
    # What an evaluation sent is no part of it; of the training an attack may read the last samples.
    training = [one for one in trained.record.exchanges if one.request.verb in ("learn", "forward")][-KEPT:]
    trained.record.clear(keep=training)
    for _ in range(releases):
        predict(trained.chain, trained.victim_x[:targets])


def _view(attack: Attack, trained: Trained, splits: Splits, training: Training) -> View:
    assert trained.record is not None
    grants = replace(grants_of(splits, training), encoder=trained.encoder)
    return observe(trained.record, threat=attack.threat, grants=grants, device=training.device)


def grants_of(splits: Splits, training: Training) -> Grants:
    """Return the attacker's own samples, on the training's device; its threat decides what of them arrives."""
    auxiliary = splits.auxiliary
    return Grants(auxiliary_x=auxiliary.x.to(training.device), auxiliary_y=auxiliary.y.to(training.device))


def _infiltrated(
    infiltration: Infiltration, attack: Attack, training: Training, splits: Splits, shield: Shield
) -> tuple[Trained, Insider]:
    """Train for as many steps as the attack asks with its insider in the server's place; return both."""
    epochs = _epochs(attack, training, splits)
    before = granted(attack.threat, grants_of(splits, training))
    seated: list[Insider] = []

    def infiltrate(server: Learner) -> Insider:
        seated.append(infiltration.insider(server, before))
        return seated[0]

    train = PROTOCOLS[training.protocol].train
    return train(replace(training, epochs=epochs), splits, shield, infiltrate=infiltrate), seated[0]


def _epochs(attack: Attack, training: Training, splits: Splits) -> int:
    """Return how many epochs hold as many steps as the attack asks for."""
    return ceil(attack.steps / ceil(len(splits.private) / training.batch_size))


@dataclass(frozen=True)
class _Fresh:
    """Builds an untrained bottom of the victim's architecture, weights drawn from torch's global generator."""

    cut: str
    splits: Splits = field(repr=False)
    shield: Shield = field(repr=False)

    def __call__(self) -> nn.Module:
        bottom = cut(build_model(self.splits, seed=int(torch.randint(1 << 31, ()))), self.cut)[0]
        shaped = self.shield.shaped(bottom, self.splits.private.x[:1])
        bare = type(self.shield.guard) is Guard and self.shield.codec is None
        sent = Encoder(nn.Identity(), self.shield.guard, self.shield.codec)  # what guard and codec make of predictions
        return shaped if bare else nn.Sequential(shaped, sent)


def _doubts(leak: Leakage) -> list[str]:
    """Return what speaks against taking this leakage for all that there is."""
    if leak.details["undertrained"]:
        return [
            f"{leak.attack} is UNDERTRAINED: its error of {leak.metrics['mse']:.3g} is above the "
            f"{leak.baselines['mse_mean_image']:.3g} of the mean image; do not read it as a defense that works"
        ]
    return [f"{leak.attack} was still improving when its budget ended"] if leak.standing == IMPROVING else []
