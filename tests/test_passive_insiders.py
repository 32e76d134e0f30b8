"""Passive insiders: they answer as the honest server, bit for bit, and rebuild inputs from what they saw meanwhile."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attacks.inversion.networks import Convolutional, Dense
from attacks.inversion.pcat import PCAT
from attacks.inversion.reconstruction import Reconstruction
from attacks.inversion.sdar import SDAR
from splitlearn import (
    Batches,
    Grants,
    Kind,
    Learner,
    Party,
    Threat,
    View,
    cut,
    granted,
    observe,
    u_shaped,
    vanilla,
    wire,
)  # fmt: skip
from splitlearn.data import load, split
from splitlearn.metrics import LeakageScore, score_reconstruction
from splitlearn.models import digits_cnn

LABELLED = Threat(auxiliary=True, auxiliary_labels=True)
PARTS = split(load("digits"), private=800, auxiliary=600, test=397, seed=0)

# One row an attack, at toy size: name, attack, cut, training steps, and the MSE it then stays below.
ATTACKS = [
    ("SDAR", SDAR(Convolutional(16, 0)), "relu1", 120, 0.045),
    ("PCAT", PCAT(epochs=15), "relu2", 400, 0.045),
]
BY_NAME = [pytest.param(attack, id=name) for name, attack, *_ in ATTACKS]

Attack = SDAR | PCAT


def known(threat: Threat = LABELLED, num: int = 600) -> View:
    return granted(threat, Grants(auxiliary_x=PARTS.auxiliary.x[:num], auxiliary_y=PARTS.auxiliary.y[:num]))


class Victim:
    """A digits CNN in training, with an insider in the server's place; U-shaped where it is cut at two places."""

    def __init__(
        self,
        attack: Attack | None,
        *places: str,
        model: Callable[[], nn.Sequential] = digits_cnn,
        lr: float = 1e-3,
        seed: int = 0,
        view: View | None = None,
    ):
        torch.manual_seed(seed)
        names = ["client", "server", "head"]
        self.parties = [
            Learner(name, stage, torch.optim.Adam(stage.parameters(), lr), seed=seed)
            for name, stage in zip(names, cut(model(), *places), strict=False)
        ]
        self.client, self.server = self.parties[:2]
        self.insider = attack.insider(self.server, view or known()) if attack else None
        parties: list[Party] = [self.client, self.insider or self.server, *self.parties[2:]]
        self.step = partial(u_shaped if len(places) > 1 else vanilla, *parties)
        self.batches = Batches(PARTS.private.x, PARTS.private.y, batch_size=32, seed=seed)
        self.losses: list[float] = []

    def trained(self, steps: int) -> "Victim":
        while len(self.losses) < steps:
            for x, y in self.batches:
                self.losses.append(self.step(x, y).item())
                if len(self.losses) == steps:
                    break
        return self

    def sent(self, num: int = 200) -> Tensor:
        return self.client.predict(PARTS.private.x[:num])

    def found(self, z: Tensor) -> Reconstruction:
        assert self.insider is not None
        return self.insider(seen(z))

    def score(self, z: Tensor) -> LeakageScore:
        x = PARTS.private.x[: len(z)]
        return score_reconstruction(x, self.found(z).x_hat, auxiliary_x=PARTS.auxiliary.x)


def seen(z: Tensor) -> View:
    wired = wire(Learner("server", nn.Identity()))
    wired.party.predict(z)
    return observe(wired.record, threat=LABELLED)


def with_everything_that_could_differ() -> nn.Sequential:
    """Return a small model whose layers draw numbers and keep statistics."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(),
        nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 16),
        nn.Dropout(0.1), nn.Linear(16, 10),
    )  # fmt: skip


@pytest.fixture(scope="module", params=ATTACKS, ids=[name for name, *_ in ATTACKS])
def attacked(request: pytest.FixtureRequest) -> tuple[Victim, float]:
    torch.set_num_threads(1)
    _, attack, place, steps, mse = request.param
    return Victim(attack, place).trained(steps), mse


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("places", [("2",), ("2", "5")], ids=["vanilla", "U-shaped"])
@pytest.mark.parametrize("attack", [SDAR(Dense(8, 1)), PCAT(Dense(8, 1), epochs=1)], ids=["SDAR", "PCAT"])
def test_training_is_that_with_the_honest_server_bit_for_bit(attack: Attack, places: tuple[str, ...]) -> None:
    before = torch.get_rng_state()
    attacked = Victim(attack, *places, model=with_everything_that_could_differ).trained(30)
    torch.set_rng_state(before)
    honest = Victim(None, *places, model=with_everything_that_could_differ)
    honest.trained(30)
    assert attacked.losses == honest.losses
    assert attacked.insider is not None
    z = attacked.sent(20)
    attacked.insider(seen(z))
    for mine, theirs in zip(attacked.parties, honest.parties, strict=True):
        assert same(mine.state_dict(), theirs.state_dict())
    assert torch.equal(attacked.insider.predict(z), honest.server.predict(honest.sent(20)))


@pytest.mark.parametrize("attack", [SDAR(), PCAT()], ids=["SDAR", "PCAT"])
def test_the_global_generator_stays_as_it_was(attack: Attack) -> None:
    honest, attacked = Victim(None, "relu1"), Victim(attack, "relu1")
    torch.manual_seed(5)
    honest.trained(3)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    attacked.trained(3)
    assert torch.equal(torch.get_rng_state(), expected)


def test_unprotected_inputs_are_rebuilt(attacked: tuple[Victim, float]) -> None:
    victim, mse = attacked
    score, found = victim.score(victim.sent()), victim.found(victim.sent())
    assert score.metrics["mse"] < mse
    assert score.baselines["mse_mean_image"] == pytest.approx(0.073, abs=0.006)
    assert found.x_hat.shape == (200, 1, 8, 8)
    assert 0 <= found.x_hat.min() <= found.x_hat.max() <= 1
    assert found.evidence["converged"] in (0.0, 1.0)
    assert found.evidence["training_steps"] == len(victim.losses)


@pytest.mark.parametrize("destroyed", ["permuted", "noise", "zero"])
def test_without_a_signal_it_falls_to_the_baseline(attacked: tuple[Victim, float], destroyed: str) -> None:
    victim, _ = attacked
    z = victim.sent()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    z = {"permuted": z.roll(1, 0), "noise": z.mean() + z.std() * noise, "zero": torch.zeros_like(z)}[destroyed]
    assert victim.score(z).advantage <= 0.1


@pytest.mark.parametrize("attack", BY_NAME)
@pytest.mark.parametrize(
    "threat",
    [
        Threat(),
        Threat(auxiliary=True),
        replace(LABELLED, sees=frozenset({Kind.LABEL})),
    ],
    ids=["nothing", "no labels", "no activations"],
)
def test_what_is_not_granted_is_not_there(attack: Attack, threat: Threat) -> None:
    with pytest.raises(LookupError, match="grant"):
        Victim(attack, "relu1", view=known(threat))


@pytest.mark.parametrize("attack", BY_NAME)
def test_the_seed_decides(attack: Attack) -> None:
    first, again, other = (Victim(replace(attack, seed=seed), "relu1").trained(3) for seed in (0, 0, 1))
    z = first.sent(20)
    assert torch.equal(first.found(z).x_hat, again.found(z).x_hat)
    assert not torch.equal(first.found(z).x_hat, other.found(z).x_hat)


def test_in_the_u_shape_the_head_is_simulated_and_labels_are_found() -> None:
    victim = Victim(SDAR(Dense(64, 1)), "relu1", "relu3").trained(120)
    assert victim.score(victim.sent()).advantage > 0.3
    assert victim.insider is not None
    guessed = victim.insider.labels(victim.sent())
    assert (guessed == PARTS.private.y[:200]).double().mean() > 0.6


def test_float64_is_kept() -> None:
    victim = Victim(SDAR(Dense(8, 1), batch_size=8), "relu1", model=lambda: digits_cnn().double())
    for x, y in list(victim.batches)[:2]:
        victim.step(x.double(), y)
    assert victim.found(victim.client.predict(PARTS.private.x[:4].double())).x_hat.dtype == torch.float64


def test_without_weights_there_are_no_critics_steps() -> None:
    insider = Victim(SDAR(simulator_weight=0, decoder_weight=0, batch_size=8), "relu1").trained(2).insider
    assert insider is not None
    assert not insider.simulator_critic_optimizer.state
    assert not insider.decoder_critic_optimizer.state
    assert insider.decode_optimizer.state


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PCAT(lr=0), "lr > 0"),
        (lambda: PCAT(steps_per_batch=0), "one step"),
        (lambda: SDAR(batch_size=0), "one sample a batch"),
        (lambda: SDAR(decoder_lr=0), "learning rates > 0"),
        (lambda: SDAR(simulator_weight=-1), "weights of 0 or more"),
        (lambda: Victim(SDAR(), "relu1").found(torch.zeros(2, 16, 8, 8)), "got no step"),
        (lambda: Victim(PCAT(), "relu1").trained(1).found(torch.zeros(2, 32, 8, 8)), "of the same cut"),
        (lambda: Victim(SDAR(stage=nn.Flatten), "relu1").trained(1), "pass a stage of the victim's cut"),
        (lambda: Victim(PCAT(), "relu1", view=known(num=4)), "at least 8 auxiliary samples"),
        (
            lambda: Victim(
                PCAT(),
                "relu1",
                view=granted(LABELLED, Grants(auxiliary_x=PARTS.auxiliary.x, auxiliary_y=PARTS.auxiliary.y.double())),
            ),
            "one class label",
        ),
    ],
)
def test_what_makes_no_sense(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_figures_and_what_the_critics_add(seed: int) -> None:
    errors = {}
    for weights in ({}, {"simulator_weight": 0.0, "decoder_weight": 0.0}):
        victim = Victim(SDAR(seed=seed, **weights), "relu2", seed=seed).trained(1500)
        errors[bool(weights)] = victim.score(victim.sent(800)).metrics["mse"]
    assert errors[False] < 0.013
    assert errors[True] > 0.02


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_figure_in_the_u_shape() -> None:
    victim = Victim(SDAR(), "relu2", "relu4").trained(600)
    assert victim.score(victim.sent(400)).metrics["mse"] < 0.03
