"""Names become poisoning attacks and defenses against them here, and only here, one line each."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.poisoning import (
    ALIE,
    VILLAIN,
    Adaptive,
    Backdoor,
    EdgeCases,
    EmbeddingBackdoor,
    InnerProduct,
    Mimic,
    MinMax,
    MinSum,
    MirroredLabels,
    ModelReplacement,
    NextLabels,
    Patch,
    RandomLabels,
    ServerBackdoor,
    SignFlip,
    SmashedNoise,
    SmashedStatistics,
    distributed,
    misa,
)
from defenses.aggregation import (
    FLAME,
    NNM,
    Bulyan,
    CentredClipping,
    DnC,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    Mixed,
    MultiKrum,
    Robust,
    Rule,
    TrimmedMean,
)
from defenses.noise import GaussianNoise
from defenses.poisoning import (
    ActivationClustering,
    FilteredServer,
    NeighbourGraph,
    NeuralCleanse,
    SafeSplitServer,
    SpectralSignatures,
    Suspects,
    WitnessedServer,
)
from experiments.bad_members import FEDERATIONS, Sabotage, Safeguard
from privacy.dp import Budget, PrivateMean
from splitlearn.party import Learner

__all__ = ["POISONED", "POISON_ATTACKS", "POISON_DEFENSES", "PoisonAim", "PoisonAttack", "PoisonDefense"]

KNOWN = {
    "data": ("its own samples, which it poisons before it trains as it should",),
    "activations": ("its own samples and activations, and what the server answers",),
    "weights": ("all honest members' updates of the round, before it sends its own",),
    "gradients": (
        "what every client sends; labelled samples of its own; the bottoms' architecture, not where they started",
    ),
}  # surface -> what the adversary sees and knows
SPLIT = tuple(name for name in FEDERATIONS if name != "fedavg")
VERTICAL = "vertical"
POISONED = (*FEDERATIONS, VERTICAL)  # all that can be poisoned
FED = ("splitfed_v1", "splitfed_v2", "parallel", "fedavg")  # where a fed server averages what clients send
WARM_UP = 12  # rounds in which witnesses learn before they are asked
LONGEST = 1.0  # norm of an update that a private mean lets through
NOISE = 0.5  # standard deviation, on activations
CLIP = 1.0  # of a step of the top: the norm of its gradient


@dataclass(frozen=True)
class PoisonAim:
    """What is public to bad members: how many they are of how many, the classes, the bounds, the rule, the bottom."""

    classes: int
    members: int
    bad: int
    bounds: tuple[float, float] | None
    seed: int
    rule: Rule | None = None  # of the fed server, where it is one; None: the mean
    bottom: Callable[[], nn.Module] = nn.Identity

    @property
    def backdoor(self) -> Backdoor:
        """A patch of 2 × 2 in the corner of half of a bad member's samples, which then are class 0."""
        top = 1.0 if self.bounds is None else self.bounds[1]
        return Backdoor(target=0, trigger=Patch(value=top, bounds=self.bounds), share=0.5, seed=self.seed)


@dataclass(frozen=True)
class PoisonAttack:
    """An attack by members, or by the main server, on one of the surfaces. ``goal``: any errors, or a backdoor."""

    summary: str
    surface: Literal["data", "activations", "gradients", "weights"]
    build: Callable[[PoisonAim], Sabotage]
    goal: Literal["poisoning", "backdoor"] = "poisoning"
    protocols: tuple[str, ...] = FEDERATIONS
    knows: tuple[str, ...] = ()  # beyond what its surface says

    @property
    def in_words(self) -> list[str]:
        """Where it enters, and what the adversary sees and knows, a line each."""
        return [f"surface: {self.surface}", *KNOWN[self.surface], *self.knows]


@dataclass(frozen=True)
class PoisonDefense:
    """A defense. ``build(bad, members)`` makes it for so many bad ones; ``rule`` is its rule on bottoms, if any."""

    summary: str
    build: Callable[[int, int], Safeguard]
    rule: Callable[[int, int], Rule] | None = None
    protocols: tuple[str, ...] = FEDERATIONS
    least_members: int = 2
    least_rounds: int = 1
    images: bool = False  # whether inputs must be images


def flipping(kind: Callable[[int], Callable]) -> Callable[[PoisonAim], Sabotage]:
    """Return what has bad members' labels flipped."""
    return lambda aim: Sabotage(data=lambda number: kind(aim.classes))


def backdoored(aim: PoisonAim, **also: object) -> Sabotage:
    """Return the BadNets patch on half of each bad member's samples, and what else they do."""
    return Sabotage(data=lambda number: aim.backdoor, trigger=aim.backdoor.triggered, target=0, **also)  # type: ignore[arg-type]


def dealt(aim: PoisonAim) -> Sabotage:
    """Return the patch in parts, one a bad member, the whole at test time; updates are boosted."""
    parts = distributed(aim.backdoor, min(4, max(1, aim.bad)))
    return Sabotage(
        data=lambda number: parts[number % len(parts)], trigger=aim.backdoor.triggered, updates=ModelReplacement()
    )


@dataclass(frozen=True)
class Tails:
    """Edge cases of who has any samples of their class; who has none, trains as it should."""

    cases: EdgeCases

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples, the tail mislabelled."""
        return self.cases(x, y) if bool((y == self.cases.source).any()) else (x, y)


def tailed(aim: PoisonAim) -> Sabotage:
    """Return half of the last class, its least typical, sent as class 0; boosted. Tested on the tail of others'."""
    source = aim.classes - 1
    return Sabotage(
        data=lambda number: Tails(EdgeCases(source=source, target=0, share=0.5)), updates=ModelReplacement(),
        target=0, tail=EdgeCases(source=source, target=0, share=0.25),
    )  # fmt: skip


def embedded(aim: PoisonAim) -> Sabotage:
    """Return a trigger on activations, which bad members send as class 0."""
    lie = EmbeddingBackdoor(target=0, seed=aim.seed)
    return Sabotage(guard=lambda number: lie, trigger=lie.triggered, on_activations=True)


def jointly(aim: PoisonAim) -> Sabotage:
    """Return MISA: lies about activations and Min-Sum on bottoms."""
    guard, updates = misa()
    return Sabotage(guard=lambda number: guard, updates=updates)


def knowing(aim: PoisonAim) -> Sabotage:
    """Return colluders who know the fed server's rule."""
    return Sabotage(updates=Adaptive(Afresh(aim.rule) if aim.rule is not None else Mean()))  # all that it knows


def serving(aim: PoisonAim) -> Sabotage:
    """Return a main server that trains the backdoor on a surrogate client; it holds labelled auxiliary samples."""
    settings = ServerBackdoor(backdoor=aim.backdoor, surrogate=aim.bottom, seed=aim.seed)
    return Sabotage(server=settings.party, trigger=aim.backdoor.triggered)


@dataclass(frozen=True)
class Villainous:
    """VILLAIN's settings, but for the samples that it knows."""

    beta: float = 3.0
    ratio: float = 1.0
    share: float = 1.0

    def __call__(self, known: tuple[int, ...]) -> VILLAIN:
        """Return the settings."""
        return VILLAIN(known=known, beta=self.beta, ratio=self.ratio, share=self.share)


@dataclass(frozen=True)
class Afresh:
    """A rule as who knows it tries it: each time another copy, since one that remembers, or draws, would be moved."""

    rule: Rule

    def __call__(self, rows: Tensor) -> Tensor:
        """Return what the rule makes of the rows."""
        return copy.deepcopy(self.rule)(rows)


@dataclass(frozen=True)
class Enough:
    """A rule on the clients' gradients of one step, which is left out where the clients are too few for the rule."""

    rule: Rule

    def __call__(self, rows: Tensor) -> Tensor:
        """Return what the rule makes of the rows, or zeros."""
        return self.rule(rows) if len(rows) >= self.rule.least else torch.zeros_like(rows[0])


POISON_ATTACKS: dict[str, PoisonAttack] = {
    "label_flip": PoisonAttack(
        "labels y become C − 1 − y (Fang et al. 2020)", "data", flipping(lambda classes: MirroredLabels(classes))
    ),
    "label_flip_pairwise": PoisonAttack(
        "labels y become y + 1", "data", flipping(lambda classes: NextLabels(classes))
    ),
    "label_flip_random": PoisonAttack(
        "labels become any others", "data", flipping(lambda classes: RandomLabels(classes))
    ),
    "sign_flip": PoisonAttack(
        "five times the mean honest update, reversed", "weights", lambda aim: Sabotage(updates=SignFlip(5.0)),
        protocols=FED,
    ),
    "inner_product": PoisonAttack(
        "a little against the mean honest update (Xie et al. 2020)", "weights",
        lambda aim: Sabotage(updates=InnerProduct(0.5)), protocols=FED,
    ),
    "alie": PoisonAttack(
        "a little is enough: z standard deviations off, unseen (Baruch et al. 2019)", "weights",
        lambda aim: Sabotage(updates=ALIE(z=1.5)), protocols=FED,
    ),
    "min_max": PoisonAttack(
        "as far off as honest updates are apart (Shejwalkar & Houmansadr 2021)", "weights",
        lambda aim: Sabotage(updates=MinMax()), protocols=FED,
    ),
    "min_sum": PoisonAttack(
        "as far off as the outermost honest update (Shejwalkar & Houmansadr 2021)", "weights",
        lambda aim: Sabotage(updates=MinSum()), protocols=FED,
    ),
    "mimic": PoisonAttack(
        "copies of one honest update (Karimireddy et al. 2022)", "weights", lambda aim: Sabotage(updates=Mimic()),
        protocols=FED,
    ),
    "adaptive": PoisonAttack(
        "updates searched for against the rule, which is known (Fang et al. 2020)", "weights", knowing, protocols=FED,
        knows=("the fed server's rule, or takes it for the mean where it is none of updates alone (FLTrust, private)",),
    ),
    "smashed_noise": PoisonAttack(
        "activations under noise of five standard deviations (HealSplit's taxonomy)", "activations",
        lambda aim: Sabotage(guard=lambda number: SmashedNoise(5.0)), protocols=SPLIT,
    ),
    "smashed_statistics": PoisonAttack(
        "activations drawn from their own statistics, moved against them", "activations",
        lambda aim: Sabotage(guard=lambda number: SmashedStatistics()), protocols=SPLIT,
    ),
    "misa": PoisonAttack(
        "lies about activations and Min-Sum on bottoms (MISA, Wan et al. 2024)", "activations", jointly,
        protocols=("splitfed_v1", "splitfed_v2", "parallel"),
    ),
    "badnets": PoisonAttack(
        "a patch that means class 0, on half of a bad member's samples (Gu et al. 2017)", "data", backdoored, "backdoor"
    ),
    "replacement": PoisonAttack(
        "the patch, and updates scaled up to survive the average (Bagdasaryan et al. 2020)", "weights",
        lambda aim: backdoored(aim, updates=ModelReplacement()), "backdoor", FED,
    ),
    "dba": PoisonAttack(
        "the patch in parts, one a bad member (DBA, Xie et al. 2020)", "weights", dealt, "backdoor", FED
    ),
    "edge_cases": PoisonAttack(
        "the least typical of one class sent as class 0, and updates scaled up (Wang et al. 2020)", "weights", tailed,
        "backdoor", FED,
    ),
    "embedding": PoisonAttack(
        "a trigger on activations, sent as class 0", "activations", embedded, "backdoor", SPLIT
    ),
    "villain": PoisonAttack(
        "a client without labels finds samples of class 0 and adds a trigger to them (VILLAIN, Bai et al. 2023)",
        "activations", lambda aim: Sabotage(villain=Villainous(), on_activations=True), "backdoor", (VERTICAL,),
        knows=("five samples of class 0, by number",),
    ),
    "server_backdoor": PoisonAttack(
        "a main server that trains a backdoor on a surrogate client (Tajalli et al. 2023)", "gradients", serving,
        "backdoor", ("splitfed_v1", "splitfed_v2"),
    ),
}  # fmt: skip


def by(rule: Callable[[int, int], Rule], clip: float | None = None) -> Callable[[int, int], Safeguard]:
    """Return what puts a rule on bottoms, tops and, in parallel training, the clients' gradients of the top."""

    def build(bad: int, members: int) -> Safeguard:
        bottoms, tops, step = (rule(bad, members) for _ in range(3))  # each its own: some remember, or draw
        return Safeguard(Robust(bottoms), Robust(tops), clip, Enough(step))

    return build


def ruled(summary: str, rule: Callable[[int, int], Rule]) -> PoisonDefense:
    """Return the entry of an aggregation rule. One that remembers members is for none that leave some steps."""
    fits = tuple(name for name in FEDERATIONS if name != "parallel") if rule(1, 20).remembers else FEDERATIONS
    return PoisonDefense(summary, by(rule), rule, fits)


def trimmed(bad: int, members: int) -> Rule:
    """Return the trimmed mean for so many bad ones."""
    return TrimmedMean(bad)


def private(noise_multiplier: float) -> Callable[[int, int], Safeguard]:
    """Return averages of clipped updates, noised for user-level privacy; without noise, clipping alone."""

    def build(bad: int, members: int) -> Safeguard:
        account = Budget().account("other members", "any member", "add or remove one client", model="central")
        bottoms, tops = (PrivateMean(LONGEST, noise_multiplier, members, account) for _ in range(2))
        return Safeguard(bottoms, tops, account=account if noise_multiplier else None)

    return build


def noised(bad: int, members: int) -> Safeguard:
    """Return honest members that noise their activations, trimmed means and clipped steps."""
    return Safeguard(Robust(TrimmedMean(bad)), Robust(TrimmedMean(bad)), CLIP, noise=lambda: GaussianNoise(NOISE))


@dataclass(frozen=True)
class Witnesses:
    """Seats of a server that asks witnesses, who first learn for some rounds."""

    groups: int = 10
    floor: float = 0.1
    tolerance: float = 0.2
    rounds: int = WARM_UP

    def __call__(self, top: Learner, learners: Mapping[str, Learner], batches: int) -> WitnessedServer:
        """Return the server."""
        return WitnessedServer(
            top,
            list(learners),
            groups=self.groups,
            floor=self.floor,
            tolerance=self.tolerance,
            warm_up=self.rounds * batches,
        )


@dataclass(frozen=True)
class Rollbacks:
    """Seats of a server that rolls suspicious turns back."""

    window: int = 9
    low: float = 0.25

    def __call__(self, top: Learner, learners: Mapping[str, Learner], batches: int) -> SafeSplitServer:
        """Return the server."""
        return SafeSplitServer(top, window=self.window, low=self.low)


@dataclass(frozen=True)
class Filters:
    """Seats of a server that leaves out members of whose samples a filter flags too many."""

    suspect: Callable[[Tensor, Tensor], Suspects]
    deep: bool = True
    most: float = 0.25
    rounds: int = WARM_UP

    def __call__(self, top: Learner, learners: Mapping[str, Learner], batches: int) -> FilteredServer:
        """Return the server."""
        return FilteredServer(top, learners, self.suspect, most=self.most, warm_up=self.rounds, deep=self.deep)


def filtering(
    summary: str, suspect: Callable[[int, int], Callable[[Tensor, Tensor], Suspects]], *, deep: bool = True,
    most: float = 0.25,
) -> PoisonDefense:  # fmt: skip
    """Return the entry of a filter on activations, beside trimmed means and clipped steps."""

    def build(bad: int, members: int) -> Safeguard:
        bottoms, tops = Robust(TrimmedMean(bad)), Robust(TrimmedMean(bad))
        return Safeguard(bottoms, tops, CLIP, seats=Filters(suspect(bad, members), deep, most))

    return PoisonDefense(
        f"members left out whose samples {summary}; trimmed means, clipped steps", build, trimmed,
        ("splitfed_v1", "splitfed_v2"), least_rounds=WARM_UP + 1,
    )  # fmt: skip


POISON_DEFENSES: dict[str, PoisonDefense] = {
    "none": PoisonDefense(
        "the mean, weighed by samples", lambda bad, members: Safeguard(), protocols=POISONED
    ),
    "median": ruled("median of each coordinate (Yin et al. 2018)", lambda bad, members: Median()),
    "trimmed_mean": ruled("mean of each coordinate without the f least and greatest (Yin et al. 2018)", trimmed),
    "krum": ruled("the update nearest to its n − f − 2 nearest (Blanchard et al. 2017)", lambda bad, _: Krum(bad)),
    "multi_krum": ruled("mean of the n − f that Krum likes best", lambda bad, _: MultiKrum(bad)),
    "bulyan": ruled("Krum again and again, then a mean (El Mhamdi et al. 2018)", lambda bad, _: Bulyan(bad)),
    "geometric_median": ruled("the point of least total distance (Pillutla et al. 2022)", lambda *_: GeometricMedian()),
    "centred_clipping": ruled("clipped around their centre (Karimireddy et al. 2021)", lambda *_: CentredClipping()),
    "dnc": ruled("those far along a first singular direction left out (DnC, 2021)", lambda bad, _: DnC(bad)),
    "flame": ruled("clusters by cosine, clipping to the median norm (Nguyen et al. 2022)", lambda *_: FLAME()),
    "foolsgold": ruled("those too much alike count for less (Fung et al. 2020)", lambda *_: FoolsGold()),
    "nnm": ruled(
        "trimmed mean after mixing each update with its nearest (Allouah et al. 2023)",
        lambda bad, _: Mixed(NNM(bad), TrimmedMean(bad)),
    ),
    "fltrust": PoisonDefense(
        "members count as they agree with the server's own update on auxiliary samples (FLTrust, 2021)",
        lambda bad, members: Safeguard(root=True), protocols=("splitfed_v1", "splitfed_v2", "fedavg"),
    ),
    "clip": PoisonDefense(
        "steps of the top clipped, bottoms by the mean", lambda bad, members: Safeguard(clip=CLIP),
        protocols=(*SPLIT, VERTICAL),
    ),
    "trimmed_mean_clip": PoisonDefense(
        "trimmed means, and steps of the top clipped", by(trimmed, CLIP), trimmed, SPLIT
    ),
    "clipped_mean": PoisonDefense(
        "mean of updates clipped to norm 1, as for user-level privacy (McMahan et al. 2018), no noise", private(0),
    ),
    "private_mean": PoisonDefense(
        "the same with its noise: user-level differential privacy, whose ε is recorded", private(0.5),
    ),
    "noised_activations": PoisonDefense(
        "honest members noise their activations; trimmed means, clipped steps", noised, trimmed, SPLIT
    ),
    "safesplit": PoisonDefense(
        "turns of the shared top rolled back by majority (SafeSplit, Rieger et al. 2025), clipped steps; trimmed means",
        lambda bad, members: Safeguard(Robust(TrimmedMean(bad)), clip=CLIP, seats=Rollbacks()),
        trimmed, ("splitfed_v2",),
    ),
    "witnesses": PoisonDefense(
        "the shared top learns what tops of other clients find likely, in clipped steps; medians of bottoms (ours)",
        lambda bad, members: Safeguard(Robust(Median()), clip=CLIP, seats=Witnesses()), lambda *_: Median(),
        ("splitfed_v2",), least_members=Witnesses.groups, least_rounds=WARM_UP + 1,
    ),
    "clustering": filtering(
        "are the smaller of two clusters of a class (activation clustering, 2018)", lambda *_: ActivationClustering()
    ),
    "spectral": filtering(
        "stand out along a class's first singular direction (spectral signatures, 2018)",
        lambda bad, members: SpectralSignatures(min(bad / members, 0.6)), most=0.5,  # it flags 1.5 times the share
    ),
    "graph": filtering(
        "have other labels around them (mutual neighbours, after HealSplit 2025)", lambda *_: NeighbourGraph(),
        deep=False,
    ),
    "cleanse": PoisonDefense(
        "trimmed means, clipped steps; the joined model searched for a trigger (Neural Cleanse, 2019): only told",
        lambda bad, members: replace(by(trimmed, CLIP)(bad, members), inspect=NeuralCleanse()), trimmed,
        images=True,
    ),
}  # fmt: skip
