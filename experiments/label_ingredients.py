"""Names become label attacks and label protections here, and only here, one line each.

They stand in `splitlearn list`, in `--help`, and in the grid of `label_leakage`.
"""

from collections.abc import Callable
from functools import cache

from attacks import (
    AveragedGradients,
    CosineScores,
    ExPLoit,
    HintedHead,
    ModelCompletion,
    NormScores,
    Similarity,
    Spectral,
)
from defenses.labels import (
    BottleneckedTop,
    CoAE,
    FedPass,
    Isotropic,
    LabelDecorrelation,
    Marvell,
    MaxNorm,
    Mixup,
)
from defenses.labels.observed import Observing
from experiments.parts import LabelAim, LabelAttack, LabelProtection, LabelShield, number, told
from privacy.dp import ForwardCrossEntropy, LaplaceLabels, RandomisedResponse
from splitlearn.frames import Kind

__all__ = ["LABEL_ATTACKS", "LABEL_PROTECTIONS"]

COMPLETED = 4  # times the hints of other attacks, of each class


def untrained(aim: LabelAim) -> ModelCompletion:
    """Return model completion from a fresh bottom: what inputs and known labels tell without any training."""
    return ModelCompletion(aim.classes, bottom=aim.bottom, seed=aim.seed)


LABEL_ATTACKS: dict[str, LabelAttack] = {
    "norm": LabelAttack(
        "norms of gradients: those of the rarer class are greater (Li et al. 2022)", lambda aim: NormScores(aim.rare),
        binary=True, shares=True,
    ),
    "cosine": LabelAttack(
        "cosine of gradients with those of known positives (Li et al. 2022)", lambda aim: CosineScores(),
        hinted=1, binary=True,
    ),
    "similarity": LabelAttack(
        "gradients nearest to those of known samples, by cosine (Liu & Lyu 2022)",
        lambda aim: Similarity(aim.classes, seed=aim.seed), hinted=1,
    ),
    "activations": LabelAttack(
        "activations nearest to those of known samples (Liu & Lyu 2022)",
        lambda aim: Similarity(aim.classes, Kind.ACTIVATION, seed=aim.seed), hinted=1,
    ),
    "clustering": LabelAttack(
        "clusters of gradients, nothing known; the best names count (Liu & Lyu 2022)",
        lambda aim: Similarity(aim.classes, seed=aim.seed),
    ),
    "spectral": LabelAttack(
        "activations along their first singular direction (Sun et al. 2022)", lambda aim: Spectral(aim.rare),
        binary=True, hinted=1,
    ),
    "averaged": LabelAttack(
        "gradients added up over all epochs so far, along their first singular directions (Tran et al. 2018)",
        lambda aim: AveragedGradients(aim.classes, seed=aim.seed), hinted=1, remembers=True,
    ),
    "exploit": LabelAttack(
        "ExPLoit: a surrogate top and surrogate labels that make the gradients seen (Kariyappa & Qureshi 2021)",
        lambda aim: ExPLoit(aim.classes, prior=aim.shares or None, seed=aim.seed), hinted=1, shares=True,
    ),
    "head": LabelAttack(
        "own bottom as it is, a head on it from few known labels (Fu et al. 2022, without its semi-supervision)",
        lambda aim: HintedHead(aim.classes, seed=aim.seed), hinted=COMPLETED, own_inputs=True,
        blind=untrained,
    ),
    "completion": LabelAttack(
        "model completion: own bottom, a head by MixMatch from few known labels (Fu et al. 2022)",
        lambda aim: ModelCompletion(aim.classes, seed=aim.seed), hinted=COMPLETED, own_inputs=True,
        blind=untrained,
    ),
}  # fmt: skip


def responded(strength: str, classes: int, seed: int) -> LabelShield:
    """Return label differential privacy by randomised response, answered once, with a loss that knows it."""
    mechanism = RandomisedResponse(number(strength, "an ε"), classes)
    loss = ForwardCrossEntropy(mechanism)
    return LabelShield(
        labels=mechanism.label, loss=loss, epsilon=mechanism.epsilon, settings=told(loss),
        notes=("ε (δ = 0) to the change of one label: each is answered once, inputs are the other party's own",),
    )  # fmt: skip


def perturbed(strength: str, classes: int, seed: int) -> LabelShield:
    """Return labels that Laplace noise is added to at every step; the ε is that of one."""
    return LabelShield(
        LaplaceLabels(number(strength, "an ε"), classes),
        notes=("no ε is claimed: that of one step adds up over the epochs, in each of which a label is noised anew",),
    )


def observing(make: Callable[[float], Observing], what: str) -> Callable[[str, int, int], LabelShield]:
    """Return what builds the shield of an owner who watches what enters its stage."""

    def build(strength: str, classes: int, seed: int) -> LabelShield:
        one = make(number(strength, what))
        return LabelShield(top=one.top, loss=one.loss, settings=told(one))

    return build


@cache
def confused(strength: str, classes: int, seed: int) -> LabelShield:
    """Return the confusional autoencoder's soft labels, and how outputs are read."""
    code = CoAE.fitted(classes, number(strength, "a weight"), seed)
    return LabelShield(labels=code.labels, decode=code.decode, settings=told(code))


def with_passports(strength: str, classes: int, seed: int) -> LabelShield:
    """Return secret passports in the owner's layers, others in every trial."""
    passports = FedPass(number(strength, "a reach"), seed=seed)
    return LabelShield(top=passports, settings=told(passports))


LABEL_PROTECTIONS: dict[str, LabelProtection] = {
    "none": LabelProtection("nothing: gradients as they are", "", ("",), lambda *_: LabelShield(), "similarity"),
    "marvell": LabelProtection(
        "Marvell: noise by class that hides best for its power (Li et al. 2022)", "power, of the gap's square",
        ("1", "4"), lambda s, *_: LabelShield(Marvell(number(s, "a strength"))), "averaged", binary=True,
    ),
    "max_norm": LabelProtection(
        "max-norm: each gradient as long as the longest, in the mean (Li et al. 2022)", "", ("",),
        lambda *_: LabelShield(MaxNorm()), "averaged",
    ),
    "isotropic": LabelProtection(
        "Gaussian noise alike in all directions (Li et al. 2022)", "ratio to the longest gradient", ("1", "4"),
        lambda s, *_: LabelShield(Isotropic(number(s, "a ratio"))), "averaged",
    ),
    "label_dp": LabelProtection(
        "randomised response on labels, once, with a loss that knows it", "ε", ("1", "4"), responded, "clustering",
    ),
    "perturbed": LabelProtection(
        "labels with Laplace noise, anew at each step (TPSL, Yang et al. 2022)", "ε of one step", ("1", "4"),
        perturbed, "averaged",
    ),
    "coae": LabelProtection(
        "confusional autoencoder: soft labels that only its decoder reads (Zou et al. 2022)", "weight of the entropy",
        ("1",), confused, "similarity",
    ),
    "label_mid": LabelProtection(
        "a variational bottleneck at the owner's entrance (Zou et al. 2023)", "weight of the rate", ("0.001", "0.01"),
        observing(BottleneckedTop, "a weight"), "completion",
    ),
    "label_dcor": LabelProtection(
        "distance correlation of activations and labels as a penalty (Sun et al. 2022)", "weight", ("1", "4"),
        observing(LabelDecorrelation, "a weight"), "completion",
    ),
    "fedpass": LabelProtection(
        "FedPass: secret passports scale and shift the owner's layers (Gu et al. 2023)", "reach of the passports",
        ("10",), with_passports, "completion",
    ),
    "mixup": LabelProtection(
        "mixup of activations and labels at the owner (Zhang et al. 2018)", "alpha", ("1",),
        observing(Mixup, "an alpha"), "averaged",
    ),
}  # fmt: skip
