"""Names become objects here, and only here: protections, attacks and protocols, one line each.

To add one: write its file and its test row, then its line below. It then stands in `splitlearn list`, in `--help`,
and in the grids and the report of every experiment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from attacks import FORA, FSHA, PCAT, SDAR, URVFL, MaximumLikelihood, Shadow, SplitSpy, UnSplit, decoder_family
from defenses import (
    MID,
    AdversarialRepresentation,
    Binarised,
    Bottleneck,
    Disco,
    Dropout,
    GaussianNoise,
    LaplaceNoise,
    NoPeek,
    PatchShuffle,
    Quantised,
    ResSFL,
    TopKActivations,
)
from defenses.detectors import GradientsScrutinizer, SplitGuard, SplitOut, honest_gradients
from experiments import encrypted, setups, shares
from experiments.compressed import COMPRESSIONS, compressed
from experiments.parts import (
    CONTINUOUS,
    Aim,
    Attack,
    BuiltAttack,
    DetectorEntry,
    Protection,
    Protocol,
    Shield,
    Watched,
    number,
    whole,
)
from privacy.dp import ClippedGaussian, ClippedLaplace
from splitlearn.guard import Guard
from splitlearn.threat import Threat
from splitlearn.train import Batches

__all__ = ["ATTACKS", "BUILT_ATTACKS", "DETECTORS", "PROTECTIONS", "PROTOCOLS"]

WHITE_BOX = Threat(white_box=True, auxiliary=True)
UNLABELLED = Threat(auxiliary=True)
LABELLED = Threat(auxiliary=True, auxiliary_labels=True)
QUERIES = Threat(queries=True, auxiliary=True)
SIMULATORS = 2  # that a server can train beside one training; some find no way to the client's activations


@dataclass(frozen=True)
class Simulated:
    """What SplitOut is given: honest gradients of one ``part``-th of the client's data, for as many steps as it has."""

    part: int = 4

    def __call__(self, on: Watched) -> dict[str, Any]:
        """Simulate the training."""
        share, training = len(on.private) // self.part, on.training
        own = Batches(on.private.x[:share], on.private.y[:share], batch_size=training.batch_size, seed=training.seed)
        adam = partial(torch.optim.Adam, lr=training.lr)
        return {"honest": honest_gradients(on.learner, on.guess, adam, own, epochs=self.part * training.epochs)}


def classes_and_seed(on: Watched) -> dict[str, Any]:
    """Return what SplitGuard is given."""
    return {"num_classes": on.private.num_classes, "seed": on.training.seed}


def nothing(on: Watched) -> dict[str, Any]:
    """Return that a detector is given no more than the learner."""
    return {}


PROTECTIONS: dict[str, Protection] = {
    "none": Protection("nothing: the activations as they are", "", ("",), lambda _: Shield()),
    "noise": Protection(
        "activations clipped to an L2 norm, with Gaussian noise",
        "noise multiplier (std ÷ sensitivity)",
        ("0.005", "0.02", "0.05"),
        lambda strength: Shield(ClippedGaussian(clip=10.0, noise_multiplier=number(strength, "a noise multiplier"))),
    ),
    "laplace": Protection(
        "activations clipped to an L1 norm, with Laplace noise",
        "noise multiplier (scale ÷ sensitivity)",
        ("0.0001", "0.0005", "0.001"),
        lambda strength: Shield(ClippedLaplace(clip=300.0, noise_multiplier=number(strength, "a noise multiplier"))),
    ),
    "nopeek": Protection(
        "NoPeek: distance correlation between inputs and activations as a penalty",
        "weight of the penalty",
        ("1", "3", "6"),
        lambda strength: Shield(NoPeek(weight=number(strength, "a weight"))),
        CONTINUOUS,  # tokens have no distances to speak of
    ),
    "gaussian_noise": Protection(
        "unclipped Gaussian noise on activations: no ε",
        "standard deviation",
        ("0.1", "0.5", "1"),
        lambda strength: Shield(GaussianNoise(number(strength, "a standard deviation"))),
    ),
    "laplace_noise": Protection(
        "unclipped Laplace noise on activations: no ε",
        "scale",
        ("0.1", "0.5", "1"),
        lambda strength: Shield(LaplaceNoise(number(strength, "a scale"))),
    ),
    "dropout": Protection(
        "entries of activations dropped at random, in predictions too",
        "share dropped",
        ("0.3", "0.6", "0.9"),
        lambda strength: Shield(Dropout(number(strength, "a share to drop"))),
    ),
    "quantised": Protection(
        "activations of so many bits, each sample by its own range",
        "bits",
        ("4", "2", "1"),
        lambda strength: Shield(Quantised(whole(strength, "bits"))),
    ),
    "binarised": Protection("the signs of activations, and one scale", "", ("",), lambda _: Shield(Binarised())),
    "top_k": Protection(
        "the largest activations of each sample alone",
        "fraction kept",
        ("0.3", "0.1", "0.02"),
        lambda strength: Shield(TopKActivations(number(strength, "a fraction to keep"))),
    ),
    "mid": Protection(
        "MID: a variational bottleneck at the cut, whose rate is a penalty (Wang et al. 2021)",
        "weight of the rate",
        ("0.0001", "0.001", "0.01"),
        lambda strength: Shield(MID(number(strength, "a weight")), layers=Bottleneck),
        CONTINUOUS,
    ),
    "adversarial": Protection(
        "adversarial representation: the bottom trains against a decoder of the client's own",
        "weight of the decoder's error",
        ("3", "30"),
        lambda strength: Shield(AdversarialRepresentation(number(strength, "a weight"))),
        CONTINUOUS,
    ),
    "disco": Protection(
        "DISCO: channels pruned by a learned filter against a decoder of the client's own (Singh et al. 2021)",
        "share of the channels pruned",
        ("0.75", "0.9"),
        lambda strength: Shield(
            AdversarialRepresentation(1.0), layers=partial(Disco, ratio=number(strength, "a share to prune"))
        ),
        CONTINUOUS,
    ),
    "ressfl": Protection(
        "ResSFL's penalty: a decoder of the client's own is to miss by SSIM (Li et al. 2022; no pretraining)",
        "weight",
        ("1", "10"),
        lambda strength: Shield(ResSFL(number(strength, "a weight"))),
        ("image",),
    ),
    "patch_shuffle": Protection(
        "the places of a sequence's activations in a random order, for token models",
        "fraction of the places",
        ("1",),
        lambda strength: Shield(PatchShuffle(number(strength, "a fraction to shuffle"))),
        ("tokens",),
    ),
    "compression": Protection(
        "fewer bytes on the wire, as in int8, ans4 or top-k: is it a defense?",
        f"the compression: {COMPRESSIONS}",
        ("int8", "0.1", "0.02"),
        compressed,
    ),
}

GUARD = ("what the client's guard does: with it and without, of which the better one counts",)


def both(aim: Aim, build: Callable[[Guard], Mapping[str, Any]], *, penalty: bool = False) -> Mapping[str, Any]:
    """Return an attack's members and, where the aim's guard does something that they can simulate, each again with it.

    All simulate what a guard does to activations, with ``penalty`` also what it adds to the loss.
    """
    guard, plain = aim.guard, build(Guard())
    if type(guard).activation is Guard.activation and not (penalty and guard.penalises):
        return plain
    return {**plain, **{f"{name}_through_guard": one for name, one in build(guard).items()}}


ATTACKS: dict[str, Attack] = {
    "rmle": Attack(
        "regularised maximum likelihood through the client's own path (He et al. 2019)",
        "reconstruction",
        WHITE_BOX,
        lambda aim: {"rmle": MaximumLikelihood(bounds=aim.bounds, seed=aim.seed)},
    ),
    "decoder": Attack(
        "inverse network, trained on what crosses for own samples; three sizes (He et al. 2019)",
        "reconstruction",
        QUERIES,
        lambda aim: {
            name: replace(one, bounds=aim.bounds) for name, one in decoder_family(aim.shape, seed=aim.seed).items()
        },
    ),
    "shadow": Attack(
        "query-free: a shadow of the bottom, trained to fit the server's own top (He et al. 2019)",
        "reconstruction",
        LABELLED,
        lambda aim: both(aim, lambda guard: {"shadow": Shadow(aim.top, bounds=aim.bounds, guard=guard, seed=aim.seed)}),
        knows=GUARD,
        needs_top=True,
    ),
    "unsplit": Attack(
        "UnSplit: inputs and a clone of the bottom in turns, by its architecture alone (Erdoğan et al. 2022)",
        "reconstruction",
        Threat(),
        lambda aim: {
            "unsplit": UnSplit(aim.stage, aim.shape, bounds=aim.bounds or (0.0, 1.0), clones=2, seed=aim.seed)
        },
        inputs=("image",),
        knows=("the architecture of the client's stage",),
    ),
    "fora": Attack(
        "FORA: a substitute whose activations are distributed as those seen (Xu et al. 2024)",
        "reconstruction",
        UNLABELLED,
        lambda aim: both(aim, lambda guard: {"fora": FORA(bounds=aim.bounds, guard=guard, seed=aim.seed)}),
        knows=GUARD,
    ),
    "pcat": Attack(
        "PCAT: a pseudo-client trained through the live server, a decoder after (Gao & Zhang 2023)",
        "reconstruction",
        LABELLED,
        lambda aim: both(
            aim, lambda guard: {"pcat": PCAT(bounds=aim.bounds, guard=guard, seed=aim.seed)}, penalty=True
        ),
        knows=GUARD,
        steps=1000,
    ),
    "sdar": Attack(
        "SDAR: a simulator of the client and its decoder, held to the client's by critics (Zhu et al. 2025)",
        "reconstruction",
        LABELLED,
        lambda aim: both(
            aim,
            lambda guard: {
                f"sdar{n}": SDAR(bounds=aim.bounds, guard=guard, seed=aim.seed + 100 * n) for n in range(SIMULATORS)
            },
            penalty=True,
        ),
        knows=GUARD,
        steps=1500,
    ),
    "sdar_plain": Attack(
        "the same without critics, for comparison: the paper's ablation",
        "reconstruction",
        LABELLED,
        lambda aim: both(
            aim,
            lambda guard: {
                f"sdar_plain{n}": SDAR(
                    bounds=aim.bounds,
                    guard=guard,
                    seed=aim.seed + 100 * n,
                    simulator_weight=0.0,
                    decoder_weight=0.0,
                )
                for n in range(SIMULATORS)
            },
            penalty=True,
        ),
        knows=GUARD,
        steps=1500,
    ),
    "fsha": Attack(
        "FSHA: the server's gradients pull the client to an autoencoder's activations (Pasquini et al. 2021)",
        "reconstruction",
        UNLABELLED,
        lambda aim: both(aim, lambda guard: {"fsha": FSHA(bounds=aim.bounds, guard=guard, seed=aim.seed)}),
        knows=GUARD,
        steps=1000,
        active=True,
    ),
    "fsha_scaled": Attack(
        "FSHA that scales its gradient a hundredfold, to drown a client's penalty",
        "reconstruction",
        UNLABELLED,
        lambda aim: both(
            aim,
            lambda guard: {"fsha_scaled": FSHA(bounds=aim.bounds, gradient_scale=100.0, guard=guard, seed=aim.seed)},
        ),
        knows=GUARD,
        steps=1000,
        active=True,
    ),
    "splitspy": Attack(
        "SplitSpy: FSHA that answers batches honestly whose labels look random (Fu et al. 2023)",
        "reconstruction",
        UNLABELLED,
        lambda aim: both(
            aim, lambda guard: {"splitspy": SplitSpy(FSHA(bounds=aim.bounds, guard=guard, seed=aim.seed))}
        ),
        knows=GUARD,
        steps=1000,
        active=True,
        needs_labels=True,
    ),
    "urvfl": Attack(
        "URVFL: FSHA whose critic knows the labels, so that its gradients look alike by label (Yao et al. 2024)",
        "reconstruction",
        LABELLED,
        lambda aim: both(
            aim,
            lambda guard: {"urvfl": URVFL(classes=max(2, aim.classes), bounds=aim.bounds, guard=guard, seed=aim.seed)},
        ),
        knows=GUARD,
        steps=1000,
        active=True,
        needs_labels=True,
    ),
}

DETECTORS: dict[str, DetectorEntry] = {
    "splitguard": DetectorEntry(
        "SplitGuard: gradients of batches with random labels against those of others (Erdoğan et al. 2022)",
        SplitGuard,
        classes_and_seed,
    ),
    "scrutinizer": DetectorEntry(
        "Gradients Scrutinizer: gradients of one label against those of others, by their cosine (Fu et al. 2023)",
        GradientsScrutinizer,
        nothing,
    ),
    "splitout": DetectorEntry(
        "SplitOut: outliers among gradients of a training that the client simulates (Erdoğan et al. 2023)",
        SplitOut,
        Simulated(),
        least=4,  # of which one is simulated on
    ),
}

BUILT_ATTACKS: dict[str, BuiltAttack] = {
    "clear_gradient": BuiltAttack(
        "labels from the gradient at the outputs, where it crosses in the clear (he_overhead)"
    ),
    "held_activation": BuiltAttack(
        "the activation at the cut from what one server holds: as it is, or by a mask that it drew (mpc_overhead)"
    ),
    "sent_labels": BuiltAttack("labels from randomised answers and what else crossed, by Bayes (privacy_utility)"),
    "matching": BuiltAttack(
        "labels by gradient matching in the U shape (Erdoğan et al. 2022), noise and passes known (privacy_utility)"
    ),
    "lira": BuiltAttack(
        "membership by likelihood ratio over shadow models, at any point of the split (Carlini et al. 2022; membership)"
    ),
    "loss_threshold": BuiltAttack("membership by one threshold on the loss (Yeom et al. 2018; membership)"),
    "nearest": BuiltAttack(
        "words by the nearest activation of the bottom, which the server knows, at each place (text_classification)"
    ),
    "learned": BuiltAttack("words by a classifier of what the bottom answers to auxiliary texts (text_classification)"),
    "sizes": BuiltAttack(
        "the class of a sample by the sizes and times of its sealed frames, as an enclave's host sees them (enclave)"
    ),
    "read_labels": BuiltAttack("labels as they are sent to the server (the case studies)"),
    "attribute": BuiltAttack(
        "an attribute of private samples by a classifier of activations (Song & Shmatikov 2020; attribute)"
    ),
}

PROTOCOLS: dict[str, Protocol] = {
    "vanilla": Protocol(setups.train_vanilla, infiltrable=True),
    "enclave": Protocol(setups.train_enclave, activations_cross=False),
    "u_shaped": Protocol(setups.train_u_shaped, infiltrable=True, labels_cross=False),
    "splitfed_v1": Protocol(setups.train_splitfed_v1, updates_cross=True),
    "splitfed_v2": Protocol(setups.train_splitfed_v2, updates_cross=True),
    "splitfed_v3": Protocol(setups.train_splitfed_v3),
    "parallel": Protocol(setups.train_parallel),
    "vertical": Protocol(setups.train_vertical),
    "fedavg": Protocol(setups.train_fedavg, activations_cross=False, updates_cross=True),
    "he_u_dp": Protocol(encrypted.train_he_u_dp, activations_cross=False),
    "he_encw": Protocol(encrypted.train_he_encw, activations_cross=False),
    "he_inference": Protocol(encrypted.train_he_inference, activations_cross=False),
    "split_ways": Protocol(encrypted.train_split_ways, activations_cross=False),
    "mpc_2pc": Protocol(shares.train_mpc_2pc, activations_cross=False),
    "mpc_u_shaped": Protocol(shares.train_mpc_u_shaped, activations_cross=False),
    "mpc_inference": Protocol(shares.train_mpc_inference, activations_cross=False),
    "mpc_vertical": Protocol(shares.train_mpc_vertical, activations_cross=False),
    "splitfed_v2_secure": Protocol(shares.train_splitfed_v2_secure),
    "unsplit": Protocol(setups.train_unsplit, activations_cross=False),
}
