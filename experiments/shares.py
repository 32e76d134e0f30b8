"""One function a way to train on shares: who holds what, over which wires. Servers and dealer are real processes."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from experiments.encrypted import CLIENT, SERVER, WAYS, Setup
from experiments.parts import Shield
from experiments.setups import LABELLED, NOTHING, counted, train_splitfed_v2, train_unsplit, vertical_parts
from experiments.training import MOMENTUM, Trained, Training, build_model, optimizer_for
from privacy.mpc import (
    LEARNS,
    Costs,
    Servers,
    SharedStage,
    StageClient,
    mpc_2pc,
    mpc_inference,
    mpc_u_shaped,
    mpc_vertical,
)
from splitlearn.cut import cut
from splitlearn.data import Splits
from splitlearn.party import Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import Wire, wire
from splitlearn.train import Batches, Predictor, epochs_of, fit, predict
from splitlearn.wire import Metered

__all__ = [
    "SHARED_WAYS", "Run", "SharedWay", "crossed", "train_mpc_2pc", "train_mpc_inference", "train_mpc_u_shaped",
    "train_mpc_vertical", "train_splitfed_v2_secure",
]  # fmt: skip


@dataclass
class Run:
    """Parties that stand ready: one training step, its batches, and what evaluation and bills need.

    ``meters`` are the client's wires, asked at once where there are several. ``line`` is there where a server reads
    frames in the clear, ``stage`` where servers hold shares.
    """

    step: Callable[[Tensor, Tensor], Tensor]
    batches: Batches
    chain: list[Predictor]
    meters: list[Metered]
    visible: Mapping[str, list[str]]
    line: Wire | None = None
    stage: SharedStage | None = None


@dataclass(frozen=True)
class SharedWay:
    """A line of the catalogue. ``shares`` is whether servers compute on shares; ``trains`` false for inference."""

    summary: str
    ready: Callable[[Setup, Servers | None], Run]
    shares: bool = True
    trains: bool = True


def in_the_clear(setup: Setup, servers: Servers | None) -> Run:
    """Vanilla split training: one server sees activations and labels."""
    bottom, top = _halves(setup)
    client = _client(setup, bottom)
    line = wire(Learner(SERVER, top, optimizer_for(top, setup.training), seed=setup.training.seed), max_nbytes=1 << 32)
    line_step = partial(vanilla, client, line.party)
    return Run(line_step, setup.batches(), [client, line.party], [line.meter], {SERVER: LABELLED}, line=line)


def loss_on_shares(setup: Setup, servers: Servers | None) -> Run:
    """Activations and labels in shares, the loss computed on them."""
    bottom, top = _halves(setup)
    client, stage = _client(setup, bottom), _shared(setup.training, servers, top)
    return _on_shares(setup, partial(mpc_2pc, client, stage), [client, stage], stage, "mpc_2pc")


def loss_at_client(setup: Setup, servers: Servers | None) -> Run:
    """Activations and gradients in shares, outputs revealed to the client, who has labels and loss."""
    bottom, top = _halves(setup)
    client, stage = _client(setup, bottom), _shared(setup.training, servers, top)
    head = Learner("head", nn.Sequential(nn.Identity()))
    return _on_shares(setup, partial(mpc_u_shaped, client, stage, head), [client, stage, head], stage, "mpc_u_shaped")


def inference_on_shares(setup: Setup, servers: Servers | None) -> Run:
    """A model trained in the clear by its owner, whose top then answers another client on shares."""
    trained = train_unsplit(setup.training, setup.splits, Shield())
    assert isinstance(trained.model, nn.Sequential)
    bottom, top = cut(trained.model, setup.training.cut)
    stage = _shared(setup.training, servers, top)
    client = Learner(CLIENT, bottom, seed=setup.training.seed)
    session = stage.client(CLIENT)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(trained.losses[-1])

    run = _on_shares(setup, step, [_Answered(client, session)], stage, "mpc_inference")
    run.meters = session.meters
    return run


def encrypted(name: str, setup: Setup, servers: Servers | None) -> Run:
    """A way on ciphertexts, for comparison: the server holds the first layer with weights above the cut."""
    ready = WAYS[name].ready(setup)
    assert isinstance(ready.batches, Batches)
    return Run(ready.step, ready.batches, ready.chain, [ready.line.meter], ready.visible)


SHARED_WAYS: dict[str, SharedWay] = {
    "none": SharedWay("vanilla split training in the clear", in_the_clear, shares=False),
    "mpc_2pc": SharedWay("two servers on shares, the loss on shares too", loss_on_shares),
    "mpc_u_shaped": SharedWay("two servers on shares, the loss at the client", loss_at_client),
    "mpc_inference": SharedWay("trained in the clear, inference on shares", inference_on_shares, trains=False),
    "he_encw": SharedWay("the layer above the cut on ciphertexts", partial(encrypted, "he_encw"), shares=False),
    "he_inference": SharedWay(
        "trained in the clear, inference on ciphertexts", partial(encrypted, "he_inference"), shares=False, trains=False
    ),
}


def crossed(meters: Sequence[Metered], costs: Costs) -> dict[str, dict[str, int]]:
    """Return the bytes of the clients' wires, and of those between servers and dealer."""
    return {**counted(meters), "between": {"gloo": costs.crossed}}


def train_mpc_2pc(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Two servers and a dealer train the top on shares (CrypTen, TTP), the loss included; plain SGD with momentum."""
    return _trained(SHARED_WAYS["mpc_2pc"], training, splits)


def train_mpc_u_shaped(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Two servers and a dealer train the top on shares (CrypTen, TTP), labels and loss stay with the client."""
    return _trained(SHARED_WAYS["mpc_u_shaped"], training, splits)


def train_mpc_inference(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Trained in the clear in one place, then inference on shares by two servers and a dealer (CrypTen, TTP)."""
    return _trained(SHARED_WAYS["mpc_inference"], training, splits)


def train_mpc_vertical(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Vertical on shares: each client shares the activation of its columns, and nobody sees another's (TTP)."""
    holders, side, top = vertical_parts(training, splits, shield)
    private = splits.private
    with Servers() as servers:
        stage = _shared(training, servers, top)
        sessions = [stage.client(one.name) for one in holders]
        batches = Batches(
            torch.arange(len(private)), private.y, batch_size=training.batch_size, seed=training.seed,
            drop_last=len(private) % training.batch_size == 1,  # a joint step of one sample would tell of it
        )  # fmt: skip
        step = partial(mpc_vertical, stage, sessions, holders)
        losses = fit(epochs_of(step, batches), epochs=training.epochs).losses
        top.load_state_dict(stage.weights())
        visible = _with_security("mpc_vertical", stage)
        meters = [*stage.meters, *(meter for session in sessions for meter in session.meters)]
        nbytes = crossed(meters, servers.costs())
    chain: list[Predictor] = [Learner("clients", side), Learner("put together", top)]
    return Trained(chain, nn.Sequential(side, top), losses, nbytes, visible, private.x, private.y)


def train_splitfed_v2_secure(training: Training, splits: Splits, shield: Shield) -> Trained:
    """SplitFed V2 whose fed server learns the mean of the bottoms alone: they are added up on shares by two servers."""
    with Servers() as servers:
        trained = train_splitfed_v2(training, splits, shield, servers=servers)
        visible = {"fed server": LEARNS["secure_mean"]["fed server"], SERVER: LABELLED, CLIENT: NOTHING}
        visible |= {who: [*LEARNS["secure_mean"][who], *servers.security] for who in ("server 0", "server 1")}
    return replace(trained, visible=visible)


def _trained(way: SharedWay, training: Training, splits: Splits) -> Trained:
    """Train that way; the model is put together for its owner at the end, and evaluated as such.

    Where inference alone is on shares, the servers stay to answer for as long as there is a chain that asks them, and
    what is billed is the answers for the test set.
    """
    setup = Setup(splits, training)
    with ExitStack() as running:
        servers = running.enter_context(Servers())
        run = way.ready(setup, servers)
        visible = {who: list(what) for who, what in run.visible.items()}
        losses = fit(epochs_of(run.step, run.batches), epochs=training.epochs if way.trains else 1).losses
        assert run.stage is not None
        bottom, top = _halves(setup)
        top.load_state_dict(run.stage.weights())
        client = run.chain[0]
        assert isinstance(client, Learner | _Answered)
        bottom.load_state_dict(client.weights())
        chain = [client, Learner("put together", top)] if way.trains else run.chain
        if not way.trains:
            servers.count_anew()
            predict(chain, splits.test.x)
        nbytes = crossed(run.meters, servers.costs())
        if not way.trains:
            weakref.finalize(client, running.pop_all().close)
    return Trained(chain, nn.Sequential(bottom, top), losses, nbytes, visible, splits.private.x, splits.private.y)


def _on_shares(
    setup: Setup, step: Callable[[Tensor, Tensor], Tensor], chain: list[Predictor], stage: SharedStage, name: str
) -> Run:
    return Run(step, setup.batches(), chain, stage.meters, _with_security(name, stage), stage=stage)


def _with_security(name: str, stage: SharedStage) -> dict[str, list[str]]:
    """Return who learns what, and with the first server all that has to hold for it."""
    return {who: [*seen, *(stage.security if who == "server 0" else [])] for who, seen in LEARNS[name].items()}


def _halves(setup: Setup) -> tuple[nn.Sequential, nn.Sequential]:
    bottom, top = cut(build_model(setup.splits, seed=setup.training.seed), setup.training.cut)
    return bottom, top


def _client(setup: Setup, bottom: nn.Module) -> Learner:
    return Learner(CLIENT, bottom, optimizer_for(bottom, setup.training), seed=setup.training.seed)


def _shared(training: Training, servers: Servers | None, top: nn.Module) -> SharedStage:
    assert servers is not None
    return SharedStage(servers, top, lr=training.lr, momentum=MOMENTUM)


@dataclass
class _Answered:
    """A client's bottom and the servers that answer it, asked as one."""

    client: Learner
    session: StageClient
    name: str = field(default=CLIENT)

    def predict(self, x: Tensor) -> Tensor:
        """Return the top's outputs, revealed to this client."""
        return mpc_inference(self.client, self.session, x)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights below the cut."""
        return self.client.weights()
