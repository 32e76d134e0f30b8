"""The rows of `protection_grid`: each trains the same model at one cut, and says what its server really sees.

The clear rows, and those on ciphertexts and shares, are the U shape: the server holds one linear layer, the client the
rest. The rows of differential privacy start from a model of public samples, as their ε asks (`privacy_utility`).
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from attacks import SentLabels
from defenses import GaussianNoise, NoPeek
from experiments.encrypted import WAYS, Setup, plain
from experiments.he_overhead import labels_read
from experiments.mechanisms import MECHANISMS
from experiments.parts import Shield, number
from experiments.public_start import PrivateSGD, Start, public_model
from experiments.record import Leakage
from experiments.setups import counted
from experiments.shares import SHARED_WAYS, crossed
from experiments.timing import timed_epochs
from experiments.training import Trained, Training
from privacy.dp import Claim
from privacy.mpc import Servers
from privacy.mpc.sharing import held
from splitlearn.codecs import Int8
from splitlearn.data import Splits
from splitlearn.frames import Kind
from splitlearn.leakage import score_labels
from splitlearn.party import Guard, Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import wire
from splitlearn.threat import Encoder, Threat, observe
from splitlearn.train import Predictor, predict

__all__ = ["QUERIES", "ROWS", "Reached", "Row", "Seen"]

TRANSCRIPT = 1 << 28  # bytes that are kept of what crosses
READ = 1024  # bytes of a ciphertext that the attack on inputs reads: all look like chance
QUERIES = 100  # samples of its own that the attacker has cross as ciphertexts or shares
STEPS = {
    "he_u_dp": [
        "the noised steps of its layer, which the server sees, are read by no attack here: they tell of a batch's "
        "labels together, and of one sample no more than the ε allows"
    ],
    "he_encw": [],
}
RING = 2.0**63  # to which a share's whole numbers reach
PUBLIC, PASSES, DELTA = 50, 1, 1e-5  # of the rows of differential privacy


@dataclass(frozen=True)
class Reached:
    """What a row came to. ``chain`` answers predictions; ``seen`` is who sends inputs, and how the server sees them."""

    chain: Sequence[Predictor]
    seen: Trained
    labels: Leakage
    epoch: float  # seconds
    releases: int = 1
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A line of the grid at several strengths. ``run`` yields what was reached, while its parties stand.

    Where what the server holds is ``sealed``, no gradient goes through it, and asking for it is slow.
    """

    summary: str
    strengths: tuple[str, ...]
    run: Callable[[Training, Splits, str], Any]  # a context manager of ``Reached``
    sealed: bool = False

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks on inputs that what the server holds is fit for."""
        return ("decoder",) if self.sealed else ("rmle", "decoder")

    @property
    def described(self) -> dict[str, Any]:
        """What its result depends on, beside training and strength."""
        return (
            {"queries": QUERIES, "read": READ} if self.sealed else {"public": PUBLIC, "passes": PASSES, "delta": DELTA}
        )


class Seen(nn.Module):
    """What a server holds of an input, as numbers, by a function that has it cross; no gradient goes through."""

    def __init__(self, read: Callable[[Tensor], Tensor]):
        super().__init__()
        self.read, self.name = read, "client"

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return, [N, F], what is held of ``x``."""
        return self.read(x)

    predict = forward

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Self:
        """Return itself: keys and servers have no copy."""
        return self


def shielded(shield: Callable[[str], Shield]) -> Callable[[Training, Splits, str], Any]:
    """Return a row in the clear, under a client's shield."""

    @contextmanager
    def run(training: Training, splits: Splits, strength: str) -> Iterator[Reached]:
        setup = Setup(splits, training, max_nbytes=TRANSCRIPT)
        ready = plain(setup, shield(strength))
        losses, lasted = timed_epochs(ready.step, ready.batches, training.epochs)
        nbytes = counted([ready.line.meter])
        again = plain(setup, shield(strength))
        labels = labels_read(again.step, again.batches, lambda: observe(again.line.record, threat=Threat()), splits)
        client = ready.chain[0]
        assert isinstance(client, Learner)
        encoder = Encoder(client.stage, client.guard, shield(strength).codec)
        visible = {who: list(what) for who, what in ready.visible.items()}
        private = splits.private
        seen = Trained(
            ready.chain, ready.stage, losses, nbytes, visible, private.x, private.y, encoder, ready.line.record
        )
        yield Reached(ready.chain, seen, labels, statistics.median(lasted))

    return run


def encrypted(way: str) -> Callable[[Training, Splits, str], Any]:
    """Return a row on ciphertexts; a strength is its ε, where it has one."""

    @contextmanager
    def run(training: Training, splits: Splits, strength: str) -> Iterator[Reached]:
        setup = Setup(splits, training, max_nbytes=TRANSCRIPT)
        setup = replace(setup, epsilon=number(strength, "an ε")) if strength else setup
        ready = WAYS[way].ready(setup)
        losses, lasted = timed_epochs(ready.step, ready.batches, training.epochs)
        nbytes = counted([ready.line.meter])
        again = WAYS[way].ready(setup)
        labels = labels_read(again.step, again.batches, lambda: observe(again.line.record, threat=Threat()), splits)

        def ciphertexts(x: Tensor) -> Tensor:
            rows = []
            for one in x.split(1):
                ready.line.record.clear()
                predict(ready.chain, one)
                sent = ready.line.record.exchanges[-1].request.tensors
                found = next(t for key, t in sent.items() if Kind.of(key) is Kind.CIPHERTEXT)
                rows.append(found.flatten()[:READ].float() / 255)
            return torch.stack(rows)

        yield Reached(
            ready.chain, _sealed(ready.stage, losses, nbytes, ready.visible, splits, ciphertexts), labels,
            statistics.median(lasted),
            claims=[] if ready.account is None else [ready.account.claim()],
            notes=[f"the attack on inputs reads the first {READ} bytes of each sample's ciphertext", *STEPS[way]],
        )  # fmt: skip

    return run


@contextmanager
def on_shares(training: Training, splits: Splits, strength: str) -> Iterator[Reached]:
    """Two servers and a dealer, the loss on shares too; what is attacked is what server 0 holds."""
    setup, way = Setup(splits, training), SHARED_WAYS["mpc_2pc"]
    with Servers() as servers:
        run = way.ready(setup, servers)
        predict(run.chain, splits.test.x[:1])  # the first answer waits for what is set up on demand
        servers.count_anew()
        losses, lasted = timed_epochs(run.step, run.batches, training.epochs)
        nbytes = crossed(run.meters, servers.costs())
        assert run.stage is not None
        weights = run.stage.weights()
    with Servers(remember=True) as servers:  # which is slower, and no part of the bill
        again = way.ready(setup, servers)
        servers.observed("server 0")  # the opening of the stage is no part of it
        labels = labels_read(
            again.step, again.batches, lambda: observe(servers.observed("server 0"), threat=Threat()), splits
        )
        assert again.stage is not None
        again.stage.load_weights(weights)
        client = run.chain[0]
        assert isinstance(client, Learner)
        chain: list[Predictor] = [client, again.stage]

        def shares(x: Tensor) -> Tensor:
            servers.observed("server 0")
            predict(chain, x)
            sent = [exchange.request.tensors for exchange in servers.observed("server 0").exchanges]
            halves = [half for tensors in sent for half in held(tensors).values() if len(half) == len(x)]
            return halves[0].flatten(1).double().div(RING).float()

        yield Reached(
            chain, _sealed(client.stage, losses, nbytes, run.visible, splits, shares), labels,
            statistics.median(lasted),
            notes=["the attack on inputs reads server 0's half of each activation", *servers.security],
        )  # fmt: skip


def mechanism(name: str) -> Callable[[Training, Splits, str], Any]:
    """Return a row of differential privacy at an ε, from a public start; its labels are sent to the server."""

    @contextmanager
    def run(training: Training, splits: Splits, strength: str) -> Iterator[Reached]:
        model = public_model(splits, PUBLIC, training)
        x, y = (part[:PUBLIC].to(training.device) for part in (splits.auxiliary.x, splits.auxiliary.y))
        start = Start(
            splits, model, x, y, training, number(strength, "an ε"), DELTA, PASSES, PrivateSGD(), 0, audit_draws=1000,
            canaries=20,
        )  # fmt: skip
        reached = MECHANISMS[name].run(start)
        yield Reached(
            reached.trained.chain, reached.trained, _sent(start, reached.guard), reached.seconds / training.epochs,
            reached.releases, claims=list(reached.claims),
            notes=[*reached.notes, f"starts from a model of {PUBLIC} public samples"],
        )  # fmt: skip

    return run


ROWS: dict[str, Row] = {
    "none": Row("U shape in the clear", ("",), shielded(lambda _: Shield())),
    "int8": Row("int8 on the wire", ("",), shielded(lambda _: Shield(codec=Int8()))),
    "gaussian_noise": Row(
        "Gaussian noise on activations, no ε; a strength is its standard deviation", ("4", "16"),
        shielded(lambda strength: Shield(GaussianNoise(number(strength, "a standard deviation")))),
    ),
    "nopeek": Row(
        "NoPeek; a strength is its weight", ("0.3", "1"), shielded(lambda s: Shield(NoPeek(number(s, "a weight")))),
    ),
    "dp_activations": Row("clipped activations with Gaussian noise, at an ε", ("4", "16", "64"), mechanism("gaussian")),
    "dp_sgd": Row("DP-SGD on both stages, at an ε", ("1", "4", "16"), mechanism("dpsgd")),
    "he_u_dp": Row(
        "encrypted forward and backward, one DP-SGD step for the server, at an ε", ("2", "8"), encrypted("he_u_dp"),
        sealed=True,
    ),
    "he_encw": Row("activations, gradients and weights encrypted", ("",), encrypted("he_encw"), sealed=True),
    "mpc_2pc": Row("two servers on shares, the loss on shares too", ("",), on_shares, sealed=True),
}  # fmt: skip


def _sent(start: Start, guard: Guard | None) -> Leakage:
    """Return what the server reads of labels that are sent to it, of one batch."""
    private, size = start.splits.private, start.training.batch_size
    bottom, top = start.halves()
    line, y = wire(Learner("server", top)), private.y[:size]
    vanilla(Learner("client", bottom, guard=guard, seed=0), line.party, private.x[:size], y)
    told = SentLabels(private.num_classes)(observe(line.record, threat=Threat()))
    score = score_labels(told, y, num_classes=private.num_classes)
    return Leakage(
        attack="sent_labels", family="label", advantage=score.advantage, metrics=score.metrics,
        baselines=score.baselines,
    )  # fmt: skip


def _sealed(
    stage: nn.Module, losses: list[float], nbytes: dict[str, dict[str, int]], visible: Mapping[str, Sequence[str]],
    splits: Splits, read: Callable[[Tensor], Tensor],
) -> Trained:  # fmt: skip
    """Return a wire on which what the server holds of an input stands for the activation, and who sends it."""
    seen, private = Seen(read), splits.private
    line = wire(Learner("server", nn.Identity()))
    told = {who: list(what) for who, what in visible.items()}
    chain: list[Predictor] = [seen, line.party]
    return Trained(chain, stage, losses, nbytes, told, private.x, private.y, Encoder(seen), line.record)
