"""An attack on the activations, run on its view and scored outside of it, beside what one reaches who saw nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from experiments.ingredients import ATTACKS
from experiments.parts import Aim, Attack
from experiments.record import Leakage
from experiments.training import Trained, Training
from splitlearn.data import Splits
from splitlearn.metrics import score_reconstruction
from splitlearn.threat import Grants, observe
from splitlearn.train import predict

__all__ = ["Attacked", "aim_of", "attack_victim", "attacked"]

SHOWN = 8  # reconstructions kept for the picture


@dataclass(frozen=True)
class Attacked:
    """What several attacks on the activations got: fields of an ``Outcome``."""

    leakage: list[Leakage] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    visible: dict[str, list[str]] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)


def attack_victim(
    names: Sequence[str], trained: Trained, splits: Splits, training: Training, *, targets: int, releases: int
) -> Attacked:
    """Let the victim send its first ``targets`` inputs, as often as ``releases`` says, and run each attack on that."""
    assert trained.record is not None
    done = Attacked()
    x, y = trained.victim_x[:targets], trained.victim_y[:targets]
    trained.record.clear()
    for _ in range(releases):
        predict(trained.chain, x)
    for name in names:
        start = time.perf_counter()
        attack = replace(ATTACKS[name], threat=replace(ATTACKS[name].threat, releases=releases))
        leak, x_hat = attacked(name, attack, trained, splits, x, y, training=training)
        done.seconds[f"attack_{name}"] = time.perf_counter() - start
        done.leakage.append(leak)
        done.visible[f"attacker ({name})"] = attack.threat.in_words()
        if x.ndim == 4:
            done.images.update({"original": x[:SHOWN].cpu(), name: x_hat[:SHOWN].cpu()})
    return done


def aim_of(splits: Splits, seed: int) -> Aim:
    """Return what is public about the inputs that an attack is after."""
    bounds = (0.0, 1.0) if splits.private.kind == "image" else None
    return Aim(tuple(splits.private.x.shape[1:]), bounds, seed)


def attacked(
    name: str, attack: Attack, trained: Trained, splits: Splits, x: Tensor, y: Tensor, *, training: Training
) -> tuple[Leakage, Tensor]:
    """Return what the best member of an attack's family got of the private inputs ``x``, and its estimate.

    The attack sees its view and nothing else; ``x`` and the labels ``y`` serve to score what it returns, ``y`` for
    the baseline of the class-mean image alone: the advantage is over the mean image.
    """
    assert trained.record is not None
    auxiliary = splits.auxiliary
    grants = Grants(trained.encoder, auxiliary.x.to(training.device))
    view = observe(trained.record, threat=attack.threat, grants=grants, device=training.device)
    results = {member: one(view) for member, one in attack.build(aim_of(splits, training.seed)).items()}
    scores = {
        member: score_reconstruction(
            x, result.x_hat.to(x.device), auxiliary_x=auxiliary.x, y=y, auxiliary_y=auxiliary.y
        )
        for member, result in results.items()
    }
    best = min(scores, key=lambda member: scores[member].metrics["mse"])
    details = {
        "best": best,
        "mse_by_member": {member: score.metrics["mse"] for member, score in scores.items()},
        "evidence": {member: dict(result.evidence) for member, result in results.items()},
    }
    score = scores[best]
    leak = Leakage(
        attack=name, family=attack.family, advantage=score.advantage, metrics=dict(score.metrics),
        baselines=dict(score.baselines), details=details,
    )  # fmt: skip
    return leak, results[best].x_hat
