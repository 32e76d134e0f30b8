"""An attack on the activations, run on its view and scored outside of it, beside what one reaches who saw nothing."""

from torch import Tensor

from experiments.parts import Aim, Attack
from experiments.record import Leakage
from experiments.training import Trained, Training
from splitlearn.data import Splits
from splitlearn.metrics import score_reconstruction
from splitlearn.threat import Grants, observe

__all__ = ["SHOWN", "aim_of", "attacked"]

SHOWN = 8  # reconstructions kept for the picture


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
