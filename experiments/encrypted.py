"""One function a way to train through an encrypted layer, and its plain twins: who holds what, over which wire.

The model is cut below its last layer with weights, or where it is asked to be: bottom, that one layer at the server,
and a head. Client and server share this process; real frames lie in between.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, isinf
from typing import Any

import torch
from torch import Tensor, nn

from experiments.parts import Shield
from experiments.planning import sgd_noise
from experiments.setups import UNLABELLED, counted, train_unsplit
from experiments.training import Trained, Training, build_model, optimizer_for
from privacy.dp import Account, Adjacency, Budget, PaddedCrossEntropy, PoissonBatches, PrivateLearner
from privacy.dp.poisson import capacity_for
from privacy.he import (
    FAST,
    LEAKS,
    LEARNS,
    CipherHolder,
    EncryptedLayer,
    Geometry,
    Keys,
    LayerHolder,
    Parameters,
    SplitWaysHolder,
    he_encw,
    he_u_dp,
    split_ways,
)  # fmt: skip
from splitlearn.cut import cut, layer_names
from splitlearn.data import Splits
from splitlearn.party import Guard, Learner
from splitlearn.protocols import u_shaped
from splitlearn.remote import Wire, wire
from splitlearn.train import Batches, Predictor, epochs_of, fit, predict

__all__ = [
    "WAYS", "Ready", "Setup", "Way", "check_linear_last", "encrypted_cut", "train_he_encw", "train_he_inference",
    "train_he_u_dp", "train_split_ways",
]  # fmt: skip

SERVER, CLIENT = "server", "client"
NOISE_OFF = 1e-24  # a noise multiplier that even Adam does not see, and a clip that nothing reaches
NO_CLIP = 1e4


@dataclass(frozen=True)
class Setup:
    """What a way to train starts from. ``epsilon`` is infinite where noise and clipping are switched off."""

    splits: Splits
    training: Training
    parameters: Parameters = FAST
    epsilon: float = 8.0
    delta: float = 1e-5
    clip: float = 1.0
    dp_lr: float = 0.5  # of plain SGD, where noise is added: Adam would divide by it
    max_nbytes: int = 0  # of the transcript that is kept

    @property
    def expected(self) -> int:
        """The public number that every loss is divided by."""
        return min(self.training.batch_size, len(self.splits.private))

    def parts(self) -> tuple[nn.Sequential, nn.Module, nn.Sequential]:
        """Return bottom, the server's layer, and head, of a fresh model."""
        model = build_model(self.splits, seed=self.training.seed)
        below = len(cut(model, self.training.cut)[0])
        at = next((n for n in range(below, len(model)) if list(model[n].parameters())), None)
        if at is None:
            raise ValueError(
                f"expected a layer with weights above {self.training.cut}, which the server would hold, got none; use "
                f"--cut {encrypted_cut(model)}"
            )
        # What has no weights between the cut and the layer stays with the client.
        stages = list(cut(model, *([at] if at == len(model) - 1 else [at, at + 1])))
        head = stages[2] if len(stages) > 2 else nn.Sequential(nn.Identity())
        return stages[0], stages[1][0], head

    def batches(self) -> Batches:
        """Return the private samples, shuffled anew every epoch."""
        private = self.splits.private
        return Batches(private.x, private.y, batch_size=self.training.batch_size, seed=self.training.seed)


@dataclass
class Ready:
    """Parties that stand ready: one training step, its batches, and what the evaluation needs."""

    step: Callable[[Tensor, Tensor], Tensor]
    batches: Batches | PoissonBatches
    chain: list[Predictor]
    line: Wire
    stage: nn.Module  # bottom and head, as far as the client holds them
    visible: Mapping[str, list[str]]
    layer: EncryptedLayer | None = None
    account: Account | None = None
    read_by_logits: bool = True  # whether the server's layer puts out the logits
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Way:
    """A line of the catalogue: how to make ready, and what it needs. ``trains`` is false for inference alone."""

    summary: str
    ready: Callable[[Setup], Ready]
    encrypted: bool = True
    noised: bool = False  # whether it meets an ε
    trains: bool = True


def encrypted_cut(model: nn.Sequential) -> str:
    """Return the name of the last layer below the model's last layer with weights."""
    places = [n for n, layer in enumerate(model) if list(layer.parameters())]
    return layer_names(model)[places[-1] - 1]


def check_linear_last(setup: Setup) -> None:
    """Raise ``ValueError`` where ``split_ways`` has nothing to train as it was published: a linear layer, the last."""
    _, layer, head = setup.parts()
    if not isinstance(layer, nn.Linear) or list(head.parameters()):
        raise ValueError(
            f"expected a linear layer last, which split_ways is published for, got {layer}; use --cut "
            f"{encrypted_cut(build_model(setup.splits, seed=0))}, or leave split_ways out"
        )


def plain(setup: Setup, shield: Shield | None = None) -> Ready:
    """U-shaped training in the clear: activations and gradients cross as they are, or as the client's shield has it."""
    bottom, layer, head = setup.parts()
    shield = shield or Shield()
    client, top = _party(setup, CLIENT, bottom, shield.guard), _party(setup, "head", head)
    line = wire(_party(setup, SERVER, nn.Sequential(layer)), shield.codec, max_nbytes=setup.max_nbytes)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return u_shaped(client, line.party, top, x, y)

    return Ready(
        step, setup.batches(), [client, line.party, top], line, nn.Sequential(bottom, head), {SERVER: UNLABELLED},
        read_by_logits=not list(head.parameters()),
    )  # fmt: skip


def plain_dp(setup: Setup) -> Ready:
    """The same DP-SGD as ``he_u_dp``'s, all in one place and in the clear: what noise alone costs."""
    bottom, layer, head = setup.parts()
    client, batches, account = _private(setup, nn.Sequential(bottom, layer, head))
    line = wire(client, max_nbytes=setup.max_nbytes)  # nothing crosses

    def step(x: Tensor, y: Tensor) -> Tensor:
        return client.learn(x, y)[0]

    return Ready(step, batches, [client], line, client.stage, {"nobody": ["nothing crosses"]}, account=account)


def encrypted_u_dp(setup: Setup) -> Ready:
    """Encrypted forward and backward; the server gets one differentially private step."""
    bottom, plain_layer, head = setup.parts()
    line = wire(LayerHolder(SERVER, plain_layer, update="private"), max_nbytes=setup.max_nbytes)
    layer = EncryptedLayer(Keys(setup.parameters), line.party, update="private", out_of_range="clip")
    stage = nn.Sequential(bottom, layer, head)
    notes: list[str] = []
    visible = LEARNS["he_u_dp"]
    if isinf(setup.epsilon):
        client = _joint(setup, stage, NO_CLIP, NOISE_OFF)
        batches: Batches | PoissonBatches = setup.batches()
        account = None
        visible = {SERVER: [LEARNS["he_u_dp"][SERVER][0], "the TRUE steps of its layer: no noise, and no ε"]}
        notes.append("noise and clipping are off: the server reads the true step, and no ε holds; a comparison only")
    else:
        client, batches, account = _private(setup, stage)

    def step(x: Tensor, y: Tensor) -> Tensor:
        if account is None:
            client.allow(last=True)
        return he_u_dp(client, x, y)

    return Ready(step, batches, [client], line, nn.Sequential(bottom, head), visible, layer, account, notes=notes)


def encrypted_weights(setup: Setup) -> Ready:
    """Activations, gradients and weights encrypted: the server sees ciphertexts only."""
    bottom, plain_layer, head = setup.parts()
    line = wire(CipherHolder(SERVER, plain_layer), max_nbytes=setup.max_nbytes)
    with torch.no_grad():  # a convolution has a row for each position
        positions = Geometry.of(plain_layer).rows(bottom(setup.splits.private.x[:1])).shape[1]
    layer = EncryptedLayer(
        Keys(setup.parameters), line.party, update="encrypted", layer=plain_layer, out_of_range="clip",
        rows=min(setup.training.batch_size * positions, setup.parameters.slots),
    )  # fmt: skip
    client = _party(setup, CLIENT, nn.Sequential(bottom, layer, head))

    def step(x: Tensor, y: Tensor) -> Tensor:
        return he_encw(client, x, y)

    return Ready(step, setup.batches(), [client], line, client.stage, LEARNS["he_encw"], layer)


def encrypted_inference(setup: Setup) -> Ready:
    """A model trained in the clear, whose layer answers on ciphertexts."""
    trained = train_unsplit(setup.training, setup.splits, Shield())
    bottom, layer, head = setup.parts()
    for own, other in zip(nn.Sequential(bottom, layer, head).parameters(), trained.model.parameters(), strict=True):
        own.data.copy_(other.data)
    line = wire(LayerHolder(SERVER, layer), max_nbytes=setup.max_nbytes)
    held = EncryptedLayer(Keys(setup.parameters), line.party, out_of_range="clip")
    client = Learner(CLIENT, nn.Sequential(bottom, held, head), seed=setup.training.seed)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(trained.losses[-1])

    return Ready(step, setup.batches(), [client], line, nn.Sequential(bottom, head), LEARNS["he_inference"], held)


def leaky(setup: Setup) -> Ready:
    """LEAKY: encrypted activations, and gradients in the clear, as published (Split Ways)."""
    check_linear_last(setup)
    bottom, layer, head = setup.parts()
    assert isinstance(layer, nn.Linear)
    holder = SplitWaysHolder(SERVER, layer, optimizer_for(layer, setup.training))
    line = wire(holder, max_nbytes=setup.max_nbytes)
    held = EncryptedLayer(Keys(setup.parameters), line.party, out_of_range="clip")
    client = _party(setup, CLIENT, bottom)
    top = _party(setup, "head", head)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return split_ways(client, held, line.party, top, x, y)

    chain: list[Predictor] = [client, Learner("layer", nn.Sequential(held)), top]
    return Ready(step, setup.batches(), chain, line, nn.Sequential(bottom, head), LEAKS, held)


WAYS: dict[str, Way] = {
    "none": Way("U-shaped training in the clear", plain, encrypted=False),
    "plain_dp": Way(
        "DP-SGD in the clear, in one place: what noise alone costs", plain_dp, encrypted=False, noised=True
    ),
    "split_ways": Way("LEAKY: encrypted activations, gradients in the clear, as published", leaky),
    "he_inference": Way("trained in the clear, encrypted inference", encrypted_inference, trains=False),
    "he_encw": Way("activations, gradients and weights encrypted; one key holder", encrypted_weights),
    "he_u_dp": Way("encrypted forward and backward, and one DP step for the server", encrypted_u_dp, noised=True),
}


def train_he_u_dp(training: Training, splits: Splits, shield: Shield) -> Trained:
    """U shape on ciphertexts: encrypted forward and backward, one DP-SGD step (ε = 8) for the server's layer."""
    return _trained(encrypted_u_dp, training, splits)


def train_he_encw(training: Training, splits: Splits, shield: Shield) -> Trained:
    """U shape on ciphertexts, weights encrypted too: the server sees ciphertexts only; one key holder."""
    return _trained(encrypted_weights, training, splits)


def train_he_inference(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Trained in the clear in one place, then inference through an encrypted layer."""
    return _trained(encrypted_inference, training, splits, billed=splits.test.x)


def train_split_ways(training: Training, splits: Splits, shield: Shield) -> Trained:
    """LEAKY baseline: encrypted activations, but gradients in the clear, as published (Khan et al. 2023)."""
    return _trained(leaky, training, splits)


def _trained(
    way: Callable[[Setup], Ready], training: Training, splits: Splits, *, billed: Tensor | None = None
) -> Trained:
    """Train that way; ``billed`` are inputs whose predictions are what crosses, where training crosses nothing."""
    ready = way(Setup(splits, training))
    losses = fit(epochs_of(ready.step, ready.batches), epochs=1 if billed is not None else training.epochs).losses
    if billed is not None:
        predict(ready.chain, billed)
    visible = {observer: list(seen) for observer, seen in ready.visible.items()}
    private = splits.private
    claim = None if ready.account is None else ready.account.claim()
    return Trained(
        ready.chain, ready.stage, losses, counted([ready.line.meter]), visible, private.x, private.y, claim=claim
    )


def _party(setup: Setup, name: str, stage: nn.Module, guard: Guard | None = None) -> Learner:
    return Learner(
        name, stage, optimizer_for(stage, setup.training), guard, loss=PaddedCrossEntropy(setup.expected),
        seed=setup.training.seed * 1000 + len(name),
    )  # fmt: skip


def _joint(setup: Setup, stage: nn.Module, clip: float, noise: float) -> PrivateLearner:
    """Return one party that clips all of a sample's gradients together, and draws noise once."""
    noised = not isinf(setup.epsilon)
    optimizer = torch.optim.SGD(stage.parameters(), setup.dp_lr) if noised else optimizer_for(stage, setup.training)
    assert optimizer is not None
    return PrivateLearner(
        CLIENT, stage, optimizer, clip=clip, noise_multiplier=noise, expected_batch_size=setup.expected,
        seed=setup.training.seed,
    )  # fmt: skip


def _private(setup: Setup, stage: nn.Module) -> tuple[PrivateLearner, PoissonBatches, Account]:
    """Return a client that trains by DP-SGD, its batches, and the account that they are entered into."""
    private = setup.splits.private
    rate = setup.expected / len(private)
    steps = setup.training.epochs * round(1 / rate)
    # Half of δ for batches over their capacity: the noise hardly grows, and twice the expected rows then mostly do.
    failure = setup.delta / 2 / (steps * (1 + exp(min(setup.epsilon, 600))))
    least, room = capacity_for(len(private) + 1, rate, failure), 2 * setup.expected
    rows: dict[str, Any] = {"capacity": room, "physical": room} if least <= room else {"physical": setup.expected}
    delta = setup.delta / 2 if least <= room else setup.delta
    client = _joint(setup, stage, setup.clip, sgd_noise(setup.epsilon, delta, rate, steps))
    budget = Budget(setup.epsilon, setup.delta)
    account = budget.account(SERVER, CLIENT, Adjacency.ADD_REMOVE_SAMPLE, shaped_by=[client], model="central")
    batches = PoissonBatches(
        private.x, private.y, rate=rate, account=account, parties=[client], steps=steps,
        seed=setup.training.seed, **rows,
    )  # fmt: skip
    return client, batches, account
