"""What every mechanism of `privacy_utility` starts from: a model of public samples, cut, its bottom frozen.

Nothing else makes an ε per sample hold where samples are noised one by one: a bottom that trains on them carries each
into all others' releases.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.setups import LABELLED, NOTHING, counted
from experiments.training import Trained, Training, build_model, optimizer_for
from splitlearn.cut import cut, layer_names
from splitlearn.data import Splits
from splitlearn.frames import Kind
from splitlearn.party import Guard, Learner, Loss
from splitlearn.protocols import vanilla
from splitlearn.remote import Wire, wire
from splitlearn.threat import Encoder
from splitlearn.train import Batches, epochs_of, fit

__all__ = [
    "CLIENT", "SERVER", "PrivateSGD", "Start", "activations", "over_the_cut", "public_model", "trained_over", "u_shape",
]  # fmt: skip

SERVER, CLIENT = "server", "client"
PUBLIC_STEPS = 120  # of Adam on the public samples


@dataclass(frozen=True)
class PrivateSGD:
    """Settings of DP-SGD, all of them public."""

    rate: float = 0.25
    steps: int = 40
    clip: float = 0.5
    lr: float = 0.5
    physical: int = 256  # rows at once


@dataclass(frozen=True)
class Start:
    """What every mechanism starts from: a model trained on public samples alone, and what it is asked to reach."""

    splits: Splits
    model: nn.Sequential  # on the training's device
    public: Tensor  # inputs of the public samples
    public_y: Tensor
    training: Training
    epsilon: float
    delta: float
    passes: int  # how often each private sample crosses in training, where it crosses one by one
    sgd: PrivateSGD
    rounds: int  # of user-level training
    audit_draws: int
    canaries: int

    def halves(self) -> tuple[nn.Module, nn.Module]:
        """Return bottom and top, copies of the public start."""
        bottom, top = cut(copy.deepcopy(self.model), self.training.cut)
        return bottom, top


def public_model(splits: Splits, count: int, training: Training) -> nn.Sequential:
    """Return the model that all start from, trained on the first ``count`` auxiliary samples, which are public."""
    model = build_model(splits, seed=training.seed).to(training.device)
    if not count:
        return model
    x, y = (part[:count].to(training.device) for part in (splits.auxiliary.x, splits.auxiliary.y))
    learner = Learner("public", model, torch.optim.Adam(model.parameters(), 1e-3), seed=training.seed)
    batches = Batches(x, y, batch_size=32, seed=training.seed)
    fit(epochs_of(lambda x, y: learner.learn(x, y)[0], batches), epochs=-(-PUBLIC_STEPS // len(batches)))
    return model


def u_shape(start: Start) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return bottom, middle and head of the public start: the head is all above the cut, the middle one trained layer.

    The middle begins at the last layer below the cut that has parameters.
    """
    model = copy.deepcopy(start.model)
    names = layer_names(model)
    below = names[: names.index(start.training.cut) + 1]
    trained = [number for number, name in enumerate(below) if list(model.get_submodule(name).parameters())]
    if not trained or trained[-1] == 0:
        raise ValueError(
            f"expected room for a bottom and a middle below {start.training.cut}, got none; use --cut with a later "
            "layer, or leave the gradient mechanism out"
        )
    bottom, middle, head = cut(model, below[trained[-1] - 1], start.training.cut)
    return bottom, middle, head


class Shift(nn.Module):
    """Adds a public constant: activations are clipped around the public mean, not around 0."""

    offset: Tensor

    def __init__(self, offset: Tensor):
        super().__init__()
        self.register_buffer("offset", offset)

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z`` plus the constant."""
        return z + self.offset


def over_the_cut(
    start: Start, guard: Guard, sent_y: Tensor, loss: Loss | None = None, centre: Tensor | None = None
) -> tuple[Trained, Tensor]:
    """Send each sample ``passes`` times over a real wire, and let the server go on with what it was sent.

    Returns what was trained, and the order in which the samples crossed first.
    """
    training, x = start.training, start.splits.private.x
    bottom, top = start.halves()
    if centre is not None:
        bottom, top = nn.Sequential(bottom, Shift(-centre)), nn.Sequential(Shift(centre), top)
    client = Learner(CLIENT, bottom.requires_grad_(False), None, guard, seed=training.seed * 1000 + 1)
    options = {} if loss is None else {"loss": loss}
    server = Learner(SERVER, top, optimizer_for(top, training), seed=training.seed * 1000, **options)  # type: ignore[arg-type]
    line = wire(server, max_nbytes=1 << 34)
    order: list[Tensor] = []

    def step(ids: Tensor, _: Tensor) -> Tensor:
        order.append(ids)
        return vanilla(client, line.party, x[ids], sent_y[ids])

    ids = torch.arange(len(x))
    losses = fit(
        epochs_of(step, Batches(ids, ids, batch_size=training.batch_size, seed=training.seed)),
        epochs=min(start.passes, training.epochs),
    ).losses
    more = training.epochs - len(losses)
    if more > 0:  # the server has what crossed, and needs nobody's leave to learn from it again
        sent = [exchange.request.tensors for exchange in line.record.exchanges]
        z, y = (torch.cat([tensors[kind] for tensors in sent]) for kind in (Kind.ACTIVATION, Kind.LABEL))
        again = Batches(z.detach(), y, batch_size=training.batch_size, seed=training.seed + 1)
        losses += fit(epochs_of(lambda z, y: server.learn(z, y)[0], again), epochs=more).losses
    encoder = Encoder(bottom, guard)
    return trained_over(start, client, line, losses, encoder, {}), torch.cat(order)[: len(x)]


def trained_over(
    start: Start, client: Learner, line: Wire, losses: list[float], encoder: Encoder, more: dict[str, list[str]]
) -> Trained:
    """Return what was trained over one wire, whose other end is the server."""
    private = start.splits.private
    visible = {SERVER: list(LABELLED), CLIENT: list(NOTHING), **more}
    model = nn.Sequential(client.stage)
    return Trained(
        [client, line.party], model, losses, counted([line.meter]), visible, private.x, private.y, encoder, line.record
    )


@torch.no_grad()
def activations(bottom: nn.Module, x: Tensor) -> Tensor:
    """Return what a bottom puts out for public inputs."""
    return torch.cat([bottom(part) for part in x.split(256)])
