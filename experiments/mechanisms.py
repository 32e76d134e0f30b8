"""The DP mechanisms that `privacy_utility` compares: each trains from the same public start, and says what it claims.

A mechanism is a function of a ``Start`` that returns what it ``Reached``: the trained parties, the accounts, the
audit of what it claims, and what its attackers may read. The bottom is public and frozen wherever samples are noised
one by one: nothing else makes an ε per sample hold.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attacks import GradientMatching, SentLabels
from experiments.canaries import audited_in_one_run
from experiments.planning import sgd_noise
from experiments.public_start import (
    CLIENT,
    SERVER,
    Start,
    activations,
    over_the_cut,
    trained_over,
    u_shape,
)
from experiments.setups import FED, UNLABELLED, counted, over_wires
from experiments.training import Trained, optimizer_for
from privacy.dp import (
    Accounted,
    Adjacency,
    Budget,
    Claim,
    Clear,
    ClippedGaussian,
    ClippedLaplace,
    ForwardCrossEntropy,
    GaussianRelease,
    LaplaceRelease,
    OnGradient,
    PoissonBatches,
    PrivateLearner,
    PrivateMean,
    RandomisedResponse,
)
from privacy.dp.audit import Bound, audit_guard
from splitlearn.data import partition
from splitlearn.federation import Member, splitfed_v1_round
from splitlearn.frames import Kind
from splitlearn.party import Guard, Learner
from splitlearn.protocols import u_shaped, vanilla
from splitlearn.remote import Wire, wire
from splitlearn.threat import Encoder, View
from splitlearn.train import Batches, epochs_of, fit

__all__ = ["MECHANISMS", "Mechanism", "Reached"]

USERS = "users of the model"
# Laplace noise and randomised response meet their claims exactly, and many claims are audited in one run: at 95 % some
# would be refuted by chance.
CONFIDENCE = 0.999


@dataclass(frozen=True)
class Reached:
    """What a mechanism came to. ``claims[0]`` is the one that it is for; the others say what it does not protect."""

    trained: Trained
    claims: Sequence[Claim]
    lower: float  # the audit's bound on the ε of the first claim
    audit: str  # what was audited, in words
    seconds: float = 0.0  # of training, without the audit
    releases: int = 1  # of each private input
    guard: ClippedGaussian | ClippedLaplace | None = None  # the noise on activations, for Fisher information
    label_attack: str = ""  # its name in the catalogue
    label_attacks: Mapping[str, Callable[[View], Tensor]] = field(default_factory=dict)  # where labels are protected
    true_y: Tensor | None = None  # what these attacks are after, in the order in which the samples crossed first
    blind: Callable[[Tensor], Tensor] | None = None  # logits of who sees activations alone: the public model
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mechanism:
    """A line of the catalogue. ``run(start)`` trains; ``adjacency`` is that of its claim.

    ``settings`` are the options of the experiment that it depends on, beside those of every training.
    """

    summary: str
    adjacency: Adjacency | None
    run: Callable[[Start], Reached]
    settings: tuple[str, ...] = ()
    protocol: str = "vanilla"
    inverted: bool = True  # whether the attacks on activations are of interest: at the same cut as the others


def unprotected(start: Start) -> Reached:
    """Train the top on activations and labels in the clear, over the frozen public bottom."""
    trained, _ = over_the_cut(start, Guard(), start.splits.private.y)
    return Reached(trained, [], 0.0, "")


def gaussian(start: Start) -> Reached:
    """Clip and noise each activation by the Gaussian mechanism."""
    return _noised(start, GaussianRelease, ClippedGaussian)


def laplace(start: Start) -> Reached:
    """Clip and noise each activation by the Laplace mechanism."""
    return _noised(start, LaplaceRelease, ClippedLaplace)


def response(start: Start) -> Reached:
    """Randomise each label once, and train on the answers with a loss that undoes the bias."""
    mechanism = RandomisedResponse(start.epsilon, start.splits.private.num_classes)
    budget = Budget(start.epsilon, start.delta)
    account = budget.account(SERVER, CLIENT, Adjacency.REPLACE_LABEL, shaped_by=())
    account.spend(mechanism.release)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start.training.seed + 5)
        sent = mechanism.label(start.splits.private.y)
    once = replace(start, passes=1)  # one answer each, however often it is sent
    trained, order = over_the_cut(once, Guard(), sent, ForwardCrossEntropy(mechanism))
    zero, one = torch.tensor(0), torch.tensor(1)
    bound = audit_guard(mechanism, zero, one, delta=start.delta, draws=start.audit_draws, confidence=CONFIDENCE)
    _, top = start.halves()
    attacks = {
        "answers": SentLabels(mechanism.classes, start.epsilon),
        "answers_and_model": SentLabels(mechanism.classes, start.epsilon, top),
    }
    return Reached(
        trained, [*budget.claims(), _in_the_clear(start, Adjacency.REPLACE_INPUT)], bound.lower,
        f"one answer, {bound.draws} draws a world",
        label_attack="sent_labels", label_attacks=attacks, true_y=start.splits.private.y[order], blind=top,
    )  # fmt: skip


def gradient(start: Start) -> Reached:
    """U shape: labels and a public, frozen head stay at home, and the gradient that goes back is clipped and noised."""
    private, training = start.splits.private, start.training
    bottom, middle, head = (stage.requires_grad_(False) for stage in u_shape(start))
    middle.requires_grad_(True)
    x, y = start.public, start.public_y
    clip = _gradient_norm(nn.Sequential(bottom, middle), head, x, y) * len(x) / training.batch_size
    budget = Budget(start.epsilon, start.delta)
    account = budget.account(SERVER, CLIENT, Adjacency.REPLACE_LABEL, shaped_by=[head, bottom])
    noise = account.noise_for(GaussianRelease, releases=training.epochs)
    guard = ClippedGaussian(clip, noise)
    ids = torch.arange(len(private))
    batches = Batches(ids, ids, batch_size=training.batch_size, seed=training.seed)
    entered = Accounted(OnGradient(guard), account, over=batches, crosses={Kind.GRADIENT})
    client = Learner(CLIENT, bottom, None, seed=training.seed * 1000 + 1)
    top = Learner("head", head, None, entered, seed=training.seed * 1000 + 2)
    server = Learner(SERVER, middle, optimizer_for(middle, training), seed=training.seed * 1000)
    line = wire(server, max_nbytes=1 << 34)
    order: list[Tensor] = []

    def step(ids: Tensor, _: Tensor) -> Tensor:
        order.append(ids)
        return u_shaped(client, line.party, top, private.x[ids], private.y[ids])

    losses = fit(epochs_of(step, batches), epochs=training.epochs).losses
    bound = _audit_of_noise(start, guard, training.epochs)
    public = nn.Sequential(*u_shape(start)[1:])
    matching = GradientMatching(head, private.num_classes, len(private), clip)
    visible = {SERVER: list(UNLABELLED), CLIENT: ["everything but the server's weights"]}
    trained = Trained(
        [client, line.party, top], nn.Sequential(bottom, middle, head), losses, counted([line.meter]), visible,
        private.x, private.y, Encoder(bottom), line.record,
    )  # fmt: skip
    return Reached(
        trained, [*budget.claims(), _in_the_clear(start, Adjacency.REPLACE_INPUT)], bound.lower,
        f"{training.epochs} releases of either end of the ball, {bound.draws} draws a world",
        label_attack="matching",
        label_attacks={"matching": matching, "matching_and_model": replace(matching, std=guard.std, prior=public)},
        true_y=private.y[torch.cat(order)[: len(private)]], blind=public,
        notes=[f"clip {clip:.4g}, the median norm of public gradients; {guard!r}; {training.epochs} passes",
               "the bottom ends one trained layer earlier than the others', so that inputs are not attacked here"],
    )  # fmt: skip


def private_sgd(start: Start) -> Reached:
    """Train bottom and top by DP-SGD in one account; activations and labels cross in the clear."""
    sgd, private = start.sgd, start.splits.private
    noise = sgd_noise(start.epsilon, start.delta, sgd.rate, sgd.steps)
    budget = Budget(start.epsilon, start.delta)
    client, server, batches = _private_parties(start, noise, budget, private.x, private.y)
    line = wire(server, max_nbytes=1 << 34)
    epoch = epochs_of(lambda x, y: _forgetting(line, vanilla(client, line.party, x, y)), batches)
    begun = time.perf_counter()
    done = fit(epoch, epochs=-(-sgd.steps // round(1 / sgd.rate)))  # or as many steps as the budget allows
    seconds = time.perf_counter() - begun
    bound = audited_in_one_run(
        lambda x, y: _private_parties(start, noise, Budget(delta=start.delta), x, y),
        nn.Sequential(*start.halves()), start.splits, sgd.steps,
        canaries=start.canaries, delta=start.delta, seed=start.training.seed, device=start.training.device,
        confidence=CONFIDENCE,
    )  # fmt: skip
    trained = trained_over(
        start, client, line, done.losses, Encoder(client.stage), {USERS: ["the weights, once trained"]}
    )
    return Reached(
        trained, [*budget.claims(), _in_the_clear(start, Adjacency.REPLACE_SAMPLE)], bound.lower,
        f"one run, {bound.canaries} canaries, {bound.correct} of {bound.guesses} guesses right", seconds,
        notes=[f"DP-SGD: noise multiplier {noise:.4g} on both stages as one, batches of {batches.capacity} rows"],
    )  # fmt: skip


def user_level(start: Start) -> Reached:
    """SplitFed V1 with both averages noised for whole clients; activations and labels cross in the clear."""
    private, training = start.splits.private, start.training
    budget = Budget(start.epsilon, start.delta)
    account = budget.account("other clients", "any client", Adjacency.ADD_REMOVE_CLIENT, model="central")
    noise = account.noise_for(GaussianRelease, releases=2 * start.rounds)
    bottom, top = start.halves()
    shares = partition.iid(len(private), training.clients, training.seed)
    aggregate = PrivateMean(start.sgd.clip, noise, len(shares), account)
    server = Learner(SERVER, top, optimizer_for(top, training), seed=training.seed * 1000)
    members, sessions, lines = [], {}, []
    for number, rows in enumerate(shares):
        own = copy.deepcopy(bottom)
        client = Learner(f"client{number}", own, optimizer_for(own, training), seed=training.seed * 1000 + number + 1)
        sessions[client.name] = server.replica(client.name)
        lines.append(wire(sessions[client.name]))
        batches = Batches(private.x[rows], private.y[rows], batch_size=training.batch_size, seed=training.seed)
        members.append(Member(client, lines[-1].party, batches))
    fed = Learner("bottom", bottom)
    remote, meters = over_wires(members)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed + 7)

        def round_() -> float:
            splitfed_v1_round(remote, sessions, fed, server, aggregate=aggregate)
            return sum(member.loss for member in members) / len(members)

        losses = fit(round_, epochs=start.rounds).losses
    members[0].learner.load_weights(fed.weights())
    sessions[members[0].name].load_weights(server.weights())
    trained = trained_over(start, members[0].learner, lines[0], losses, Encoder(fed.stage), {"fed server": list(FED)})
    trained = replace(trained, nbytes=counted([*meters, *(line.meter for line in lines)]))
    release = ClippedGaussian(start.sgd.clip / 2, noise)  # the same noise, over the same distance
    bound = _audit_of_noise(start, release, 2 * start.rounds)
    return Reached(
        trained, [*budget.claims(), _in_the_clear(start, Adjacency.REPLACE_SAMPLE)], bound.lower,
        f"Gaussian noise as of its {2 * start.rounds} averages, {bound.draws} draws a world",
        notes=[f"{len(shares)} clients, {start.rounds} rounds, noise multiplier {noise:.4g} for each average"],
    )  # fmt: skip


MECHANISMS: dict[str, Mechanism] = {
    "none": Mechanism(
        "no mechanism: activations and labels in the clear, public bottom", None, unprotected, ("passes",)
    ),
    "gaussian": Mechanism(
        "Gaussian noise on clipped activations, each sample's own", Adjacency.REPLACE_INPUT, gaussian,
        ("passes", "audit_draws"),
    ),
    "laplace": Mechanism(
        "Laplace noise on clipped activations, each sample's own", Adjacency.REPLACE_INPUT, laplace,
        ("passes", "audit_draws"),
    ),
    "gradient": Mechanism(
        "U shape: Gaussian noise on the clipped gradient that the head returns", Adjacency.REPLACE_LABEL, gradient,
        ("audit_draws",), "u_shaped", inverted=False,
    ),
    "response": Mechanism(
        "randomised response on labels, debiased loss", Adjacency.REPLACE_LABEL, response, ("audit_draws",)
    ),
    "dpsgd": Mechanism(
        "DP-SGD on both stages in one account", Adjacency.ADD_REMOVE_SAMPLE, private_sgd,
        ("rate", "steps", "clip", "sgd_lr", "canaries"),
    ),
    "user_level": Mechanism(
        "SplitFed V1 whose averages hide whole clients", Adjacency.ADD_REMOVE_CLIENT, user_level,
        ("clip", "rounds", "audit_draws"), "splitfed_v1",
    ),
}  # fmt: skip


def _in_the_clear(start: Start, adjacency: Adjacency) -> Claim:
    """Return what the server's account comes to of what a mechanism lets cross as it is."""
    account = Budget(delta=start.delta).account(SERVER, CLIENT, adjacency, shaped_by=())
    account.spend(Clear())
    return account.claim()


def _audit_of_noise(start: Start, guard: ClippedGaussian | ClippedLaplace, releases: int, width: int = 4) -> Bound:
    """Audit so many releases of a guard's noise, the sample being at either end of the ball that it clips to."""
    far = torch.zeros(width)
    far[0] = 2 * guard.clip
    return audit_guard(
        guard, -far, far, delta=start.delta, releases=releases, draws=start.audit_draws, confidence=CONFIDENCE
    )


def _gradient_norm(below: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the median norm of the rows of the mean loss's gradient in the head's input."""
    with torch.no_grad():
        h = below(x)
    leaf = h.requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(head(leaf), y), leaf)
    return g.flatten(1).norm(dim=1).median().clamp(min=1e-8).item()


def _noised(
    start: Start,
    make: Callable[[float], GaussianRelease] | Callable[[float], LaplaceRelease],
    mechanism: type[ClippedGaussian] | type[ClippedLaplace],
) -> Reached:
    bottom, _ = start.halves()
    public = activations(bottom, start.public)
    norm = 2 if mechanism is ClippedGaussian else 1
    clip = (public - public.mean(0)).flatten(1).norm(p=norm, dim=1).median().item()
    budget, watch = Budget(start.epsilon, start.delta), Budget(delta=start.delta)
    account = budget.account(SERVER, CLIENT, Adjacency.REPLACE_INPUT, shaped_by=[bottom.requires_grad_(False)])
    noise = account.noise_for(make, releases=start.passes)
    guard = mechanism(clip, noise)
    everything = watch.account(SERVER, CLIENT, Adjacency.REPLACE_SAMPLE, shaped_by=[bottom])
    private = start.splits.private
    entered = Accounted(
        guard, account, everything, over=len(private), crosses={Kind.ACTIVATION, Kind.LABEL},
        predictions="of others",
    )  # fmt: skip
    begun = time.perf_counter()
    trained, _ = over_the_cut(start, entered, private.y, centre=public.mean(0))
    seconds = time.perf_counter() - begun
    bound = _audit_of_noise(start, guard, start.passes, public[0].numel())
    return Reached(
        trained, [*budget.claims(), *watch.claims()], bound.lower,
        f"{start.passes} releases of either end of the ball, {bound.draws} draws a world", seconds, start.passes, guard,
        notes=[f"clip {clip:.4g}, the median norm of public activations around their mean; {guard!r}"],
    )  # fmt: skip


@cache
def _private_parties(
    start: Start, noise: float, budget: Budget, x: Tensor, y: Tensor
) -> tuple[PrivateLearner, PrivateLearner, PoissonBatches]:
    """Return client, server and batches of DP-SGD on both stages; ``noise`` is that of both as one release."""
    sgd, bottom_top = start.sgd, start.halves()
    expected = sgd.rate * len(start.splits.private)
    parties = []
    for number, (name, stage) in enumerate(zip((CLIENT, SERVER), bottom_top, strict=True)):
        optimizer = torch.optim.SGD(stage.parameters(), sgd.lr)
        # Each clips its half to C/√2 and adds noise √2 times as great for it: the same noise on every weight as
        # flat clipping to C would add.
        parties.append(
            PrivateLearner(
                name, stage, optimizer, clip=sgd.clip / 2**0.5, noise_multiplier=noise * 2**0.5,
                expected_batch_size=expected, ghost=True, seed=start.training.seed * 1000 + number,
            )
        )  # fmt: skip
    account = budget.account(USERS, CLIENT, Adjacency.ADD_REMOVE_SAMPLE, shaped_by=parties, model="central")
    batches = PoissonBatches(
        x, y, rate=sgd.rate, account=account, parties=parties, steps=sgd.steps, physical=sgd.physical,
        seed=start.training.seed,
    )  # fmt: skip
    return parties[0], parties[1], batches


def _forgetting(line: Wire, loss: Tensor) -> Tensor:
    """Drop the transcript of a step that no attack reads; the bytes stay counted."""
    line.record.clear()
    return loss
